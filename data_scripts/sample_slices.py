"""Draw a balanced training list from a COVIDx-CT list, as the paper did (section 2.2)."""

import sys
from pathlib import Path

import tyro
from tyro.conf import Positional

from covidmask.datasets.classes import balanced_sample, class_names, read_split, write_split
from covidmask.errors import CovidmaskError


def draw(
    source: Positional[Path],
    output: Positional[Path],
    per_class: int = 1000,
    seed: int = 0,
    by_patient: bool = False,
) -> None:
    """Draw a balanced training list from a COVIDx-CT list; the author's own is another draw.

    Args:
        source: list to draw from.
        output: list to write.
        per_class: slices of each class.
        seed: the same seed gives the same list.
        by_patient: one slice of every patient before a second of any.
    """
    classes = class_names(source.parent)
    sample = balanced_sample(read_split(source, classes), per_class, seed, by_patient, classes)
    write_split(output, sample)
    patients = len({entry.patient for entry in sample})
    print(f"{output}: {len(sample)} slices of {patients} patients")


try:
    tyro.cli(draw)
except CovidmaskError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
