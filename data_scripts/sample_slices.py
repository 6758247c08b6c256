"""Draw a balanced training list from a COVIDx-CT list, as the paper did (section 2.2).

python data_scripts/sample_slices.py train_COVIDx_CT-1.txt train_3000.txt --seed 0 --by-patient

The author's own 3,000 slices are in his repository (train_split_classification.txt), and
covidmask reads that list too; this draws another sample of the same kind.
"""

import sys
from pathlib import Path

import tyro
from tyro.conf import Positional

from covidmask.datasets import classes
from covidmask.errors import CovidmaskError


def draw(
    source: Positional[Path],
    output: Positional[Path],
    per_class: int = 1000,
    seed: int = 0,
    by_patient: bool = False,
) -> None:
    """Draw it.

    Args:
        source: list to draw from.
        output: list to write.
        per_class: slices of each class.
        seed: of the draw.
        by_patient: one slice of every patient before a second of any.
    """
    sample = classes.balanced_sample(classes.read_split(source), per_class, seed, by_patient)
    classes.write_split(output, sample)
    patients = len({classes.parse_name(entry.name).patient for entry in sample})
    print(f"{output}: {len(sample)} slices of {patients} patients")


try:
    tyro.cli(draw, description=__doc__)
except CovidmaskError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
