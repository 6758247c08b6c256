"""Predictions of slices that were made elsewhere, such as those of COVIDNet-CT [GWW20] (Table 3).

Its released model runs in TensorFlow, so it is not built again here: what it says comes as a CSV.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from covidmask import files
from covidmask.datasets.classes import SliceImages, _labels
from covidmask.errors import DataError


def read_predictions(path: str | Path, slices: SliceImages) -> tuple[np.ndarray, bool]:
    """What a CSV says of each slice, in the order of the list.

    Args:
        path: a header, then a line for each slice of the list, in any order. Column `file` has its
            name as in `slices.names`; then either a column of each class, under its name, has a
            probability, or column `class` has the predicted class. A class may also be called as
            in file names (`NCP`), or by its label (2). Other columns are not read.
        slices: the list; of it `names` and `classes` are used.

    Returns:
        Probabilities, float64 [M,C], each row divided by its sum (a predicted class has 1), and
        whether the file has probabilities, not classes alone.

    Raises:
        DataError: no CSV; columns, slices or numbers are missing, wrong or there twice.
    """
    classes = tuple(slices.classes)
    labels = _labels(classes) | {name: label for label, name in enumerate(classes)}
    with files.decoding(path, "is no CSV in UTF-8", "export it again"):
        lines = files.readable(path).read_text("utf-8-sig").splitlines()
        reader = csv.DictReader(lines, strict=True, skipinitialspace=True)
        header = list(reader.fieldnames or [])
        rows = [(reader.line_num, row) for row in reader]
    columns = [[c for c in header if labels.get(c) == label] for label in range(len(classes))]
    known = any(columns)
    once = [len(column) for column in columns] if known else [header.count("class")]
    if {header.count("file"), *once} != {1}:
        raise DataError(
            f"{path}: its columns are {', '.join(header) or 'missing'}; give `file` and `class`, "
            f"or `file` and each class, once: {', '.join(classes)}"
        )
    found: dict[str, np.ndarray] = {}
    twice = []
    for number, row in rows:
        words = [row[column] for (column,) in columns] if known else [row["class"]]
        try:
            # what is missing becomes NaN, which is in no range
            shares = np.array(words, float) if known else np.eye(len(classes))[labels[words[0]]]
            if not (shares.min() >= 0 and shares.max() <= 1 and shares.any()) or None in row:
                raise ValueError
        except (ValueError, TypeError, LookupError) as error:
            choice = "a number from 0 to 1 for each class, not all 0" if known else "one of "
            choice += "" if known else ", ".join(classes)
            said = ", ".join(map(str, (*words, *row.get(None, ()))))
            raise DataError(f"{path}, line {number}: {said}; give {choice}") from error
        twice += [row["file"]] * (row["file"] in found)
        found[row["file"]] = shares / shares.sum()
    listed = set(slices.names)
    for what, names in (
        ("there twice", twice),
        ("not in the list", [str(name) for name in found if name not in listed]),
        ("missing", [name for name in slices.names if name not in found]),
    ):
        if names:
            remedy = "let each slice of the list be there once"
            raise DataError(f"{path}: slices {what}: {files.some(names)}; {remedy}")
    return np.stack([found[name] for name in slices.names]), known
