"""Where data and weights lie, and which reader a folder of data needs. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from covidmask.errors import CheckpointError, DataError
from covidmask.files import is_there

if TYPE_CHECKING:
    from covidmask.data.lesions import LesionDataset
    from covidmask.data.slices import SliceImages

_SPLITS = ("train", "val", "test")
REGIMES = ("heads", "heads_bn", "full")
WHOSE_SHIPPED = "shipped with the package, trained on phantoms and wrong on real CT"


def data_root() -> Path:
    """$COVIDMASK_DATA, or ./data."""
    return Path(os.environ.get("COVIDMASK_DATA") or "data")


def phantoms_folder(preset: str) -> Path:
    """The phantoms of a preset."""
    return data_root() / f"phantoms-{preset}"


def weights_file(kind: str, preset: str, regime: str | None = None) -> Path:
    """Where training writes, unless told otherwise; a classifier's name has its regime."""
    name = "-".join(part for part in (kind, preset, regime) if part)
    return data_root() / "weights" / f"{name}.safetensors"


def find_weights(
    kind: str,
    preset: str,
    named: str | Path | None = None,
    regime: str | None = None,
    shipped: bool = False,
) -> tuple[Path, str]:
    """The weights to use: the named ones, else yours, else (preset quick) the shipped ones.

    Yours are what `covidmask train` writes in $COVIDMASK_DATA/weights.

    Args:
        kind: segmenter or classifier.
        named: a file that the reader has named.
        regime: which of your classifiers; None takes the only one.
        shipped: prefer the shipped ones, as the book does, whose text has their numbers.

    Returns:
        the file, and whose it is: "named", "yours" or `WHOSE_SHIPPED`.

    Raises:
        CheckpointError: there are none, several of yours, or `named` beside `regime`.
    """
    if named is not None:
        if regime is not None:
            raise CheckpointError(
                f"--regime {regime}: chooses among your own weights, but {named} is named; leave "
                "one of the two out"
            )
        return Path(named), "named"
    yours = {} if shipped and preset == "quick" else _yours(kind, preset)
    if regime is not None:
        yours = {key: path for key, path in yours.items() if key == regime}
    if len(yours) > 1:
        found = ", ".join(f"{path} ({key})" for key, path in yours.items())
        raise CheckpointError(
            f"the {kind} of preset {preset}: there are several of yours, {found}; choose one with "
            "--regime, or name its file"
        )
    if yours:
        return next(iter(yours.values())), "yours"
    if preset == "quick" and regime in (None, "heads"):  # the shipped one's regime
        from covidmask.models.weights import ShippedWeights

        return ShippedWeights[f"{kind.upper()}_QUICK"].checked(), WHOSE_SHIPPED
    raise CheckpointError(
        f"{weights_file(kind, preset, regime)}: there is no {kind} of preset {preset} yet, and "
        f"none comes with the package; train it with `covidmask train {kind} --preset {preset}"
        f"{f' --regime {regime}' if regime else ''}`"
    )


def _yours(kind: str, preset: str) -> dict[str, Path]:
    """Regime ("" for a segmenter) -> the file that training has written."""
    plain = weights_file(kind, preset)
    if kind == "segmenter":
        return {"": plain} if is_there(plain) else {}
    found = {}
    if is_there(plain):  # older files have their regime in the card alone
        from covidmask.models.weights import read_card

        found[str(read_card(plain).get("regime"))] = plain
    named = {regime: weights_file(kind, preset, regime) for regime in REGIMES}
    return found | {regime: path for regime, path in named.items() if is_there(path)}


def ranked_folder() -> Path:
    """Where training keeps the ranked boxes of slices; it may be deleted at any time."""
    return data_root() / "ranked"


def existing_folder(root: str | Path) -> Path:
    """`root`, if it is there.

    Raises:
        DataError: it is not.
    """
    root = Path(root)
    if root.is_file():
        raise DataError(f"{root}: is a file; name the folder that holds the data with --data")
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
