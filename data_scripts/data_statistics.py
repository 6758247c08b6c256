"""Print what a folder of lesion slices and a folder of classified slices hold (Fig. 1).

python data_scripts/data_statistics.py --lesions data/phantoms-quick/lesions
python data_scripts/data_statistics.py --slices data/phantoms-quick/slices
"""

# Not called statistics.py: Python puts a script's folder first on its path, and torch imports the
# standard library's module of that name.

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from covidmask.datasets.classes import SliceImages, class_statistics
from covidmask.datasets.lesions import LesionSlices, lesion_statistics
from covidmask.errors import CovidmaskError
from covidmask.files import SPLITS


def print_lesions(root: Path, split: str | None, min_area: int) -> None:
    dataset = LesionSlices(root, split, min_area=min_area)
    found = lesion_statistics(dataset)
    patients = len(set(dataset.patients))
    print(f"{root}: {len(dataset)} slices of {patients} patients, regions of >= {min_area} px")
    few = found.share_of_slices_below(5)
    limits = (0.02, 0.01)
    small = found.share_of_regions_below(*limits)
    for c, name in enumerate(found.classes):
        print(
            f"  {name:<4} {found.counts[:, c].sum():>6} regions; "
            f"slices with fewer than 5: {few[c]:.1%}".replace("%", " %")
            + f"; regions under {limits[c]:.0%} of the image: {small[c]:.1%}".replace("%", " %")
        )


def print_classes(root: Path) -> None:
    print(f"{root}:")
    for split in SPLITS:
        if (root / f"{split}.txt").is_file():
            found = class_statistics(SliceImages(root, split))
            for row in zip(found.classes, found.slices, found.patients, strict=True):
                print("  {:<6} {:<17} {:>6} slices of {:>4} patients".format(split, *row))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lesions", type=Path, help="folder with image/ and mask/")
    parser.add_argument("--split", help="train, val, test or a list; default: every lesion slice")
    parser.add_argument(
        "--min-area", type=int, default=1, help="smallest region in pixels (default: 1)"
    )
    parser.add_argument("--slices", type=Path, help="folder with slices and train|val|test.txt")
    arguments = parser.parse_args()
    if not (arguments.lesions or arguments.slices):
        parser.error("name a folder with --lesions or --slices")
    try:
        if arguments.lesions:
            print_lesions(arguments.lesions, arguments.split, arguments.min_area)
        if arguments.slices:
            print_classes(arguments.slices)
    except CovidmaskError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
