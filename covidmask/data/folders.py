"""Where data and weights lie, and which reader a folder of data needs. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from covidmask.errors import DataError

if TYPE_CHECKING:
    from covidmask.data.lesions import LesionDataset
    from covidmask.data.slices import SliceImages

_SPLITS = ("train", "val", "test")


def data_root() -> Path:
    """$COVIDMASK_DATA, or ./data."""
    return Path(os.environ.get("COVIDMASK_DATA") or "data")


def phantoms_folder(preset: str) -> Path:
    """The phantoms of a preset."""
    return data_root() / f"phantoms-{preset}"


def weights_file(kind: str, preset: str) -> Path:
    """Where training writes, and the other commands look, unless told otherwise."""
    return data_root() / "weights" / f"{kind}-{preset}.safetensors"


def ranked_folder() -> Path:
    """Where training keeps the ranked boxes of slices; it may be deleted at any time."""
    return data_root() / "ranked"


def existing_folder(root: str | Path) -> Path:
    """`root`, if it is there.

    Raises:
        DataError: it is not.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(
            f"{root}: there is no such data folder; make it with `covidmask phantoms --preset "
            "NAME`, or name yours with --data"
        )
    return root


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
    from covidmask.data.lesions import LesionSlices
    from covidmask.data.semiseg import SemiSeg

    root = existing_folder(root)
    folder = _lesions_folder(root)
    if not (folder / "image").is_dir() and (there := _semiseg_splits(root)):
        if split not in ("train", "test"):
            raise DataError(
                f"{root}: COVID-SemiSeg has no split {split!r}; choose {' or '.join(there)}"
            )
        return SemiSeg(root, split, lesions, min_area)
    return LesionSlices(folder, None if split == "all" else split, lesions, min_area)


def open_slices(root: str | Path, split: str, require_classes: bool = False) -> SliceImages:
    """Slices with an image class: `root` holds slices/, or the images themselves.

    Args:
        split: train, val, test, or the path to a list.
        require_classes: as in `SliceImages`.

    Raises:
        DataError: see `SliceImages`.
    """
    from covidmask.data.slices import SliceImages

    return SliceImages(_slices_folder(existing_folder(root)), split, require_classes)


def lesion_splits(root: Path) -> list[str]:
    """The splits that `open_lesions` finds; ["all"] for slices without lists."""
    folder = _lesions_folder(root)
    if not (folder / "image").is_dir():
        return _semiseg_splits(root)
    return _listed(folder) or ["all"]


def slice_splits(root: Path) -> list[str]:
    """The splits that `open_slices` finds."""
    folder = _slices_folder(root)
    return [] if (folder / "image").is_dir() else _listed(folder)  # image/: lists of lesions


def _listed(folder: Path) -> list[str]:
    return [split for split in _SPLITS if (folder / f"{split}.txt").is_file()]


def _lesions_folder(root: Path) -> Path:
    return root / "lesions" if (root / "lesions").is_dir() else root


def _slices_folder(root: Path) -> Path:
    return root / "slices" if (root / "slices").is_dir() else root


def _semiseg_splits(root: Path) -> list[str]:
    return [
        split
        for split, folder in (("train", "TrainingSet"), ("test", "TestingSet"))
        if (root / folder).is_dir() or (root / "Dataset" / folder).is_dir()
    ]
