"""CT slices with an image class: COVIDx-CT-1, or phantoms (paper, section 2.2)."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from covidmask.config import IMAGE_CLASSES
from covidmask.datasets.scans import IMAGE_SUFFIXES, read_image
from covidmask.errors import DataError
from covidmask.files import (
    atomic_path,
    existing_folder,
    listed_splits,
    read_lines,
    some,
    split_path,
)

if TYPE_CHECKING:
    from covidmask.datasets.classes import SliceImages

NAME_CLASSES = ("Normal", "CP", "NCP")  # how COVIDx-CT-1 calls labels 0, 1, 2 in file names
_LABELS = {text: i for i, name in enumerate(NAME_CLASSES) for text in (name, str(i))}
_NAME = re.compile(r"([^_/\\]+)_([^_/\\]+)_([^_/\\]+)_([^_/\\]+)(\.\w+)")


class SliceName(NamedTuple):
    """The parts of <class>_<patient>_<scan>_<slice>.<suffix>."""

    label: int  # 0 control, 1 common pneumonia, 2 COVID-19
    patient: str
    scan: str
    slice: str


@dataclass(frozen=True)
class SliceEntry:
    """One line of a split file."""

    name: str
    label: int
    box: tuple[int, int, int, int] | None  # body: xmin, ymin, xmax, ymax in pixels; None: not given


def parse_name(name: str) -> SliceName:
    """Read a file name of COVIDx-CT-1 (Normal|CP|NCP_...) or of the author's list (0|1|2_...).

    Raises:
        DataError: the name has another form or class.
    """
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in _LABELS:
        raise DataError(
            f"{name}: this is no slice name; expected <class>_<patient>_<scan>_<slice>.png with "
            "class Normal, CP or NCP (or 0, 1, 2)"
        )
    return SliceName(_LABELS[match[1]], match[2], match[3], match[4])


def read_split(path: str | Path) -> list[SliceEntry]:
    """Read a list with lines `name class xmin ymin xmax ymax`, or `name` alone.

    Raises:
        DataError: the list is missing, empty or names a slice twice; a line does not parse, or its
            class is not the one in the name.
    """
    entries = []
    for number, words in read_lines(path):
        try:
            entries.append(_parse_line(words))
        except ValueError as error:  # DataError is one
            raise DataError(f"{path}, line {number}: {error}") from error
    return entries


def write_split(path: str | Path, entries: Sequence[SliceEntry]) -> None:
    """Write a list that `read_split` reads back.

    Raises:
        OutputError: the file cannot be written.
    """
    lines = [
        entry.name
        if entry.box is None
        else " ".join(map(str, (entry.name, entry.label, *entry.box)))
        for entry in entries
    ]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


class SliceImages(Dataset):
    """One folder of slices and a list of those to use.

    Item i is `(image, label)`: image float32 [3, H, W] in 0..1 (grey, repeated), label int.

    Args:
        root: the folder that holds the image files.
        split: "train", "val" or "test" reads `root`/<split>.txt; another value is the path to a
            list. A name in the list also finds its file under the other suffix (.png, .jpg) or
            class word (the author's `2_91_...` is `NCP_91_...` in COVIDx-CT), if just one is there.
        require_classes: every class must occur, as training needs.

    Attributes:
        names: file names on disk, one per item.
        classes: names of the labels.
        labels: 0 control, 1 common pneumonia, 2 COVID-19.
        patients: the patient of each item.

    Raises:
        DataError: at once for a missing folder, list or file, a line that does not parse, or a
            class that does not occur; on reading an item for damaged files.
    """

    classes = IMAGE_CLASSES

    def __init__(self, root: str | Path, split: str | Path, require_classes: bool = False) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(
                f"{root}: there is no such folder; name the folder that holds the slices"
            )
        path = split_path(root, split)
        entries = read_split(path)
        on_disk = {file.name for file in os.scandir(self.root)}  # one listing, not 60,000 look-ups
        located = [_locate(entry.name, on_disk) for entry in entries]
        missing = [entry.name for entry, name in zip(entries, located, strict=True) if name is None]
        if missing:
            raise DataError(
                f"{path}: slices that are not in {root}: {some(missing)}; put them there, or "
                "remove them from the list"
            )
        self.names: list[str] = [name for name in located if name is not None]
        self.labels: list[int] = [entry.label for entry in entries]
        self.patients: list[str] = [parse_name(entry.name).patient for entry in entries]
        absent = [c for label, c in enumerate(IMAGE_CLASSES) if label not in self.labels]
        if require_classes and absent:
            raise DataError(
                f"{path}: there are no slices of class {', '.join(absent)}; training needs every "
                "class, add some to the list"
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = read_image(self.root / self.names[index])  # [H, W]
        return torch.from_numpy(image).repeat(3, 1, 1), self.labels[index]  # [3, H, W]


def balanced_sample(
    entries: Sequence[SliceEntry], per_class: int, seed: int, by_patient: bool = False
) -> list[SliceEntry]:
    """Draw the same number of slices of each class, without replacement (section 2.2).

    The author drew 1,000 per class from the 61,782 training slices of COVIDx-CT-1.

    Args:
        entries: what to draw from; their order does not matter.
        per_class: slices of each of the three classes.
        seed: the same seed and entries give the same sample.
        by_patient: take one slice of every patient before a second of any, so that the sample
            covers as many patients as it can. A plain draw favours patients with many slices.

    Returns:
        3 * per_class entries by class, then name.

    Raises:
        DataError: a class has fewer slices than asked for.
    """
    rng = np.random.default_rng(seed)
    sample = []
    for label, name in enumerate(IMAGE_CLASSES):
        pool = sorted((e for e in entries if e.label == label), key=lambda entry: entry.name)
        if len(pool) < per_class:
            raise DataError(
                f"the list holds {len(pool)} slices of class {name}, {per_class} are asked for; "
                "ask for fewer per class or give a longer list"
            )
        drawn = [pool[i] for i in rng.permutation(len(pool))]
        if by_patient:
            seen: Counter[str] = Counter()
            turns = []  # how many slices of the same patient come before
            for entry in drawn:
                patient = parse_name(entry.name).patient
                turns.append(seen[patient])
                seen[patient] += 1
            drawn = [drawn[i] for i in np.argsort(turns, kind="stable")]
        sample += sorted(drawn[:per_class], key=lambda entry: entry.name)
    return sample


def _parse_line(words: list[str]) -> SliceEntry:
    label = parse_name(words[0]).label
    if len(words) == 1:
        return SliceEntry(words[0], label, None)
    if len(words) != 6 or not all(re.fullmatch(r"\d{1,9}", w) for w in words[1:]):
        raise DataError(
            f"{' '.join(words)!r} does not parse; expected `name class xmin ymin xmax ymax` or the "
            "name alone"
        )
    given, x1, y1, x2, y2 = map(int, words[1:])
    if given != label:
        raise DataError(
            f"class {given} contradicts the name {words[0]}, which says {label}; correct the line"
        )
    if x1 >= x2 or y1 >= y2:
        raise DataError(f"the box {x1} {y1} {x2} {y2} is empty; expected xmin < xmax, ymin < ymax")
    return SliceEntry(words[0], label, (x1, y1, x2, y2))


def _locate(name: str, on_disk: set[str]) -> str | None:
    """The file of a name: itself, or the only one that differs in suffix or class word."""
    if name in on_disk:
        return name
    rest = Path(name).stem.partition("_")[2]
    label = parse_name(name).label
    candidates = {
        f"{word}_{rest}{suffix}"
        for word in (NAME_CLASSES[label], str(label))
        for suffix in IMAGE_SUFFIXES
    } & on_disk
    return candidates.pop() if len(candidates) == 1 else None


@dataclass(frozen=True)
class ClassStatistics:
    """Slices and patients of each image class."""

    classes: tuple[str, ...]
    slices: np.ndarray  # int64 [3]
    patients: np.ndarray  # int64 [3]


def class_statistics(dataset: SliceImages) -> ClassStatistics:
    """Count the slices and patients of each class; reads no image."""
    pairs = set(zip(dataset.labels, dataset.patients, strict=True))
    n = len(IMAGE_CLASSES)
    return ClassStatistics(
        classes=IMAGE_CLASSES,
        slices=np.bincount(dataset.labels, minlength=n),
        patients=np.bincount([label for label, _ in pairs], minlength=n),
    )


def open_slices(root: str | Path, split: str, require_classes: bool = False) -> SliceImages:
    """Slices with an image class: `root` holds slices/, or the images themselves.

    Args:
        split: train, val, test, or the path to a list.
        require_classes: as in `SliceImages`.

    Raises:
        DataError: see `SliceImages`.
    """
    from covidmask.datasets.classes import SliceImages

    return SliceImages(_slices_folder(existing_folder(root)), split, require_classes)


def slice_splits(root: Path) -> list[str]:
    """The splits that `open_slices` finds."""
    folder = _slices_folder(root)
    return [] if (folder / "image").is_dir() else listed_splits(folder)  # image/: lists of lesions


def _slices_folder(root: Path) -> Path:
    return root / "slices" if (root / "slices").is_dir() else root
