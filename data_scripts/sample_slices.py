"""Draw a balanced training list from a COVIDx-CT list, as the paper did (section 2.2).

    python data_scripts/sample_slices.py train_COVIDx_CT-1.txt train_3000.txt

The author's own 3,000 slices are in his repository (train_split_classification.txt), and
covidmask reads that list too; this draws another sample of the same kind.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from covidmask.datasets.classes import balanced_sample, class_names, read_split, write_split
from covidmask.errors import CovidmaskError


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="list to draw from")
    parser.add_argument("output", type=Path, help="list to write")
    parser.add_argument("--per-class", type=int, default=1000, help="slices (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument(
        "--by-patient",
        action="store_true",
        help="one slice of every patient before a second of any",
    )
    arguments = parser.parse_args()
    try:
        classes = class_names(arguments.source.parent)
        entries = read_split(arguments.source, classes)
        options = arguments.per_class, arguments.seed, arguments.by_patient
        sample = balanced_sample(entries, *options, classes)
        write_split(arguments.output, sample)
    except CovidmaskError as error:
        print(error, file=sys.stderr)
        return 2
    patients = len({entry.patient for entry in sample})
    print(f"{arguments.output}: {len(sample)} slices of {patients} patients")
    return 0


if __name__ == "__main__":
    sys.exit(main())
