"""Slices that are decoded once and then kept in memory, within a stated budget."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

BUDGET = 2048  # MiB: about 8,000 slices of 512 x 512


class InMemory(Dataset):
    """The items of another data set, decoded at once and rebuilt, bit for bit, on every access.

    Items are (image float32 [3,H,W] of three equal channels, label or target). A slice is kept as
    8-bit grey where that loses nothing (any 8-bit picture), else as float32; masks are kept as
    bits. All of it is one tensor, which the processes of a `DataLoader` share (where they are
    spawned, torch moves it to shared memory). Beyond the budget (MiB), slices are decoded each
    time; `kept` says how many are here, `nbytes` what they take.
    """

    def __init__(self, dataset: Dataset, budget: float = BUDGET, progress: bool = True) -> None:
        self.dataset, self._ends = dataset, [0]  # where the slices end in `_data`
        data, indices = bytearray(), range(len(dataset))
        starts = tqdm(indices[::64], desc="decoding", unit="64", disable=not progress)
        with ThreadPoolExecutor(2) as pool:
            chunks = (pool.map(self._pack, indices[start : start + 64]) for start in starts)
            for item in chain.from_iterable(chunks):
                if len(data) + len(item) > budget * 2**20:
                    break
                data += item
                self._ends.append(len(data))
        # one tensor, because sharing takes an open file for each
        self._data = torch.from_numpy(np.frombuffer(data, np.uint8))
        self.kept, self.nbytes = len(self._ends) - 1, len(data)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        if not 0 <= index < self.kept:
            return self.dataset[index]
        start, end = self._ends[index : index + 2]
        grey, target, shape = pickle.loads(self._data[start:end].numpy())
        if grey.dtype == np.uint8:
            grey = grey.astype(np.float32) / 255  # as `read_image` does it
        if shape:
            target["masks"] = np.unpackbits(target["masks"], count=np.prod(shape)).reshape(shape)
            target = {name: torch.from_numpy(value) for name, value in target.items()}
        return torch.from_numpy(grey).repeat(3, 1, 1), target  # [3, H, W]

    def _pack(self, index: int) -> bytes:
        # grey [H, W], label or target, and the shape of the masks if there are any
        image, target = self.dataset[index]
        grey, shape = image[0].numpy(), None
        levels = np.rint(grey * 255).astype(np.uint8)
        if np.array_equal(levels.astype(np.float32) / 255, grey):
            grey = levels
        if isinstance(target, dict):
            target = {name: value.numpy() for name, value in target.items()}
            shape = target["masks"].shape  # [K, H, W]
            target["masks"] = np.packbits(target["masks"])
        return pickle.dumps((grey, target, shape), pickle.HIGHEST_PROTOCOL)
