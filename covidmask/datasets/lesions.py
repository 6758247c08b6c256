"""CT slices with lesion masks, as Mask R-CNN wants them (paper, section 2.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

from covidmask.config import LESION_CLASSES, lesion_classes
from covidmask.datasets.scans import IMAGE_SUFFIXES, read_image, read_mask
from covidmask.errors import DataError
from covidmask.files import existing_folder, listed_splits, read_lines, some, split_path

GGO, CONSOLIDATION = 2, 3  # mask codes; 0 is background, 1 is lung
_NAME = re.compile(r"([^/\\\s]+)_([^_/\\\s]+)(\.png|\.jpe?g)", re.IGNORECASE)
_SEMISEG = {
    "train": Path("TrainingSet", "MultiClassInfection-Train"),
    "test": Path("TestingSet", "MultiClassInfection-Test"),
}


def mask_to_targets(
    mask: np.ndarray, lesions: str = "both", min_area: int = 1
) -> dict[str, Tensor]:
    """Turn a semantic mask into instances: the connected components of each class.

    Args:
        mask: uint8 [H, W], codes 0 background, 1 lung, 2 GGO, 3 consolidation.
        lesions: "both": label 1 is GGO, 2 is consolidation; "ggo": label 1 is GGO, consolidation
            is background; "merged": label 1 is either, joined before components are sought, so
            that a consolidation inside GGO is one instance with it. Or your own names, such as
            "nodule,cyst": codes 2, 3, ... in this order are labels 1, 2, ...
        min_area: components (8-connected) of fewer pixels are dropped. The released code drops
            those of at most 100 pixels of a 512 x 512 slice, also from its ground truth: 101.

    Returns:
        K instances (K may be 0) ordered by label, then by their first pixel, row by row:

        - boxes: float32 [K, 4], x1, y1, x2, y2 in pixels. x2 and y2 are the edges behind the last
          pixel (xmax + 1), so that x2 - x1 is the width and a 1-pixel lesion has area 1.
        - labels: int64 [K]. masks: uint8 [K, H, W], 0 or 1. iscrowd: int64 [K], all 0.
        - area: float32 [K], pixels of the component.

    Raises:
        DataError: the mask has a code without a class. ValueError: `lesions` is no list of names.
    """
    label_codes, largest = _codes(lesions)
    mask = np.asarray(mask)
    _check_codes(mask, largest)
    boxes, labels, masks, areas = [], [], [], []
    for label, codes in enumerate(label_codes, start=1):
        components, _ = ndimage.label(np.isin(mask, codes), structure=np.ones((3, 3)))
        sizes = np.bincount(components.ravel())  # sizes[0] counts the background
        for number, (rows, columns) in enumerate(ndimage.find_objects(components), start=1):
            if sizes[number] >= min_area:
                boxes.append((columns.start, rows.start, columns.stop, rows.stop))
                labels.append(label)
                masks.append(components == number)
                areas.append(sizes[number])
    k = len(boxes)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(k, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": torch.from_numpy(np.asarray(masks, dtype=np.uint8).reshape(k, *mask.shape)),
        "area": torch.tensor(areas, dtype=torch.float32),
        "iscrowd": torch.zeros(k, dtype=torch.int64),
    }


def _codes(lesions: str) -> tuple[Sequence[tuple[int, ...]], int]:
    """The mask codes of label 1, label 2, ..., and the largest code that a mask may hold."""
    names = lesion_classes(lesions)
    if lesions == "merged":
        return [(GGO, CONSOLIDATION)], CONSOLIDATION
    codes = [(code,) for code in range(GGO, GGO + len(names))]
    return codes, CONSOLIDATION if lesions in LESION_CLASSES else codes[-1][0]


def _check_codes(mask: np.ndarray, largest: int, where: str = "") -> None:
    if mask.max(initial=0) > largest:
        raise DataError(
            f"{where}the mask holds the values {np.unique(mask).tolist()[:8]}, expected codes "
            f"0..{largest}; save class codes, not colours or grey levels, and name every class"
        )


class LesionDataset(Dataset):
    """Slices with masks as items for torchvision's detectors: base of the data sets, and of yours.

    Item i is `(image, target)`: image float32 [3, H, W] in 0..1 (grey, repeated), target the
    dictionary of `mask_to_targets` and `image_id`, int64 [1], which is i. A data set of your own
    sets `names` and `patients`, and says how to `read` a slice.
    """

    names: list[str]
    patients: list[str]  # of each item
    patients_known = True  # False where data have no patient ids and each slice counts as one

    def __init__(self, lesions: str = "both", min_area: int = 1) -> None:
        _codes(lesions)  # a mistake is found now, not at the first slice
        self.lesions, self.min_area = lesions, min_area

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The slice, float32 [H, W] in 0..1, and its mask, uint8 [H, W], codes 0, 1, 2, ..."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, mask = self.read(index)
        try:
            target = mask_to_targets(mask, self.lesions, self.min_area)
        except DataError as error:
            raise DataError(f"{self.names[index]}: {error}") from error
        target["image_id"] = torch.tensor([index % len(self)])
        return torch.from_numpy(image).repeat(3, 1, 1), target  # [3, H, W]


class LesionSlices(LesionDataset):
    """The lesion slices of CNCB, or phantoms: image/<patient>/<slice>.png|jpg and mask/...png.

    Args:
        root: the folder that holds image/ and mask/.
        split: "train", "val" or "test" reads `root`/<split>.txt; another value is the path to such
            a list. A line is `<patient>_<slice>.<suffix>`; another suffix than that of the file is
            understood. None takes every slice found.
        lesions, min_area: as in `mask_to_targets`.

    Raises:
        DataError: at once for a missing folder, file or mask and a bad list; on reading an item for
            damaged files, codes without a class, and an image and mask of different sizes.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | Path | None = None,
        lesions: str = "both",
        min_area: int = 1,
    ) -> None:
        super().__init__(lesions, min_area)
        self.root = Path(root)
        images, masks = self.root / "image", self.root / "mask"
        for folder in (images, masks):
            if not folder.is_dir():
                raise DataError(
                    f"{folder}: there is no such folder; name the one that holds image/ and mask/"
                )
        on_disk: dict[tuple[str, str], list[Path]] = {}  # patient, slice -> its files
        for patient in images.iterdir():
            # glob would leave out what may not be entered, without a word
            for file in patient.iterdir() if patient.is_dir() else ():
                if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
                    on_disk.setdefault((patient.name, file.stem), []).append(file)
        if not on_disk:
            raise DataError(f"{images}: no slices found; expected <patient>/<slice>.png or .jpg")
        if split is None:
            source = images
            wanted = [(*key, "") for key in sorted(on_disk, key=lambda key: [*map(_natural, key)])]
        else:
            source = split_path(root, split)
            wanted = _read_list(source)
        files, absent = [], []
        for patient, number, suffix in wanted:
            found = on_disk.get((patient, number), [])
            exact = [file for file in found if file.suffix == suffix] or found
            files += exact if len(exact) == 1 else []
            absent += [] if len(exact) == 1 else [f"{patient}_{number}{suffix}"]
        if absent:
            raise DataError(
                f"{source}: slices that are not on disk, or there with two suffixes: {some(absent)}"
                "; let image/<patient>/<slice>.png be there once, or list others"
            )
        self.names = [f"{file.parent.name}_{file.name}" for file in files]
        self.patients = [file.parent.name for file in files]
        self._files = [(file, masks / file.parent.name / f"{file.stem}.png") for file in files]
        _check_masks(source, self.names, self._files)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return _read_pair(*self._files[index], _codes(self.lesions)[1])


def _natural(text: str) -> tuple[int, int, str]:
    """Sort key: numbers by value, before other text."""
    return (0, int(text), text) if text.isdecimal() else (1, 0, text)


def _read_list(path: Path) -> list[tuple[str, str, str]]:
    """Patient, slice and suffix of every line."""
    wanted = []
    for number, words in read_lines(path):
        match = _NAME.fullmatch(" ".join(words))
        if match is None:
            where = f"{path}, line {number}: {' '.join(words)!r}"
            raise DataError(f"{where} is no slice name; expected <patient>_<slice>.png or .jpg")
        wanted.append(match.groups())
    return wanted


def _check_masks(source: Path, names: list[str], files: list[tuple[Path, Path]]) -> None:
    if missing := [i for i, (_, mask) in enumerate(files) if not mask.is_file()]:
        raise DataError(
            f"{source}: slices without a mask: {some([names[i] for i in missing])}; add "
            f"{files[missing[0]][1]} and the like, or leave these slices out"
        )


def _read_pair(image_path: Path, mask_path: Path, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """A slice and its mask, of one size and with codes 0..largest."""
    image, mask = read_image(image_path), read_mask(mask_path)
    if image.shape != mask.shape:
        size, other = (f"{part.shape[1]} x {part.shape[0]}" for part in (mask, image))
        raise DataError(
            f"{mask_path}: the mask is {size} pixels, its image {other}; save both at one size"
        )
    _check_codes(mask, largest, f"{mask_path}: ")
    return image, mask


class SemiSeg(LesionDataset):
    """The published 50 training and 48 test slices of COVID-SemiSeg, as items of `LesionDataset`.

    All slices are of COVID patients, so nothing can be learned here about other conditions. They
    are cropped to the lungs, carry no Hounsfield units, and the masks mark no lung (no code 1).
    There are no patient ids: parts made by `split_by_patient`, and the published split itself, may
    share patients. Errors are those of `LesionSlices`.

    Args:
        root: the folder with TrainingSet and TestingSet, or Inf-Net's above it, which has Dataset.
        split: "train" or "test".
    """

    patients_known = False

    def __init__(
        self, root: str | Path, split: str, lesions: str = "both", min_area: int = 1
    ) -> None:
        super().__init__(lesions, min_area)
        if split not in _SEMISEG:
            choice = " or ".join(_semiseg_splits(Path(root)) or _SEMISEG)
            raise DataError(f"{root}: COVID-SemiSeg has no split {split!r}; choose {choice}")
        places = _semiseg_places(Path(root), split)
        self.folder = next((place for place in places if place.is_dir()), places[0])
        slices = self.folder / "Imgs"
        found = slices.iterdir() if slices.is_dir() else ()  # glob is silent about permissions
        images = sorted((p for p in found if p.suffix == ".jpg"), key=lambda p: _natural(p.stem))
        if not images:
            raise DataError(
                f"{slices}: no .jpg slices found; name the folder with TrainingSet and TestingSet"
            )
        self.names = [path.name for path in images]
        self.patients = [path.stem for path in images]
        self._files = [(path, self.folder / "GT" / f"{path.stem}.png") for path in images]
        _check_masks(self.folder, self.names, self._files)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, indices = _read_pair(*self._files[index], 2)
        codes = np.array([0, GGO, CONSOLIDATION], dtype=np.uint8)[indices]  # of a palette picture
        # Both files are stored transposed, with the spine to the right; .T gives the axial view.
        return np.ascontiguousarray(image.T), np.ascontiguousarray(codes.T)


def _semiseg_places(root: Path, split: str) -> list[Path]:
    return [root / _SEMISEG[split], root / "Dataset" / _SEMISEG[split]]


def _semiseg_splits(root: Path) -> list[str]:
    return [s for s in _SEMISEG if any(p.parent.is_dir() for p in _semiseg_places(root, s))]


def split_by_patient(
    patients: Sequence[str], fractions: Sequence[float], seed: int
) -> list[list[int]]:
    """Split items so that all slices of a patient land in the same part.

    Neighbouring slices of one patient look almost alike; if they stood in two parts, a model could
    score well by recognising the patient.

    Args:
        patients: of each item. fractions: share of the PATIENTS in each part; they sum to 1.

    Returns:
        one sorted list of item indices per fraction; a part may be empty if patients are few.
    """
    if min(fractions, default=-1) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions {tuple(fractions)}: they must be >= 0 and sum to 1")
    unique = np.random.default_rng(seed).permutation(np.unique(patients))
    ends = np.rint(np.cumsum(fractions)[:-1] * len(unique)).astype(int)
    return [np.flatnonzero(np.isin(patients, p)).tolist() for p in np.split(unique, ends)]


class LesionStatistics(NamedTuple):
    """M slices with R lesion regions of C classes; class c of the C has label c + 1."""

    classes: tuple[str, ...]
    counts: np.ndarray  # int64 [M, C]: regions of each class in each slice
    region_labels: np.ndarray  # int64 [R]
    region_fractions: np.ndarray  # float64 [R]: area / area of the image, 0..1

    def share_of_slices_below(self, regions: int = 5) -> np.ndarray:
        """float64 [C]: share of the slices with fewer regions of a class (Fig. 1.1)."""
        return (self.counts < regions).mean(axis=0)

    def share_of_regions_below(self, *fractions: float) -> np.ndarray:
        """float64 [C]: share of a class's regions smaller than its fraction (Fig. 1.2).

        The paper's are 0.02 for GGO and 0.01 for consolidation. NaN for a class without regions.
        """
        areas = [self.region_fractions[self.region_labels == c + 1] for c in range(len(fractions))]
        pairs = zip(areas, fractions, strict=True)
        return np.array([(part < limit).mean() if part.size else np.nan for part, limit in pairs])


def lesion_statistics(dataset: LesionDataset) -> LesionStatistics:
    """Count and measure the lesions of every slice; reads all files once."""
    classes = lesion_classes(dataset.lesions)
    counts, labels, fractions = [], [], []
    for image, target in (dataset[i] for i in range(len(dataset))):
        labels.append(target["labels"].numpy())
        counts.append(np.bincount(labels[-1], minlength=len(classes) + 1)[1:])
        fractions.append(target["area"].double().numpy() / image[0].numel())
    found = np.stack(counts), np.concatenate(labels), np.concatenate(fractions)
    return LesionStatistics(classes, *found)


def open_lesions(
    root: str | Path, split: str, lesions: str = "both", min_area: int = 1
) -> LesionDataset:
    """`LesionSlices` or `SemiSeg`: `root` holds lesions/, or is the folder itself.

    Args:
        split: train, val, test, the path to a list, or all: every slice that is there.
    """
    folder = _lesions_folder(existing_folder(root))
    if not (folder / "image").is_dir() and _semiseg_splits(Path(root)):
        return SemiSeg(root, split, lesions, min_area)
    return LesionSlices(folder, None if split == "all" else split, lesions, min_area)


def lesion_splits(root: Path) -> list[str]:
    """The splits that `open_lesions` finds; ["all"] for slices without lists."""
    folder = _lesions_folder(root)
    found = (folder / "image").is_dir()
    return (listed_splits(folder) or ["all"]) if found else _semiseg_splits(root)


def _lesions_folder(root: Path) -> Path:
    return root / "lesions" if (root / "lesions").is_dir() else root
