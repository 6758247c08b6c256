"""CT slices with lesion masks, as Mask R-CNN wants them (paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

from covidmask import files
from covidmask.config import LESION_CLASSES, lesion_classes
from covidmask.datasets.chest import CONSOLIDATION, GGO
from covidmask.datasets.classes import inside, locate
from covidmask.datasets.scans import IMAGE_SUFFIXES, read_image, read_mask
from covidmask.errors import DataError

SliceAndMask = tuple[np.ndarray, np.ndarray]  # float32 [H, W] in 0..1; codes, uint8 [H, W]
_SEMISEG = {
    "train": "TrainingSet/MultiClassInfection-Train",
    "test": "TestingSet/MultiClassInfection-Test",
}


def mask_to_targets(
    mask: np.ndarray, lesions: str = "both", min_area: int = 1
) -> dict[str, Tensor]:
    """Turn a semantic mask into instances: the connected components of each class.

    Args:
        mask: uint8 [H, W], codes 0 background, 1 lung, 2 GGO, 3 consolidation.
        lesions: "both": label 1 is GGO, 2 is consolidation; "ggo": consolidation is background;
            "merged": label 1 is either, and a consolidation inside GGO is one instance with it; or
            your own names, such as "nodule,cyst": codes 2, 3, ... are labels 1, 2, ...
        min_area: components (8-connected) of fewer pixels are dropped; 101 in the released code.

    Returns:
        K instances (K may be 0) ordered by label, then by their first pixel, row by row:

        - boxes: float32 [K, 4], x1, y1, x2, y2 in pixels; x2 - x1 is the width (x2 = xmax + 1).
        - labels: int64 [K]. masks: uint8 [K, H, W], 0 or 1. iscrowd: int64 [K], all 0.
        - area: float32 [K], pixels of the component.

    Raises:
        DataError: the mask has a code without a class, or `lesions` is no list of names.
    """
    mask = np.asarray(mask)
    _check_codes(mask, _largest_code(lesions))
    merged = np.minimum(mask, GGO) if lesions == "merged" else mask
    boxes, labels, masks, areas = [], [], [], []
    for label in range(1, len(lesion_classes(lesions)) + 1):
        components, _ = ndimage.label(merged == label + 1, structure=np.ones((3, 3)))
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


def _largest_code(lesions: str) -> int:
    return CONSOLIDATION if lesions in LESION_CLASSES else len(lesion_classes(lesions)) + 1


def _check_codes(mask: np.ndarray, largest: int, where: str = "") -> None:
    if mask.max(initial=0) > largest:
        raise DataError(
            f"{where}the mask holds the values {np.unique(mask).tolist()[:8]}, expected codes "
            f"0..{largest}; save class codes, not colours or grey levels, and name every class"
        )


class LesionDataset(Dataset):
    """Slices with masks as items for torchvision's detectors; the base of yours, too.

    Item i is `(image, target)`: image float32 [3, H, W] in 0..1 (grey, repeated), target that of
    `mask_to_targets` and `image_id`, int64 [1], which is i. Yours sets `names` and `patients`, and
    says how to `read` a slice.
    """

    names: list[str]
    patients: list[str]  # of each item
    patients_known = True  # False where data have no patient ids and each slice counts as one

    def __init__(self, lesions: str = "both", min_area: int = 1) -> None:
        self.lesions, self.min_area = lesions, min_area
        self._largest = _largest_code(lesions)  # a wrong name is found now, not at the first slice

    def read(self, index: int) -> SliceAndMask:
        """The slice, float32 [H, W] in 0..1, and its mask, uint8 [H, W], codes 0, 1, 2, ..."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, mask = self.read(index)
        try:
            target = mask_to_targets(mask, self.lesions, self.min_area)
        except DataError as error:
            raise DataError(f"{self.names[index % len(self)]}: {error}") from error
        target["image_id"] = torch.tensor([index % len(self)])
        return torch.from_numpy(image).repeat(3, 1, 1), target  # [3, H, W]


class LesionSlices(LesionDataset):
    """The lesion slices of CNCB, or phantoms: image/<patient>/<slice>.png|jpg and mask/...png.

    Args:
        root: the folder that holds image/ and mask/.
        split: train, val, test or the path to a list of lines `<patient>_<slice>.<suffix>`, where
            the suffix of the file may be another; None takes every slice found.
        lesions, min_area: as in `mask_to_targets`.

    Raises:
        DataError: at once for what is missing or wrong in a list; on reading, for damaged files,
            codes without a class, and an image and mask of different sizes.
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
        source, masks = (files.existing_folder(self.root / part) for part in ("image", "mask"))
        on_disk: dict[str, Path] = {}
        for patient in sorted(source.iterdir(), key=_natural):  # glob is silent about permissions
            for file in sorted(patient.iterdir(), key=_natural) if patient.is_dir() else ():
                if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."):
                    on_disk[f"{patient.name}_{file.name}"] = file
        if not on_disk:
            raise DataError(f"{source}: no slices found; expected <patient>/<slice>.png or .jpg")
        if split is None:  # by their stems, so that one with two suffixes is found out
            wanted = list(dict.fromkeys(name[: -len(on_disk[name].suffix)] for name in on_disk))
        else:
            source = files.split_path(root, split)
            wanted = [" ".join(words) for _, words in files.read_lines(source)]
        self.names = locate(source, wanted, on_disk)
        images = [on_disk[name] for name in self.names]
        self.patients = [image.parent.name for image in images]
        self._files = _pairs(source, images, [masks / image.parent.name for image in images])

    def read(self, index: int) -> SliceAndMask:
        image_path, mask_path = self._files[index]
        image, mask = read_image(image_path), read_mask(mask_path)
        if image.shape != mask.shape:
            size, other = (f"{part.shape[1]} x {part.shape[0]}" for part in (mask, image))
            raise DataError(
                f"{mask_path}: the mask is {size} pixels, its image {other}; save both at one size"
            )
        _check_codes(mask, self._largest, f"{mask_path}: ")
        return image, mask


def _natural(path: Path) -> tuple[int, int, str]:
    # numbers by value, before other text
    text = path.name if path.is_dir() else path.stem
    return (0, int(text), text) if text.isdecimal() else (1, 0, text)


def _pairs(source: Path, images: list[Path], folders: list[Path]) -> list[tuple[Path, Path]]:
    # each image, and in its folder the mask of the same name
    pairs = [(i, folder / f"{i.stem}.png") for i, folder in zip(images, folders, strict=True)]
    if missing := [str(mask) for _, mask in pairs if not mask.is_file()]:
        masks = f"slices without a mask: {files.some(missing)}"
        raise DataError(f"{source}: {masks}; add these files, or leave the slices out")
    return pairs


class SemiSeg(LesionSlices):
    """The published 50 training and 48 test slices of COVID-SemiSeg.

    All slices are of COVID patients, cropped to the lungs and without Hounsfield units; the masks
    mark no lung (no code 1). There are no patient ids: parts made by `split_by_patient`, and the
    published split itself, may share patients.

    Args:
        root: the folder with TrainingSet and TestingSet, or Inf-Net's above it, which has Dataset.
        split: "train" or "test".
    """

    patients_known = False

    def __init__(
        self, root: str | Path, split: str, lesions: str = "both", min_area: int = 1
    ) -> None:
        LesionDataset.__init__(self, lesions, min_area)
        self._largest = 2  # in the files: 1 is GGO, 2 is consolidation
        self.folder = inside(Path(root), "Dataset") / _SEMISEG.get(split, "none")
        images = sorted(self.folder.glob("Imgs/*.jpg"), key=_natural)
        if not images:
            raise DataError(
                f"{root}: COVID-SemiSeg has no split {split!r}; choose {' or '.join(_SEMISEG)}, of "
                "a folder with TrainingSet and TestingSet, where Imgs holds .jpg slices"
            )
        self.names = [path.name for path in images]
        self.patients = [path.stem for path in images]
        self._files = _pairs(self.folder, images, [self.folder / "GT"] * len(images))

    def read(self, index: int) -> SliceAndMask:
        image, indices = super().read(index)
        codes = np.array([0, GGO, CONSOLIDATION], dtype=np.uint8)[indices]  # of a palette picture
        # Both files are stored transposed, with the spine to the right; .T gives the axial view.
        return np.ascontiguousarray(image.T), np.ascontiguousarray(codes.T)


def split_by_patient(
    patients: Sequence[str], fractions: Sequence[float], seed: int
) -> list[list[int]]:
    """Split items so that all slices of a patient, which look almost alike, land in the same part.

    `patients` has that of each item, `fractions` the share of the PATIENTS in each part; they sum
    to 1. Returns one sorted list of item indices per fraction; with few patients one may be empty.
    """
    if min(fractions, default=-1) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions {tuple(fractions)}: they must be >= 0 and sum to 1")
    unique = np.random.default_rng(seed).permutation(np.unique(patients))
    ends = np.rint(np.cumsum(fractions)[:-1] * len(unique)).astype(int)
    return [np.flatnonzero(np.isin(patients, p)).tolist() for p in np.split(unique, ends)]


class LesionStatistics(NamedTuple):  # M slices with R lesion regions of C classes
    classes: tuple[str, ...]
    counts: np.ndarray  # int64 [M, C]: regions of each class in each slice
    region_labels: np.ndarray  # int64 [R]
    region_fractions: np.ndarray  # float64 [R]: area / area of the image, 0..1

    def share_of_slices_below(self, regions: int = 5) -> np.ndarray:
        """float64 [C]: share of the slices with fewer regions of a class (Fig. 1.1)."""
        return (self.counts < regions).mean(axis=0)

    def share_of_regions_below(self, *fractions: float) -> np.ndarray:
        """float64 [C]: share of a class's regions below its fraction (Fig. 1.2); NaN: it has none.

        The paper's fractions are 0.02 for GGO and 0.01 for consolidation.
        """
        shares = []
        for label, limit in enumerate(fractions, start=1):
            part = self.region_fractions[self.region_labels == label]
            shares.append((part < limit).mean() if part.size else np.nan)
        return np.array(shares)


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

    `split` is train, val, test, the path to a list, or all: every slice that is there.
    """
    folder = inside(files.existing_folder(root), "lesions")
    if not (folder / "image").is_dir() and lesion_splits(Path(root)):
        return SemiSeg(root, split, lesions, min_area)
    return LesionSlices(folder, None if split == "all" else split, lesions, min_area)


def lesion_splits(root: Path) -> list[str]:
    """The splits that `open_lesions` finds; ["all"] for slices without lists."""
    folder, home = inside(root, "lesions"), inside(root, "Dataset")
    if (folder / "image").is_dir():
        return files.listed_splits(folder) or ["all"]
    return [split for split, place in _SEMISEG.items() if (home / place).parent.is_dir()]
