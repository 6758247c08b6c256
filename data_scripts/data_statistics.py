"""Print what a folder of lesion slices and a folder of classified slices hold (Fig. 1)."""

import sys
from pathlib import Path

import tyro

from covidmask.datasets import LesionSlices, class_statistics, lesion_statistics
from covidmask.datasets.classes import open_slices, slice_splits
from covidmask.errors import CovidmaskError
from covidmask.files import existing_folder


def show(
    lesions: Path | None = None, split: str = "all", min_area: int = 1, slices: Path | None = None
) -> None:
    """Print what a folder of lesion slices and a folder of classified slices hold (Fig. 1).

    python data_scripts/data_statistics.py --lesions data/phantoms-quick/lesions

    Args:
        lesions: folder with image/ and mask/.
        split: train, val, test, all, or a list of lesion slices.
        min_area: smallest region in pixels.
        slices: folder with slices and train|val|test.txt.
    """
    if not (lesions or slices):
        raise CovidmaskError("name a folder with --lesions or --slices")
    if lesions:
        dataset = LesionSlices(lesions, None if split == "all" else split, min_area=min_area)
        found, patients = lesion_statistics(dataset), len(set(dataset.patients))
        print(f"{lesions}: {len(dataset)} slices of {patients} patients, regions >= {min_area} px")
        limits = (0.02, 0.01)
        few, small = found.share_of_slices_below(5), found.share_of_regions_below(*limits)
        for c, name in enumerate(found.classes):
            text = f"  {name:<4} {found.counts[:, c].sum():>6} regions; slices with fewer than 5: "
            text += f"{few[c]:.1%}; regions under {limits[c]:.0%} of the image: {small[c]:.1%}"
            print(text.replace("%", " %"))
    for part in slice_splits(existing_folder(slices)) if slices else ():
        found = class_statistics(open_slices(slices, part))
        for row in zip(found.classes, found.slices, found.patients, strict=True):
            print("  {:<6} {:<17} {:>6} slices of {:>4} patients".format(part, *row))


try:
    tyro.cli(show)
except CovidmaskError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
