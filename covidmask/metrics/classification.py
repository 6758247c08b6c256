"""Sensitivity, PPV and accuracy, with intervals (paper, section 4, Tables 2 and 3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from covidmask.config import IMAGE_CLASSES


def confusion(
    labels: ArrayLike, predictions: ArrayLike, classes: int = len(IMAGE_CLASSES)
) -> np.ndarray:
    """Count slices by true and predicted class: int64 [classes, classes], true ones in rows.

    Labels and predictions are int [M], 0..classes-1: lists, arrays or CPU tensors, not empty.
    """
    both = [np.asarray(values) for values in (labels, predictions)]
    same = both[0].ndim == 1 and both[0].shape == both[1].shape and both[0].size
    if not same or any(values.dtype.kind not in "iu" for values in both):
        shapes = " and ".join(f"{values.dtype} {list(values.shape)}" for values in both)
        raise ValueError(f"labels and predictions are {shapes}: give one whole number per slice")
    low, high = np.min(both), np.max(both)
    if low < 0 or high >= classes:
        raise ValueError(f"class {low}..{high}: classes are 0..{classes - 1}")
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, tuple(both), 1)
    return counts


def report(confusion: ArrayLike) -> dict:
    """The numbers of Table 2 from a confusion matrix: counts [C, C], true classes in rows.

    Returns:
        `accuracy`, the share of all slices that are classified correctly; of each class the
        `sensitivity`, the share of its slices that are found, and the `ppv` (positive predictive
        value, precision), the share of its predictions that are right; all 0..1, NaN where there
        is no such slice or prediction. `support`, the slices of each class, and `n`, of all.
    """
    counts = np.asarray(confusion)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the documented NaN; so is inf % 1
        whole = (counts >= 0).all() and (counts % 1 == 0).all() and counts.any()
        if not whole or counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
            raise ValueError("confusion matrix: it must be square, of whole counts, and not empty")
        right, true, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
        return {
            "accuracy": float(right.sum() / counts.sum()),
            "sensitivity": (right / true).tolist(),
            "ppv": (right / predicted).tolist(),
            "support": [int(count) for count in true],
            "n": int(counts.sum()),
        }


def wilson(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion, as fractions; (nan, nan) when `total` is 0.

    It holds for independent trials, which the slices of a patient are not: see `patient_bootstrap`.
    """
    from scipy.stats import binomtest

    if successes == total == 0:
        return float("nan"), float("nan")
    low, high = binomtest(successes, total).proportion_ci(level, method="wilson")
    return float(low), float(high)


def bootstrap(
    groups: int,
    statistic: Callable[[np.ndarray], ArrayLike],
    level: float = 0.95,
    repeats: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Percentile interval of a statistic when groups, such as patients, are drawn with replacement.

    So many are drawn as there are, `repeats` times. `statistic` reads int64 [groups], the numbers
    of those drawn, and gives a number or an array; NaN is left out. Returns float64 [2, ...].
    """
    # scipy's bootstrap has no answer where a draw gives NaN, or where there is one group
    rng = np.random.default_rng(seed)
    draws = (rng.integers(groups, size=groups) for _ in range(repeats))
    values = np.array([statistic(draw) for draw in draws], dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing but NaN: so is the interval
        return np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)


def patient_bootstrap(
    labels: ArrayLike,
    predictions: ArrayLike,
    patients: Sequence[str],
    statistic: Callable[[np.ndarray], float],
    classes: int = len(IMAGE_CLASSES),
    **options: Any,
) -> tuple[float, float]:
    """Interval of a statistic by `bootstrap`: patients, not slices, are drawn with replacement.

    Args:
        labels, predictions: int [M], 0..classes-1. patients: M names.
        statistic: reads a confusion matrix int64 [classes, classes], returns a float, or NaN where
            a class is absent; for example `lambda counts: report(counts)["sensitivity"][2]`.
        options: `level`, `repeats` and `seed` of `bootstrap`.
    """
    confusion(labels, predictions, classes)  # checks both
    if len(patients) != len(labels):
        raise ValueError(f"{len(patients)} patients for {len(labels)} slices: give one per slice")
    names, owner = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    counts = np.zeros((len(names), classes, classes), dtype=np.int64)
    np.add.at(counts, (owner, np.asarray(labels), np.asarray(predictions)), 1)

    def of_drawn(drawn: np.ndarray) -> float:
        return statistic(counts[drawn].sum(0))

    return tuple(bootstrap(len(names), of_drawn, **options).tolist())
