"""Chapter 15 shows the results of benchmarks/covid_semiseg.py, and the file says what they are."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import warn_if_stale

from covidmask.metrics.detection import overlap_means

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "results" / "covid_semiseg.json").read_text(encoding="utf-8"))


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it imports its neighbours
    return importlib.import_module("covid_semiseg")


def test_chapter_and_readme_show_the_results_file(benchmark, tmp_path):
    for file, text in (
        (benchmark.TWIN, benchmark.markdown(RESULT)),
        (ROOT / "README.md", benchmark.readme(RESULT)),
    ):
        copy = tmp_path / file.name
        copy.write_bytes(file.read_bytes())
        benchmark.common.fill(copy, "covid_semiseg", text)
        assert copy.read_text("utf-8") == file.read_text("utf-8"), (
            "run `python benchmarks/covid_semiseg.py --page`, then `make notebooks`"
        )


def test_intervals_follow_from_the_counts_of_each_slice(benchmark):
    """The stored ones came from scipy.stats.bootstrap."""
    stored = RESULT["all_mirrored"]["C"].items()
    assert benchmark.summary(RESULT["folds"])["C"] == {
        name: pytest.approx(value) for name, value in stored
    }


def test_every_slice_is_judged_once_by_a_model_that_did_not_train_on_it(benchmark):
    rows = RESULT["folds"]
    assert [row["test_slices"] for row in rows] == benchmark.folds(50)
    assert all(row["training_slices"] + len(row["test_slices"]) == 50 for row in rows)
    tested = sorted(i for row in rows for i in row["test_slices"])
    assert tested == list(range(50))


def test_means_follow_from_the_counts_of_each_slice(benchmark):
    table = benchmark.tables(RESULT["folds"])
    for i, region in enumerate(benchmark.REGIONS):
        stored = RESULT["all_mirrored"][region]
        for measure, value in overlap_means(table[:, i]).items():
            assert stored[measure] == pytest.approx(value)
        assert stored["dice_interval"][0] < stored["dice"] < stored["dice_interval"][1]


def test_wrong_names(benchmark):
    """Two slices: one of 4 lesion pixels, one with the wrong name; one of C alone, half found."""
    first = [[4, 4, 4, 100, 0], [2, 3, 2, 100, 0], [1, 1, 2, 100, 0]]
    second = [[2, 2, 4, 100, 0], [0, 0, 0, 100, 0], [2, 2, 4, 100, 0]]
    assert benchmark.wrong_names(np.array([first, second])) == pytest.approx(1 / 6)


def test_names_by_grey(benchmark):
    """The brighter half of the lesion is consolidation: a limit in between names all of it."""
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    truth = np.where(image > 0.65, 3, np.where(image > 0.25, 2, 0))
    limit = benchmark.grey_limit([(image, truth)])
    codes = benchmark.name_by_grey(truth > 1, image, limit)
    assert np.array_equal(codes, truth)
    assert benchmark.name_dice(codes, truth) == [1, 1]
    assert benchmark.name_dice(benchmark.name_by_grey(truth > 1, image, 1.0), truth)[1] == 0
    assert benchmark.name_dice(np.zeros((2, 2)), np.zeros((2, 2))) == [0, 0]  # the published rule


def test_connected_regions(benchmark):
    maps = torch.zeros(2, 6, 6)
    maps[0, :2, :2] = 0.8  # one region of GGO, two of C
    maps[1, 4:, :2], maps[1, 4:, 4:] = 0.6, 0.9
    found = benchmark.connected_regions(maps)
    assert found["labels"].tolist() == [1, 2, 2]
    assert found["scores"].tolist() == pytest.approx([0.8, 0.6, 0.9])
    assert len(benchmark.connected_regions(torch.zeros(2, 6, 6))["scores"]) == 0


def test_right_names_are_the_most_that_names_can_win(benchmark):
    for row in RESULT["folds"]:
        table = np.array(row["overlap_mirrored"])[:, 1:]  # [slices, classes, 5]
        network = [[overlap_means(part[None])["dice"] for part in one] for one in table]
        best, grey = (np.array(row["named"][name]) for name in ("by_truth", "by_grey"))
        assert (best >= np.array(network) - 1e-9).all()
        assert (best.mean(0) >= grey.mean(0)).all()
        one, own = (np.array(row["named"][name]) for name in ("outlines", "outlines_own"))
        assert (own.sum(1) >= one.sum(1) - 1e-9).all()  # the best limit is the best for both


def test_results_name_their_origin():
    for key in (
        "command",
        "commit",
        "hardware",
        "date",
        "torch",
        "torchvision",
        "generator",
    ):
        assert RESULT[key], key
    used = ("phantoms", "detector", "segmenter", "min_area", "augment", "pretraining")
    warn_if_stale(RESULT, used, "python benchmarks/covid_semiseg.py --data DIR")
