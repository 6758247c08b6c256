"""CT slices with an image class: COVIDx-CT-1, phantoms, or classes of your own (section 2.2)."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from covidmask import files
from covidmask.config import IMAGE_CLASSES, NAME_CLASSES
from covidmask.datasets.scans import IMAGE_SUFFIXES, read_image
from covidmask.errors import DataError

_NAME = re.compile(r"([^_/\\]+)_([^_/\\]+)_([^_/\\]+)_([^_/\\]+)(\.\w+)")


class SliceName(NamedTuple):
    label: int  # index of the class
    patient: str
    scan: str
    slice: str


class SliceEntry(NamedTuple):  # a line of a list
    name: str
    label: int
    box: tuple[int, int, int, int] | None  # body: xmin, ymin, xmax, ymax in pixels; None: not given

    @property
    def patient(self) -> str:
        """As in the name; of one that has another form, the figure, or all of it.

        In COVID-CT, ...%0, ...%1 or ...-p6-64-1, ...-p6-64-2 are panels of one figure.
        """
        if match := _NAME.fullmatch(self.name):
            return match[2]
        return re.sub(r"(-p\d+-\d+)-\d+$", r"\1", Path(self.name).stem.partition("%")[0])


def class_names(folder: str | Path) -> tuple[str, ...]:
    """The lines of `folder`/classes.txt, names of labels 0, 1, ...; without it, IMAGE_CLASSES."""
    path = Path(folder) / "classes.txt"
    if not files.is_there(path):
        return IMAGE_CLASSES
    with files.decoding(path, "no list of classes", "list two or more different names, one a line"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
        if not 2 <= len(names) == len(set(names)):
            raise ValueError(f"found {', '.join(names) or 'nothing'}")
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

    Without a label, the name says it; see `parse_name`. A list that is missing or empty, names a
    slice twice, or has a wrong line or label is a `DataError`.
    """
    entries = []
    for number, (name, *numbers) in files.read_lines(path):
        try:
            free = _NAME.fullmatch(name) is None and re.fullmatch(r"[^/\\]+\.\w+", name)
            said = None if free and numbers else parse_name(name, classes).label
            label, *box = map(int, numbers or [said])
            xmin, ymin, xmax, ymax = box or (0, 0, 1, 1)
            if said not in (None, label) or not 0 <= label < len(classes):
                known = f"one of 0 to {len(classes) - 1} ({', '.join(classes)})"
                raise ValueError(f"label {label} contradicts {name}, or is not {known}")
            if not (0 <= xmin < xmax and 0 <= ymin < ymax):
                raise ValueError(f"the box {box} is empty or begins below 0")
        except ValueError as error:  # DataError is one
            raise DataError(
                f"{path}, line {number}: {error}; expected `name [label [xmin ymin xmax ymax]]`"
            ) from error
        entries.append(SliceEntry(name, label, tuple(box) or None))
    return entries


def write_split(path: str | Path, entries: Sequence[SliceEntry]) -> None:
    """Write a list that `read_split` reads back."""
    write_lines(path, [" ".join(map(str, (e.name, e.label, *(e.box or ())))) for e in entries])


def write_lines(path: str | Path, lines: Sequence[str]) -> None:
    files.write_text(path, "".join(f"{line}\n" for line in lines))


def locate(
    source: Path, names: Sequence[str], on_disk: Collection[str], classes: tuple[str, ...] = ()
) -> list[str]:
    """The file of each name: itself, or the only one with another suffix or class word."""
    labels = _labels(classes)

    def key(name: str) -> tuple[str | int, ...]:
        match = _NAME.fullmatch(name)
        if match and match[1] in labels:
            return (labels[match[1]], *match.groups()[1:4])
        return (re.sub(r"\.(png|jpe?g)$", "", name, flags=re.IGNORECASE),)

    pictures = defaultdict(list)
    for name in on_disk:
        if name.lower().endswith(IMAGE_SUFFIXES):
            pictures[key(name)].append(name)
    found = [[name] if name in on_disk else pictures.get(key(name), ()) for name in names]
    if lost := [name for name, there in zip(names, found, strict=True) if len(there) != 1]:
        raise DataError(
            f"{source}: slices that are not on disk: {files.some(lost)}, or are there under two "
            "names; let each be there once, or list others"
        )
    return [name for (name,) in found]


class SliceImages(Dataset):
    """A folder of slices and a list of those to use; has `names`, `labels`, `patients`, `classes`.

    Item i is `(image, label)`: image float32 [3, H, W] in 0..1 (grey, repeated), label int.

    Args:
        root: the folder that holds the image files.
        split: train, val, test or the path to a list, see `read_split`. A name also finds the only
            file with another suffix (.png, .jpg) or class word (the author's `2_91_...` is
            `NCP_91_...` in COVIDx-CT).
        require_classes: every one of `class_names(root)` must occur, as training needs.

    Raises:
        DataError: at once for what is missing or wrong in a list; for a damaged image, on reading.
    """

    def __init__(self, root: str | Path, split: str | Path, require_classes: bool = False) -> None:
        self.root, path = files.existing_folder(root), files.split_path(root, split)
        self.classes = class_names(root)
        entries = read_split(path, self.classes)
        on_disk = {file.name for file in os.scandir(self.root)}  # one listing, not 60,000 look-ups
        self.names = locate(path, [entry.name for entry in entries], on_disk, self.classes)
        self.labels = [entry.label for entry in entries]
        self.patients = [entry.patient for entry in entries]
        self.patients_known = all(_NAME.fullmatch(entry.name) for entry in entries)
        absent = [c for label, c in enumerate(self.classes) if label not in self.labels]
        if require_classes and absent:
            none = f"{path}: there are no slices of class {', '.join(absent)}"
            raise DataError(f"{none}; training needs every class, add some to the list")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = read_image(self.root / self.names[index])  # [H, W]
        return torch.from_numpy(image).repeat(3, 1, 1), self.labels[index]  # [3, H, W]


def balanced_sample(
    entries: Sequence[SliceEntry],
    per_class: int,
    seed: int,
    by_patient: bool = False,
    classes: Sequence[str] = IMAGE_CLASSES,
) -> list[SliceEntry]:
    """Draw `per_class` slices of each class without replacement, by class, then name (section 2.2).

    The author drew 1,000 per class from the 61,782 training slices of COVIDx-CT-1. The order of
    `entries` does not matter. `by_patient` takes one slice of every patient before a second of
    any; a plain draw favours patients with many slices.
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
    classes: tuple[str, ...]
    slices: np.ndarray  # int64 [C]
    patients: np.ndarray  # int64 [C]


def class_statistics(dataset: SliceImages) -> ClassStatistics:
    """Count the slices and patients of each class; reads no image."""
    owners = [label for label, _ in set(zip(dataset.labels, dataset.patients, strict=True))]
    counts = (np.bincount(x, minlength=len(dataset.classes)) for x in (dataset.labels, owners))
    return ClassStatistics(dataset.classes, *counts)


def inside(root: Path, name: str) -> Path:
    """The folder `name` in `root`, or `root` where there is none: it is that folder itself."""
    return root / name if (root / name).is_dir() else root


def open_slices(root: str | Path, split: str, require_classes: bool = False) -> SliceImages:
    """Slices with an image class: `root` holds slices/, or the images; see `SliceImages`."""
    return SliceImages(inside(Path(root), "slices"), split, require_classes)


def slice_splits(root: Path) -> list[str]:
    """The splits that `open_slices` finds."""
    folder = inside(root, "slices")  # with image/, its lists are of lesions
    return [] if (folder / "image").is_dir() else files.listed_splits(folder)
