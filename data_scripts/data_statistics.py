"""Print what a folder of lesion slices and a folder of classified slices hold (Fig. 1).

python data_scripts/data_statistics.py --lesions data/phantoms-quick/lesions

python data_scripts/data_statistics.py --slices data/phantoms-quick/slices
"""

import sys
from pathlib import Path

import tyro

from covidmask.datasets import (
    LesionSlices,
    SliceImages,
    class_statistics,
    lesion_statistics,
    slice_splits,
)
from covidmask.errors import CovidmaskError


def show(
    lesions: Path | None = None,
    split: str | None = None,
    min_area: int = 1,
    slices: Path | None = None,
) -> None:
    """Print it.

    Args:
        lesions: folder with image/ and mask/.
        split: train, val, test or a list of lesion slices; None takes every one.
        min_area: smallest region in pixels.
        slices: folder with slices and train|val|test.txt.
    """
    if not (lesions or slices):
        raise CovidmaskError("name a folder with --lesions or --slices")
    if lesions:
        dataset = LesionSlices(lesions, split, min_area=min_area)
        found, patients = lesion_statistics(dataset), len(set(dataset.patients))
        print(f"{lesions}: {len(dataset)} slices of {patients} patients, regions >= {min_area} px")
        limits = (0.02, 0.01)
        few, small = found.share_of_slices_below(5), found.share_of_regions_below(*limits)
        for c, name in enumerate(found.classes):
            text = f"  {name:<4} {found.counts[:, c].sum():>6} regions; slices with fewer than 5: "
            text += f"{few[c]:.1%}; regions under {limits[c]:.0%} of the image: {small[c]:.1%}"
            print(text.replace("%", " %"))
    for split in slice_splits(slices) if slices else ():
        found = class_statistics(SliceImages(slices, split))
        for row in zip(found.classes, found.slices, found.patients, strict=True):
            print("  {:<6} {:<17} {:>6} slices of {:>4} patients".format(split, *row))


try:
    tyro.cli(show, description=__doc__)
except CovidmaskError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
