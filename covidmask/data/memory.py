"""Slices that are decoded once and then kept in memory, within a stated budget."""

from __future__ import annotations

from collections.abc import Iterable
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
    the masks of lesions are kept as bits. Processes that read slices share the memory of the one
    that started them, so nothing is decoded twice. Slices beyond the budget are decoded each time.

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
        self.nbytes = 0
        self._packed: list[tuple] = []
        limit = budget * 2**20
        with ThreadPoolExecutor(threads) as pool:
            chunks = (range(i, min(i + 64, len(dataset))) for i in range(0, len(dataset), 64))
            for chunk in tqdm(list(chunks), desc="decoding", unit="64", disable=not progress):
                for packed in pool.map(lambda i: _pack(*dataset[i]), chunk):
                    size = sum(_sizes(packed))
                    if self.nbytes + size > limit:
                        return
                    self._packed.append(packed)
                    self.nbytes += size

    @property
    def kept(self) -> int:
        return len(self._packed)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if not 0 <= index < self.kept:
            return self.dataset[index]
        return _unpack(*self._packed[index])

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet, while an instance is copied or unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _pack(image: Tensor, rest: Any) -> tuple[np.ndarray, Any]:
    grey = image[0].numpy()  # [H, W]
    levels = np.rint(grey * 255).astype(np.uint8)
    if np.array_equal(_unit(levels), grey):
        grey = levels
    if isinstance(rest, dict) and "masks" in rest:
        masks = rest["masks"].numpy()  # [K, H, W], 0 or 1
        rest = {**rest, "masks": (np.packbits(masks), masks.shape)}
    return grey.copy(), rest


def _unpack(grey: np.ndarray, rest: Any) -> tuple[Tensor, Any]:
    grey = _unit(grey) if grey.dtype == np.uint8 else grey
    image = torch.from_numpy(grey).repeat(3, 1, 1)  # [3, H, W], memory of its own
    if isinstance(rest, dict):
        rest = {name: value.clone() for name, value in rest.items() if name != "masks"} | {
            "masks": _bits(*rest["masks"])
        }
    return image, rest


def _unit(levels: np.ndarray) -> np.ndarray:
    """8-bit grey to 0..1, as `read_image` does it."""
    return levels.astype(np.float32) / 255


def _bits(packed: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape))


def _sizes(packed: tuple[np.ndarray, Any]) -> Iterable[int]:
    grey, rest = packed
    yield grey.nbytes
    if isinstance(rest, dict):
        yield rest["masks"][0].nbytes
        yield from (value.nbytes for value in rest.values() if isinstance(value, Tensor))
