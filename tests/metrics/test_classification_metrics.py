import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, precision_score, recall_score

from covidmask.metrics.classification import (
    bootstrap,
    confusion,
    patient_bootstrap,
    report,
    wilson,
)

MERGED = [[9236, 188, 26], [116, 7150, 129], [20, 298, 4028]]  # of the released code's README
TWO_MASKS = [[9158, 278, 14], [204, 7030, 161], [15, 251, 4080]]
pairs = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60)


@pytest.mark.parametrize(
    ("counts", "sensitivity", "accuracy"), [(MERGED, 92.68, 96.33), (TWO_MASKS, 93.88, 95.64)]
)
def test_published_matrices(counts, sensitivity, accuracy):
    result = report(counts)
    assert round(100 * result["sensitivity"][2], 2) == sensitivity
    assert round(100 * result["accuracy"], 2) == accuracy
    assert result["support"] == [9450, 7395, 4346]
    assert result["n"] == 21191


@given(pairs)
@settings(deadline=None, max_examples=30)
def test_agrees_with_scikit_learn(pairs):
    labels, predictions = map(list, zip(*pairs, strict=True))
    result = report(confusion(labels, predictions))
    options = {"labels": [0, 1, 2], "average": None, "zero_division": np.nan}
    np.testing.assert_allclose(result["sensitivity"], recall_score(labels, predictions, **options))
    np.testing.assert_allclose(result["ppv"], precision_score(labels, predictions, **options))
    assert result["accuracy"] == pytest.approx(accuracy_score(labels, predictions))


@given(pairs)
@settings(deadline=None, max_examples=30)
def test_accuracy_is_the_weighted_mean_of_the_sensitivities(pairs):
    result = report(confusion(*zip(*pairs, strict=True)))
    weighted = np.nansum(np.multiply(result["sensitivity"], result["support"])) / result["n"]
    assert result["accuracy"] == pytest.approx(weighted)


def test_confusion_has_true_classes_in_rows():
    counts = confusion(torch.tensor([0, 0, 1]), np.array([0, 2, 2]))
    assert counts.dtype == np.int64
    assert counts.tolist() == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_absent_classes_are_nan():
    result = report(torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 0]]))
    assert result["sensitivity"] == pytest.approx([0.75, math.nan, 0], nan_ok=True)
    assert result["ppv"] == pytest.approx([0.6, 0, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    "counts",
    [[], [[1, 2, 3]], [1, 2], [[1, -1], [0, 1]], [[0, 0], [0, 0]], [[0.5, 1], [1, 1]],
     [[math.nan, 1], [1, 1]], [[math.inf, 1], [1, 1]], np.zeros((0, 0)), [[[1]]]],
)  # fmt: skip
def test_report_refuses_what_is_no_confusion_matrix(counts):
    with pytest.raises(ValueError, match="confusion matrix"):
        report(counts)


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [([], []), ([0, 1], [0]), ([0, 3], [0, 0]), ([0], [-1]), ([0.5], [0])],
)
def test_confusion_refuses(labels, predictions):
    with pytest.raises(ValueError):
        confusion(labels, predictions)


def test_wilson():
    low, high = wilson(4028, 4346)  # z = 1.959964: centre and half-width by hand
    n, p, z = 4346, 4028 / 4346, 1.959963984540054
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (low, high) == pytest.approx((centre - half, centre + half))
    assert wilson(0, 10)[0] == 0
    wide, narrow = wilson(5, 10, 0.99), wilson(5, 10, 0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert all(map(math.isnan, wilson(0, 0)))
    for successes, total in [(3, 2), (-1, 2), (1, 0)]:
        with pytest.raises(ValueError):
            wilson(successes, total)


def accuracy(counts):
    return report(counts)["accuracy"]


def test_bootstrap_by_patient_is_wider_than_by_slice():
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(3, size=20), 10)
    predictions = np.where(np.repeat(rng.random(20) < 0.7, 10), labels, (labels + 1) % 3)
    patients = [f"p{i}" for i in np.repeat(np.arange(20), 10)]  # each all right or all wrong
    by_patient = patient_bootstrap(labels, predictions, patients, accuracy, repeats=300)
    slices = [str(i) for i in range(200)]
    by_slice = patient_bootstrap(labels, predictions, slices, accuracy, repeats=300)
    assert by_patient[1] - by_patient[0] > 2 * (by_slice[1] - by_slice[0])
    observed = accuracy(confusion(labels, predictions))
    assert by_patient[0] < observed < by_patient[1]
    again = patient_bootstrap(labels, predictions, patients, accuracy, repeats=300)
    other = patient_bootstrap(labels, predictions, patients, accuracy, repeats=300, seed=1)
    assert again == by_patient != other


def test_bootstrap_of_single_slices_is_nearly_binomial():
    labels, predictions = [0] * 400, [0] * 200 + [1] * 200
    patients = [str(i) for i in range(400)]
    for level, z in ((0.95, 1.96), (0.5, 0.674)):
        low, high = patient_bootstrap(labels, predictions, patients, accuracy, level=level)
        half = z * math.sqrt(0.5 * 0.5 / 400)
        assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.007)


def test_bootstrap_by_default():
    labels, patients = [0, 1, 2, 0, 1], list("aabcd")
    rest = ([0, 1, 1, 1, 1], patients, accuracy)
    drawn = []
    patient_bootstrap(labels, *rest[:2], lambda counts: drawn.append(counts) or 0.0)
    assert len(drawn) == 1000 and {counts.shape for counts in drawn} == {(3, 3)}
    assert max(counts.sum() for counts in drawn) > 5 > min(counts.sum() for counts in drawn)
    explicit = patient_bootstrap(labels, *rest, level=0.95, repeats=1000, seed=0)
    assert patient_bootstrap(labels, *rest) == explicit
    assert patient_bootstrap(labels, *rest, repeats=1)[0] >= 0


def test_bootstrap_of_one_patient_has_no_width():
    assert patient_bootstrap([0, 1], [0, 0], ["a", "a"], accuracy, repeats=5) == (0.5, 0.5)


def test_bootstrap_leaves_out_draws_without_the_class():
    def covid(counts):
        return report(counts)["sensitivity"][2]

    assert patient_bootstrap([2, 0], [2, 0], ["a", "b"], covid, repeats=50) == (1, 1)
    assert all(map(math.isnan, patient_bootstrap([0], [0], ["a"], covid, repeats=5)))


def test_bootstrap_refuses():
    with pytest.raises(ValueError, match="1 patients for 2 slices"):
        patient_bootstrap([0, 1], [0, 1], ["a"], accuracy)
    with pytest.raises(ValueError, match="Quantiles must be in the range"):
        patient_bootstrap([0, 1], [0, 1], ["a", "b"], accuracy, level=95)


def test_bootstrap_of_any_statistic():
    """As scipy's, where that has an answer; an array of statistics, each with an interval."""
    values = np.random.default_rng(1).normal(size=40)
    low, high = bootstrap(40, lambda drawn: values[drawn].mean(), 0.9, 500, seed=3)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=500, method="percentile", confidence_level=0.9,
        random_state=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    assert (low, high) == pytest.approx(tuple(expected))
    both = bootstrap(40, lambda drawn: [values[drawn].mean(), np.nan], 0.9, 500, seed=3)
    assert both[:, 0].tolist() == [low, high] and np.isnan(both[:, 1]).all()


def test_bootstrap_of_other_numbers_of_classes():
    def accuracy(counts):
        assert counts.shape == (4, 4)
        return report(counts)["accuracy"]

    labels = [0, 1, 2, 3]
    assert patient_bootstrap(labels, labels, list("abcd"), accuracy, classes=4) == (1, 1)
    with pytest.raises(ValueError, match="class 0..3: classes are 0..2"):
        patient_bootstrap(labels, labels, list("abcd"), accuracy)


def test_tables_of_labels_are_refused():
    with pytest.raises(ValueError, match=r"int64 \[2, 3\] .* one whole number per slice"):
        confusion([[0, 1, 2], [0, 1, 2]], [[0, 0], [1, 1], [2, 2]])
    for labels, predictions in (([0, 1], [0]), ([0], [0, 1]), ([], [])):  # numpy would repeat one
        with pytest.raises(ValueError, match="one whole number per slice"):
            confusion(np.array(labels, int), np.array(predictions, int))


@pytest.mark.parametrize("values", [(1.5, 3), (math.nan, 3), (1, math.inf), (1, 2.5)])
def test_wilson_counts(values):
    with pytest.raises((TypeError, ValueError), match="must be an integer"):
        wilson(*values)
