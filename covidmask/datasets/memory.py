"""Slices that are decoded once and then kept in memory, within a stated budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

BUDGET = 2048  # MiB: about 8,000 slices of 512 x 512


class InMemory(Dataset):
    """The items of another data set, decoded at once and rebuilt, bit for bit, on every access.

    A slice is kept as 8-bit grey where that loses nothing (any 8-bit picture), else as float32;
    the masks of lesions are kept as bits. All of it is one tensor, so that the processes that read
    slices for a `DataLoader` share the memory of the one that started them (where they are spawned,
    torch moves the tensor to shared memory), and nothing is decoded twice. Slices beyond the budget
    are decoded each time.

    Args:
        dataset: items (image float32 [3,H,W] of three equal channels, label or target).
        budget: MiB for the decoded slices.
        threads: slices decoded at a time.
        progress: show a bar.

    Attributes:
        kept: how many slices are in memory. nbytes: what they take.
        Every attribute of `dataset` (names, labels, patients, ...) is there, too.
    """

    def __init__(
        self, dataset: Dataset, budget: float = BUDGET, threads: int = 2, progress: bool = True
    ) -> None:
        self.dataset = dataset
        self._slices: list[tuple[Any, dict[str, tuple]]] = []
        data, limit = bytearray(), budget * 2**20
        for rest, arrays in _decoded(dataset, threads, progress):
            if len(data) + sum(array.nbytes for array in arrays.values()) > limit:
                break
            places = {}
            for name, array in arrays.items():
                places[name] = (array.shape, array.dtype, len(data))
                data += array.tobytes()
            self._slices.append((rest, places))
        # one tensor, because sharing takes an open file for each
        self._data = torch.from_numpy(np.frombuffer(data, np.uint8))

    @property
    def kept(self) -> int:
        return len(self._slices)

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if not 0 <= index < self.kept:
            return self.dataset[index]
        rest, places = self._slices[index]
        data = self._data.numpy()
        arrays = {
            name: np.ndarray(shape, dtype, data, start).copy()
            for name, (shape, dtype, start) in places.items()
        }
        return _unpack(rest, arrays)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet, while an instance is copied or unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _decoded(
    dataset: Dataset, threads: int, progress: bool
) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
    """Every packed slice, in order; at most 64 are decoded ahead."""
    with ThreadPoolExecutor(threads) as pool:
        chunks = [range(i, min(i + 64, len(dataset))) for i in range(0, len(dataset), 64)]
        for chunk in tqdm(chunks, desc="decoding", unit="64", disable=not progress):
            yield from pool.map(lambda i: _pack(*dataset[i]), chunk)


def _pack(image: Tensor, rest: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """The label, or the shape of the masks, and the arrays."""
    grey = image[0].numpy()  # [H, W]
    levels = np.rint(grey * 255).astype(np.uint8)
    if np.array_equal(_unit(levels), grey):
        grey = levels
    if not isinstance(rest, dict):
        return rest, {"image": grey}
    arrays = {name: value.numpy() for name, value in rest.items()}
    masks = arrays["masks"]  # [K, H, W], 0 or 1
    return masks.shape, {**arrays, "masks": np.packbits(masks), "image": grey}


def _unpack(rest: Any, arrays: dict[str, np.ndarray]) -> tuple[Tensor, Any]:
    grey = arrays.pop("image")
    grey = _unit(grey) if grey.dtype == np.uint8 else grey
    image = torch.from_numpy(grey).repeat(3, 1, 1)  # [3, H, W]
    if arrays:
        bits = np.unpackbits(arrays["masks"], count=math.prod(rest))
        arrays["masks"] = bits.reshape(rest)
        rest = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return image, rest


def _unit(levels: np.ndarray) -> np.ndarray:
    """8-bit grey to 0..1, as `read_image` does it."""
    return levels.astype(np.float32) / 255
