"""CT slices with an image class: COVIDx-CT-1, phantoms, or classes of your own (section 2.2)."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

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

NAME_CLASSES = ("Normal", "CP", "NCP")  # how COVIDx-CT-1 calls labels 0, 1, 2 in file names
_NAME = re.compile(r"([^_/\\]+)_([^_/\\]+)_([^_/\\]+)_([^_/\\]+)(\.\w+)")


class SliceName(NamedTuple):
    """The parts of a file name."""

    label: int  # index of the class
    patient: str
    scan: str
    slice: str


class SliceEntry(NamedTuple):
    """A line of a list."""

    name: str
    label: int
    box: tuple[int, int, int, int] | None  # body: xmin, ymin, xmax, ymax in pixels; None: not given

    @property
    def patient(self) -> str:
        """As in the name; a slice whose name has another form counts as a patient of its own."""
        match = _NAME.fullmatch(self.name)
        return match[2] if match else Path(self.name).stem


def class_names(folder: str | Path) -> tuple[str, ...]:
    """The lines of `folder`/classes.txt, names of labels 0, 1, ...; without it, IMAGE_CLASSES."""
    path = Path(folder) / "classes.txt"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
        if not 2 <= len(names) == len(set(names)):
            raise ValueError(f"found {', '.join(names) or 'nothing'}")
    except FileNotFoundError:
        return IMAGE_CLASSES
    except (OSError, ValueError) as error:  # ValueError: no text, too
        raise DataError(
            f"{path}: no list of classes ({error}); write two or more different names, one a line"
        ) from error
    return names


@cache
def _labels(classes: tuple[str, ...]) -> dict[str, int]:
    """The words that stand for a class in a file name, and its label."""
    words = NAME_CLASSES if classes == IMAGE_CLASSES else classes
    labels = range(len(classes))
    return dict(zip(words, labels, strict=True)) | {str(label): label for label in labels}


def parse_name(name: str, classes: tuple[str, ...] = IMAGE_CLASSES) -> SliceName:
    """Read <class>_<patient>_<scan>_<slice>.<suffix>; the class is a label, 0, 1, ..., or a name.

    COVIDx-CT-1 has Normal, CP and NCP for the names of `IMAGE_CLASSES`. Others are a `DataError`.
    """
    match, labels = _NAME.fullmatch(name), _labels(classes)
    if match is None or match[1] not in labels:
        raise DataError(
            f"{name}: this is no slice name; expected <class>_<patient>_<scan>_<slice>.png with "
            f"class {', '.join(labels)}"
        )
    return SliceName(labels[match[1]], *match.groups()[1:4])


def read_split(path: str | Path, classes: tuple[str, ...] = IMAGE_CLASSES) -> list[SliceEntry]:
    """Read a list with lines `name`, `name label` or `name label xmin ymin xmax ymax`.

    A line that gives the label may name any file; else the name says it, see `parse_name`. A list
    that is missing or empty, names a slice twice, or has a wrong line or label is a `DataError`.
    """
    entries = []
    for number, words in read_lines(path):
        try:
            entries.append(_parse_line(words, classes))
        except ValueError as error:  # DataError is one
            raise DataError(f"{path}, line {number}: {error}") from error
    return entries


def _parse_line(words: list[str], classes: tuple[str, ...]) -> SliceEntry:
    name, *numbers = words
    if len(numbers) not in (0, 1, 5) or not all(re.fullmatch(r"\d{1,9}", n) for n in numbers):
        raise DataError(
            f"{' '.join(words)!r} does not parse; expected `name [label [xmin ymin xmax ymax]]`"
        )
    if not numbers:
        return SliceEntry(name, parse_name(name, classes).label, None)
    label, *box = map(int, numbers)
    free = _NAME.fullmatch(name) is None and re.fullmatch(r"[^/\\]+\.\w+", name)
    if not free and label != (said := parse_name(name, classes).label):
        raise DataError(f"class {label} contradicts {name}, which says {said}; correct the line")
    if label >= len(classes):
        names = ", ".join(classes)
        raise DataError(f"label {label}: is no class; choose 0 to {len(classes) - 1} ({names})")
    if box and (box[0] >= box[2] or box[1] >= box[3]):
        raise DataError(f"the box {box} is empty; expected xmin < xmax, ymin < ymax")
    return SliceEntry(name, label, tuple(box) or None)


def write_split(path: str | Path, entries: Sequence[SliceEntry]) -> None:
    """Write a list that `read_split` reads back."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as f:
        for entry in entries:
            said = entry.box is None and _NAME.fullmatch(entry.name)  # the name says the class
            print(entry.name, *(() if said else (entry.label, *(entry.box or ()))), file=f)


class SliceImages(Dataset):
    """One folder of slices and a list of those to use.

    Item i is `(image, label)`: image float32 [3, H, W] in 0..1 (grey, repeated), label int.

    Args:
        root: the folder that holds the image files.
        split: "train", "val" or "test" reads `root`/<split>.txt; another value is the path to a
            list, see `read_split`. A name in the list also finds its file under the other suffix
            (.png, .jpg) or class word (the author's `2_91_...` is `NCP_91_...` in COVIDx-CT), if
            just one is there.
        require_classes: every class must occur, as training needs.
        classes: names of labels 0, 1, ...; None reads them with `class_names(root)`.

    Attributes:
        names, labels, patients: of the items; names are those of the files on disk. A name in a
            form of its own says no patient: such a slice counts as one.

    Raises:
        DataError: at once for a missing folder, list, file or class and for a bad line; on reading
            an item for damaged files.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | Path,
        require_classes: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{root}: there is no such folder; name the one that holds the slices")
        self.classes = class_names(root) if classes is None else tuple(classes)
        path = split_path(root, split)
        entries = read_split(path, self.classes)
        on_disk = {file.name for file in os.scandir(self.root)}  # one listing, not 60,000 look-ups
        located = [_locate(entry, self.classes, on_disk) for entry in entries]
        if missing := [e.name for e, name in zip(entries, located, strict=True) if not name]:
            where = f"{path}: slices that are not in {root}"
            raise DataError(f"{where}: {some(missing)}; put them there, or list others")
        self.names: list[str] = located
        self.labels: list[int] = [entry.label for entry in entries]
        self.patients: list[str] = [entry.patient for entry in entries]
        absent = [c for label, c in enumerate(self.classes) if label not in self.labels]
        if require_classes and absent:
            none = f"{path}: there are no slices of class {', '.join(absent)}"
            raise DataError(f"{none}; training needs every class, add some to the list")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = read_image(self.root / self.names[index])  # [H, W]
        return torch.from_numpy(image).repeat(3, 1, 1), self.labels[index]  # [3, H, W]


def _locate(entry: SliceEntry, classes: tuple[str, ...], on_disk: set[str]) -> str:
    """The file of a slice: itself, or the only one that differs in suffix or class word; or ""."""
    if entry.name in on_disk:
        return entry.name
    stems = [stem := Path(entry.name).stem]
    if _NAME.fullmatch(entry.name):
        words = [word for word, label in _labels(classes).items() if label == entry.label]
        stems = [f"{word}_{stem.partition('_')[2]}" for word in words]
    found = {stem + suffix for stem in stems for suffix in IMAGE_SUFFIXES} & on_disk
    return found.pop() if len(found) == 1 else ""


def balanced_sample(
    entries: Sequence[SliceEntry],
    per_class: int,
    seed: int,
    by_patient: bool = False,
    classes: Sequence[str] = IMAGE_CLASSES,
) -> list[SliceEntry]:
    """Draw `per_class` slices of each class without replacement, by class, then name (section 2.2).

    The author drew 1,000 per class from the 61,782 training slices of COVIDx-CT-1.

    Args:
        entries: what to draw from; their order does not matter.
        by_patient: take one slice of every patient before a second of any, so that the sample
            covers as many patients as it can. A plain draw favours patients with many slices.
    """
    rng = np.random.default_rng(seed)
    sample = []
    for label, name in enumerate(classes):
        pool = sorted((e for e in entries if e.label == label), key=lambda entry: entry.name)
        if len(pool) < per_class:
            held = f"the list holds {len(pool)} slices of class {name}, {per_class} are asked for"
            raise DataError(f"{held}; ask for fewer per class or give a longer list")
        drawn = [pool[i] for i in rng.permutation(len(pool))]
        if by_patient:
            before = defaultdict(count)  # how many slices of a patient have come
            drawn.sort(key=lambda entry: next(before[entry.patient]))
        sample += sorted(drawn[:per_class], key=lambda entry: entry.name)
    return sample


class ClassStatistics(NamedTuple):
    """Slices and patients of each of C image classes."""

    classes: tuple[str, ...]
    slices: np.ndarray  # int64 [C]
    patients: np.ndarray  # int64 [C]


def class_statistics(dataset: SliceImages) -> ClassStatistics:
    """Count the slices and patients of each class; reads no image."""
    owners = [label for label, _ in set(zip(dataset.labels, dataset.patients, strict=True))]
    counts = (np.bincount(x, minlength=len(dataset.classes)) for x in (dataset.labels, owners))
    return ClassStatistics(dataset.classes, *counts)


def open_slices(root: str | Path, split: str, require_classes: bool = False) -> SliceImages:
    """Slices with an image class: `root` holds slices/, or the images; see `SliceImages`."""
    return SliceImages(_slices_folder(existing_folder(root)), split, require_classes)


def slice_splits(root: Path) -> list[str]:
    """The splits that `open_slices` finds."""
    folder = _slices_folder(root)
    return [] if (folder / "image").is_dir() else listed_splits(folder)  # image/: lists of lesions


def _slices_folder(root: Path) -> Path:
    return root / "slices" if (root / "slices").is_dir() else root
