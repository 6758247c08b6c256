"""Slices that are decoded once and then kept in memory, within a stated budget."""

from __future__ import annotations

import math
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
    masks are kept as bits. All of it is one tensor, which the processes of a `DataLoader` share
    (where they are spawned, torch moves it to shared memory). Slices beyond the budget are decoded
    each time.

    Args:
        dataset: items (image float32 [3,H,W] of three equal channels, label or target); each of
            its attributes (names, labels, patients, ...) is there here, too.
        budget: MiB for the decoded slices; `kept` says how many there are, `nbytes` what they take.
        threads: slices decoded at a time.
    """

    def __init__(
        self, dataset: Dataset, budget: float = BUDGET, threads: int = 2, progress: bool = True
    ) -> None:
        self.dataset = dataset
        self._slices: list[tuple[Any, dict[str, tuple]]] = []  # label, and where its arrays lie
        data, count = bytearray(), len(dataset)
        starts = tqdm(range(0, count, 64), desc="decoding", unit="64", disable=not progress)
        with ThreadPoolExecutor(threads) as pool:
            chunks = (range(start, min(start + 64, count)) for start in starts)  # decoded ahead
            for label, arrays in (item for chunk in chunks for item in pool.map(self._pack, chunk)):
                if len(data) + sum(array.nbytes for array in arrays.values()) > budget * 2**20:
                    break
                places = {}
                for name, array in arrays.items():
                    places[name] = (array.shape, array.dtype, len(data))
                    data += array.tobytes()
                self._slices.append((label, places))
        # one tensor, because sharing takes an open file for each
        self._data = torch.from_numpy(np.frombuffer(data, np.uint8))
        self.kept, self.nbytes = len(self._slices), self._data.nbytes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if not 0 <= index < self.kept:
            return self.dataset[index]
        label, places = self._slices[index]
        data = self._data.numpy()
        arrays = {k: np.ndarray(*place[:2], data, place[2]).copy() for k, place in places.items()}
        grey = arrays.pop("image")
        if grey.dtype == np.uint8:
            grey = _unit(grey)
        image = torch.from_numpy(grey).repeat(3, 1, 1)  # [3, H, W]
        if not arrays:
            return image, label
        shape = (len(arrays["labels"]), *grey.shape)  # [K, H, W]
        arrays["masks"] = np.unpackbits(arrays["masks"], count=math.prod(shape)).reshape(shape)
        return image, {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _pack(self, index: int) -> tuple[Any, dict[str, np.ndarray]]:
        """The label, if it is one, and the arrays of an item."""
        image, target = self.dataset[index]
        grey = image[0].numpy()  # [H, W]
        levels = np.rint(grey * 255).astype(np.uint8)
        image = levels if np.array_equal(_unit(levels), grey) else grey
        if not isinstance(target, dict):
            return target, {"image": image}
        arrays = {name: value.numpy() for name, value in target.items()}
        return None, {**arrays, "masks": np.packbits(arrays["masks"]), "image": image}

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet, while an instance is copied or unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _unit(levels: np.ndarray) -> np.ndarray:
    """8-bit grey to 0..1, as `read_image` does it."""
    return levels.astype(np.float32) / 255
