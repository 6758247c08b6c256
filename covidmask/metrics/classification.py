"""Sensitivity, PPV and accuracy, with intervals (paper, section 4, Tables 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike


def confusion(labels: ArrayLike, predictions: ArrayLike, classes: int = 3) -> np.ndarray:
    """Count slices by true and predicted class.

    Args:
        labels, predictions: int [M], values 0..classes-1; lists, arrays or CPU tensors.

    Returns:
        int64 [classes, classes]: true classes in rows, predicted ones in columns.

    Raises:
        ValueError: different lengths, no slice, or a class outside 0..classes-1.
    """
    from sklearn.metrics import confusion_matrix

    labels, predictions = _int_vector(labels), _int_vector(predictions)
    both = np.concatenate([labels, predictions])
    if labels.shape != predictions.shape or not labels.size:
        raise ValueError(
            f"{labels.size} labels and {predictions.size} predictions: give one of each per slice"
        )
    if both.min() < 0 or both.max() >= classes:  # scikit-learn would leave them out silently
        raise ValueError(f"class {both.min()}..{both.max()}: classes are 0..{classes - 1}")
    return confusion_matrix(labels, predictions, labels=range(classes)).astype(np.int64)


def report(confusion: ArrayLike) -> dict:
    """The numbers of Table 2 from a confusion matrix.

    Args:
        confusion: counts [C, C], true classes in rows, predicted ones in columns.

    Returns:
        A dict with

        - accuracy: float, 0..1: share of all slices that are classified correctly.
        - sensitivity: C floats, 0..1: share of the slices of a class that are found; NaN for a
          class without slices.
        - ppv: C floats, 0..1: share of the predictions of a class that are right (positive
          predictive value, precision); NaN for a class that is never predicted.
        - support: C ints: slices of each class.
        - n: int: slices in all.

    Raises:
        ValueError: not a square matrix of counts, or no slice in it.
    """
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"confusion matrix of shape {counts.shape}: it must be square")
    if not np.isfinite(counts).all() or (counts < 0).any() or (counts != np.round(counts)).any():
        raise ValueError("confusion matrix: its elements must be counts, so whole and >= 0")
    if counts.sum() == 0:
        raise ValueError("confusion matrix: it counts no slice")
    right = np.diag(counts)
    true, predicted = counts.sum(axis=1), counts.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the documented NaN
        sensitivity, ppv = right / true, right / predicted
    return {
        "accuracy": float(right.sum() / counts.sum()),
        "sensitivity": sensitivity.tolist(),
        "ppv": ppv.tolist(),
        "support": [int(count) for count in true],
        "n": int(counts.sum()),
    }


def wilson(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion, as fractions.

    It holds for independent trials. The slices of one patient are not independent, so on slices it
    is too narrow: see `patient_bootstrap`. (nan, nan) when `total` is 0.

    Raises:
        ValueError: `successes` is not in 0..`total`, one of them is not whole, or `level` is not
            in 0..1.
    """
    from scipy.stats import binomtest

    whole = float(successes).is_integer() and float(total).is_integer()
    if not whole or not 0 <= successes <= total or not 0 < level < 1:  # scipy may not say so
        raise ValueError(
            f"{successes} of {total} at level {level}: give 0 <= successes <= total, both whole, "
            "and 0 < level < 1"
        )
    if total == 0:
        return float("nan"), float("nan")
    interval = binomtest(int(successes), int(total)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def patient_bootstrap(
    labels: ArrayLike,
    predictions: ArrayLike,
    patients: Sequence[str],
    statistic: Callable[[np.ndarray], float],
    level: float = 0.95,
    repeats: int = 1000,
    seed: int = 0,
    classes: int = 3,
) -> tuple[float, float]:
    """Percentile interval of a statistic when patients, not slices, are drawn with replacement.

    Args:
        labels, predictions: int [M], 0..classes-1.
        patients: M names; slices with the same name are drawn together.
        statistic: reads a confusion matrix int64 [classes, classes], returns a float; for example
            `lambda counts: report(counts)["sensitivity"][2]`.
        level: of the interval, between 0 and 1.
        repeats: how many times all patients are drawn.
        classes: number of image classes.

    Returns:
        (low, high). Draws in which the statistic is NaN, because a class is absent from them, are
        left out; both are NaN when nothing is left.

    Raises:
        ValueError: as `confusion`, or not one patient per slice.
    """
    labels, predictions = _int_vector(labels), _int_vector(predictions)
    total = confusion(labels, predictions, classes)  # checks both
    if len(patients) != labels.size:
        raise ValueError(f"{len(patients)} patients for {labels.size} slices: give one per slice")
    if not 0 < level < 1 or repeats < 1:
        raise ValueError(f"level {level}, repeats {repeats}: level is in 0..1, repeats at least 1")
    names, owner = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    counts = np.zeros((len(names), *total.shape), dtype=np.int64)  # [P, C, C]
    np.add.at(counts, (owner, labels, predictions), 1)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(names), size=len(names)) for _ in range(repeats))
    values = np.array([statistic(counts[draw].sum(axis=0)) for draw in draws], dtype=float)
    values = values[~np.isnan(values)]
    if not values.size:
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _int_vector(values: ArrayLike) -> np.ndarray:
    vector = np.asarray(values)
    if vector.ndim != 1:
        raise ValueError(f"classes of shape {vector.shape}: give one number for each slice")
    if vector.size and not np.issubdtype(vector.dtype, np.integer):
        raise ValueError(f"classes of type {vector.dtype}: they must be integers")
    return vector.astype(np.int64)
