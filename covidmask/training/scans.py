"""Scans as items: all slices of one patient and class in a list, for COVNet [LQX+20] (Table 3)."""

from __future__ import annotations

import re

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from covidmask.datasets.classes import SliceImages
from covidmask.models.detector import for_inference, to_model
from covidmask.models.systems import ScanClassifier
from covidmask.training.loop import make_fabric

LONGEST = 16  # slices of a scan that are looked at: what fits in memory with gradients of all


def owners(slices: SliceImages) -> list[str]:
    """Whose each slice is: in COVIDx-CT each class numbers its own patients."""
    return [f"{label} {name}" for label, name in zip(slices.labels, slices.patients, strict=True)]


class Scans(Dataset):
    """The scans of a list of slices; has `names`, `labels`, `patients` and `classes`, as that has.

    Item i is `(images, label)`: a list of up to `longest` images, float32 [3,H,W] in 0..1, and an
    int. A scan is all slices that have one patient and class (see `owners`; two visits of a patient
    are not told apart). Its slices are in the order of their names, their numbers by value; of a
    scan with more than `longest`, so many are taken, evenly spaced, the first and last among them.
    """

    def __init__(self, slices: SliceImages, longest: int = LONGEST) -> None:
        self.slices, self.classes = slices, slices.classes
        whose: dict[str, list[int]] = {}
        for i, owner in enumerate(owners(slices)):
            whose.setdefault(owner, []).append(i)
        self.members = []  # of each scan, positions in the list
        for there in whose.values():
            # text and numbers alternate, so that like is compared with like
            there = sorted(there, key=lambda i: _parts(slices.names[i]))
            kept = np.linspace(0, len(there) - 1, min(longest, len(there))).round().astype(int)
            self.members.append([there[k] for k in kept])
        firsts = [members[0] for members in self.members]
        self.labels = [slices.labels[i] for i in firsts]
        self.patients = [slices.patients[i] for i in firsts]
        self.names = [f"the scan of {slices.names[i]}" for i in firsts]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        return [self.slices[i][0] for i in self.members[index]], self.labels[index]


def _parts(name: str) -> list[str | int]:
    return [int(p) if i % 2 else p for i, p in enumerate(re.split(r"([0-9]+)", name))]


@torch.no_grad()
def scan_logits(
    model: ScanClassifier,
    slices: SliceImages,
    *,
    fabric: Fabric | None = None,
    progress: bool = True,
) -> Tensor:
    """The logits of every scan of a list, float32 [scans,C], on the CPU, in the order of `Scans`.

    Slices are read a scan at a time, so that memory holds no more than `LONGEST`.
    """
    fabric, scans = fabric or make_fabric(), Scans(slices)
    fast, rows = for_inference(model.to(fabric.device)), []
    for i in tqdm(range(len(scans)), "classifying scans", disable=not progress):
        names = [slices.names[k] for k in scans.members[i]]
        with fabric.autocast():
            found = fast([to_model(scans[i][0], fabric.device, names)])
        rows.append(found.float().cpu())
    return torch.cat(rows)
