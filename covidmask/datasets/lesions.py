"""CT slices with lesion masks, as Mask R-CNN wants them (paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset

from covidmask.config import LESION_CLASSES
from covidmask.datasets.scans import IMAGE_SUFFIXES, read_image, read_mask
from covidmask.errors import DataError
from covidmask.files import existing_folder, listed_splits, read_lines, some, split_path

if TYPE_CHECKING:
    from covidmask.datasets.lesions import LesionDataset

GGO, CONSOLIDATION = 2, 3  # mask codes; 0 is background, 1 is lung
_CODES = {  # mask codes of label 1, label 2, ...
    "both": ((GGO,), (CONSOLIDATION,)),
    "ggo": ((GGO,),),
    "merged": ((GGO, CONSOLIDATION),),
}
_EIGHT = np.ones((3, 3), dtype=bool)  # pixels that touch at a corner are connected
_FOLDERS = {
    "train": Path("TrainingSet", "MultiClassInfection-Train"),
    "test": Path("TestingSet", "MultiClassInfection-Test"),
}
_TO_CODE = np.array([0, 2, 3], dtype=np.uint8)  # palette index -> background, GGO, consolidation


def mask_to_targets(
    mask: np.ndarray, lesions: str = "both", min_area: int = 1
) -> dict[str, Tensor]:
    """Turn a semantic mask into instances: the connected components of each class.

    Components are 8-connected, as in the released code: a lesion whose parts touch at a corner is
    one lesion. The released code drops components of at most 100 pixels of a 512 x 512 slice, also
    from the ground truth that it evaluates on; `min_area=101` does the same.

    Args:
        mask: uint8 [H, W], codes 0 background, 1 lung, 2 GGO, 3 consolidation.
        lesions: "both": label 1 is GGO, 2 is consolidation; "ggo": label 1 is GGO, consolidation
            is background; "merged": label 1 is either, joined before components are sought, so
            that a consolidation inside GGO is one instance with it.
        min_area: components of fewer pixels are dropped.

    Returns:
        K instances (K may be 0) ordered by label, then by their first pixel, row by row.

        - boxes: float32 [K, 4], x1, y1, x2, y2 in pixels. x2 and y2 are the edges behind the last
          pixel (xmax + 1), so that x2 - x1 is the width and a 1-pixel lesion has area 1.
        - labels: int64 [K].
        - masks: uint8 [K, H, W], 0 or 1.
        - area: float32 [K], pixels of the component.
        - iscrowd: int64 [K], all 0.
    """
    _check_lesions(lesions)
    mask = np.asarray(mask)
    boxes, labels, masks, areas = [], [], [], []
    for label, codes in enumerate(_CODES[lesions], start=1):
        components, _ = ndimage.label(np.isin(mask, codes), structure=_EIGHT)
        sizes = np.bincount(components.ravel())  # sizes[0] counts the background
        for number, (rows, columns) in enumerate(ndimage.find_objects(components), start=1):
            if sizes[number] >= min_area:
                boxes.append((columns.start, rows.start, columns.stop, rows.stop))
                labels.append(label)
                masks.append(components == number)
                areas.append(sizes[number])
    k = len(boxes)
    stacked = np.asarray(masks, dtype=np.uint8).reshape(k, *mask.shape)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(k, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": torch.from_numpy(stacked),
        "area": torch.tensor(areas, dtype=torch.float32),
        "iscrowd": torch.zeros(k, dtype=torch.int64),
    }


class LesionDataset(Dataset):
    """Pairs of image and mask files as items for torchvision's detectors.

    Item i is `(image, target)`: image float32 [3, H, W] in 0..1 (grey, repeated), target the
    dictionary of `mask_to_targets` and `image_id`, int64 [1], which is i.

    Attributes:
        names: one per item.
        patients: the patient of each item.
        patients_known: False where the data have no patient ids and each slice counts as one.
        lesions, min_area: as in `mask_to_targets`.
    """

    names: list[str]
    patients: list[str]
    patients_known = True

    def __init__(self, lesions: str = "both", min_area: int = 1) -> None:
        _check_lesions(lesions)
        self.lesions = lesions
        self.min_area = min_area

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The slice, float32 [H, W] in 0..1, and its mask, uint8 [H, W], codes 0..3."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image, mask = self.read(index)
        target = mask_to_targets(mask, self.lesions, self.min_area)
        target["image_id"] = torch.tensor([index % len(self)])
        return torch.from_numpy(image).repeat(3, 1, 1), target  # [3, H, W]


class LesionSlices(LesionDataset):
    """The lesion slices of CNCB, or phantoms: image/<patient>/<slice>.png|jpg and mask/...png.

    Args:
        root: the folder that holds image/ and mask/.
        split: "train", "val" or "test" reads `root`/<split>.txt; another value is the path to such
            a list. A line is `<patient>_<slice>.<suffix>`, where the patient is what precedes the
            last underscore. A list that says .jpg where the file is .png (or the other way round)
            is understood. None takes every slice found.
        lesions, min_area: as in `mask_to_targets`.

    Raises:
        DataError: at once for a missing folder or file, an empty split, a line that does not
            parse; on reading an item for damaged files, codes outside 0..3, and an image and mask
            of different sizes.
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
        for folder in (self.root / "image", self.root / "mask"):
            if not folder.is_dir():
                raise DataError(
                    f"{folder}: there is no such folder; name the folder that holds image/<patient>"
                    "/<slice>.png and mask/<patient>/<slice>.png"
                )
        source = self.root if split is None else split_path(root, split)
        files = self._find()
        if not files:
            raise DataError(
                f"{self.root / 'image'}: no slices found; expected <patient>/<slice>.png or .jpg"
            )
        if split is not None:
            files = _listed(source, files)
        elif twice := [a.name for a, b in pairwise(files) if a[:2] == b[:2]]:
            raise DataError(
                f"{self.root / 'image'}: slices that exist with two suffixes: {some(twice)}; "
                "remove one of each, or name a list"
            )
        no_mask = [file for file in files if not self._mask_path(file).is_file()]
        if no_mask:
            raise DataError(
                f"{source}: slices without a mask: {some([file.name for file in no_mask])}; add "
                f"{self._mask_path(no_mask[0])} and the like, or leave these slices out"
            )
        self._files = files
        self.names = [file.name for file in files]
        self.patients = [file.patient for file in files]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        file = self._files[index]
        image_path = self.root / "image" / file.patient / (file.slice + file.suffix)
        mask_path = self._mask_path(file)
        return checked_pair(read_image(image_path), read_mask(mask_path), 3, mask_path)

    def _find(self) -> list[_SliceFile]:
        """Every image on disk, by patient and slice; numbers in numeric order."""
        files = [
            _SliceFile(path.parent.name, path.stem, path.suffix)
            for patient in (self.root / "image").iterdir()
            if patient.is_dir()  # glob would leave out what may not be entered, without a word
            for path in patient.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        ]
        return sorted(files, key=lambda file: [natural(part) for part in file])

    def _mask_path(self, file: _SliceFile) -> Path:
        return self.root / "mask" / file.patient / f"{file.slice}.png"


class _SliceFile(NamedTuple):
    patient: str
    slice: str
    suffix: str  # with the dot

    @property
    def name(self) -> str:
        return f"{self.patient}_{self.slice}{self.suffix}"


def _parse(name: str) -> _SliceFile | None:
    path = Path(name)
    patient, _, number = path.stem.rpartition("_")
    if not patient or not number or path.name != name or path.suffix.lower() not in IMAGE_SUFFIXES:
        return None
    return _SliceFile(patient, number, path.suffix)


def _listed(path: Path, found: list[_SliceFile]) -> list[_SliceFile]:
    """The files on disk that the lines of a list name, whatever the suffix if only one exists."""
    on_disk: dict[tuple[str, str], list[_SliceFile]] = {}
    for file in found:
        on_disk.setdefault((file.patient, file.slice), []).append(file)
    files, missing = [], []
    for number, words in read_lines(path):
        wanted = _parse(words[0])
        if wanted is None or len(words) > 1:
            raise DataError(
                f"{path}, line {number}: {' '.join(words)!r} is no slice name; "
                "expected <patient>_<slice>.png or .jpg"
            )
        candidates = on_disk.get((wanted.patient, wanted.slice), [])
        if wanted in candidates:
            files.append(wanted)
        elif len(candidates) == 1:
            files.append(candidates[0])
        else:
            missing.append(words[0])
    if missing:
        raise DataError(
            f"{path}: images that are not on disk: {some(missing)}; put them into "
            "image/<patient>/<slice>.png, or remove them from the list"
        )
    return files


def checked_pair(
    image: np.ndarray, mask: np.ndarray, largest_code: int, mask_path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Return image and mask as they are.

    Raises:
        DataError: their sizes differ, or the mask holds codes outside 0..largest_code.
    """
    if image.shape != mask.shape:
        raise DataError(
            f"{mask_path}: the mask is {mask.shape[1]} x {mask.shape[0]} pixels, its image "
            f"{image.shape[1]} x {image.shape[0]}; save both at one size"
        )
    if mask.max() > largest_code:
        raise DataError(
            f"{mask_path}: the mask holds the values {np.unique(mask).tolist()[:8]}, expected "
            f"codes 0..{largest_code}; save class codes, not colours or grey levels"
        )
    return image, mask


def natural(text: str) -> tuple[int, int, str]:
    """Sort key: numbers by value, before other text."""
    return (0, int(text), text) if text.isdecimal() else (1, 0, text)


def split_by_patient(
    patients: Sequence[str], fractions: Sequence[float], seed: int
) -> list[list[int]]:
    """Split items so that all slices of a patient land in the same part.

    Neighbouring slices of one patient look almost alike; if they stood in two parts, a model could
    score well by recognising the patient.

    Args:
        patients: the patient of each item.
        fractions: the share of the PATIENTS in each part; they sum to 1.
        seed: the same seed and patients give the same parts.

    Returns:
        one sorted list of item indices per fraction; a part may be empty if patients are few.

    Raises:
        ValueError: a fraction is negative or they do not sum to 1.
    """
    if min(fractions, default=-1) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions {tuple(fractions)}: they must be >= 0 and sum to 1")
    unique = np.random.default_rng(seed).permutation(sorted(set(patients)))
    ends = np.rint(np.cumsum(fractions)[:-1] * len(unique)).astype(int)
    part_of = {
        patient: part for part, group in enumerate(np.split(unique, ends)) for patient in group
    }
    parts: list[list[int]] = [[] for _ in fractions]
    for index, patient in enumerate(patients):
        parts[part_of[patient]].append(index)
    return parts


def _check_lesions(lesions: str) -> None:
    if lesions not in LESION_CLASSES:
        raise ValueError(f"lesions {lesions!r}: choose one of {', '.join(LESION_CLASSES)}")


class SemiSeg(LesionDataset):
    """The published 50 training and 48 test slices, as items of `LesionDataset`.

    All slices are of COVID patients, so nothing can be learned here about other conditions. They
    are cropped to the lungs, carry no Hounsfield units, and the masks mark no lung (no code 1).
    There are no patient ids, so each slice counts as a patient of its own: parts made by
    `split_by_patient`, and the published split itself, may share patients.

    Args:
        root: the folder that holds TrainingSet and TestingSet, or Inf-Net's folder above it, which
            holds Dataset.
        split: "train" or "test".
        lesions, min_area: as in `mask_to_targets`.

    Raises:
        DataError: a folder or a mask is missing; on reading, damaged files, palette indices
            outside 0..2, and an image and mask of different sizes.
    """

    patients_known = False

    def __init__(
        self, root: str | Path, split: str, lesions: str = "both", min_area: int = 1
    ) -> None:
        super().__init__(lesions, min_area)
        if split not in _FOLDERS:
            raise ValueError(f"split {split!r}: choose train or test")
        folders = [Path(root) / _FOLDERS[split], Path(root) / "Dataset" / _FOLDERS[split]]
        self.folder = next((folder for folder in folders if folder.is_dir()), folders[0])
        slices = self.folder / "Imgs"
        found = slices.iterdir() if slices.is_dir() else ()  # glob is silent about permissions
        images = sorted(
            (path for path in found if path.suffix == ".jpg"), key=lambda path: natural(path.stem)
        )
        if not images:
            raise DataError(
                f"{self.folder / 'Imgs'}: no .jpg slices found; name the folder of COVID-SemiSeg "
                "that holds TrainingSet and TestingSet"
            )
        self.names = [path.name for path in images]
        self.patients = [path.stem for path in images]
        no_mask = [f"{p}.png" for p in self.patients if not self._mask_path(p).is_file()]
        if no_mask:
            raise DataError(
                f"{self.folder / 'GT'}: masks are missing: {some(no_mask)}; download them again"
            )

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        # Both files are stored transposed, with the spine to the right; .T gives the axial view.
        image = read_image(self.folder / "Imgs" / self.names[index]).T
        mask_path = self._mask_path(self.patients[index])
        image, indices = checked_pair(image, read_mask(mask_path).T, 2, mask_path)
        return np.ascontiguousarray(image), _TO_CODE[indices]

    def _mask_path(self, name: str) -> Path:
        return self.folder / "GT" / f"{name}.png"


@dataclass(frozen=True)
class LesionStatistics:
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
        return np.array(
            [
                (areas < limit).mean() if areas.size else np.nan
                for label, limit in enumerate(fractions, start=1)
                for areas in [self.region_fractions[self.region_labels == label]]
            ]
        )


def lesion_statistics(dataset: LesionDataset) -> LesionStatistics:
    """Count and measure the lesions of every slice; reads all files once.

    Raises:
        DataError: as the dataset does on reading.
    """
    classes = LESION_CLASSES[dataset.lesions]
    counts, labels, fractions = [], [], []
    for image, target in (dataset[i] for i in range(len(dataset))):
        found = target["labels"].numpy()
        counts.append(np.bincount(found, minlength=len(classes) + 1)[1:])
        labels.append(found)
        fractions.append(target["area"].double().numpy() / image[0].numel())
    return LesionStatistics(
        classes=classes,
        counts=np.stack(counts),
        region_labels=np.concatenate(labels),
        region_fractions=np.concatenate(fractions),
    )


def open_lesions(
    root: str | Path, split: str, lesions: str = "both", min_area: int = 1
) -> LesionDataset:
    """Slices with masks: `root` holds lesions/, or image/ and mask/, or is COVID-SemiSeg.

    Args:
        split: train, val, test, the path to a list, or all: every slice that is there.
        lesions, min_area: as in `mask_to_targets`.

    Raises:
        DataError: see `LesionSlices` and `SemiSeg`.
    """
    from covidmask.datasets.lesions import LesionSlices, SemiSeg

    root = existing_folder(root)
    folder = _lesions_folder(root)
    if not (folder / "image").is_dir() and (there := _semiseg_splits(root)):
        if split not in ("train", "test"):
            raise DataError(
                f"{root}: COVID-SemiSeg has no split {split!r}; choose {' or '.join(there)}"
            )
        return SemiSeg(root, split, lesions, min_area)
    return LesionSlices(folder, None if split == "all" else split, lesions, min_area)


def lesion_splits(root: Path) -> list[str]:
    """The splits that `open_lesions` finds; ["all"] for slices without lists."""
    folder = _lesions_folder(root)
    if not (folder / "image").is_dir():
        return _semiseg_splits(root)
    return listed_splits(folder) or ["all"]


def _lesions_folder(root: Path) -> Path:
    return root / "lesions" if (root / "lesions").is_dir() else root


def _semiseg_splits(root: Path) -> list[str]:
    return [
        split
        for split, folder in (("train", "TrainingSet"), ("test", "TestingSet"))
        if (root / folder).is_dir() or (root / "Dataset" / folder).is_dir()
    ]
