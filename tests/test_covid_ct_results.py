"""The table of COVID-CT in chapter 16 is that of its file, and its numbers come from the boxes."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from covidmask.models import ShippedWeights
from covidmask.models.ranked_boxes import ranked_boxes

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "results" / "covid_ct.json").read_text("utf-8"))


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it imports its neighbour
    return importlib.import_module("covid_ct")


def test_the_chapter_shows_the_results_file(benchmark):
    lines = (f"# {line}".rstrip() for line in benchmark.markdown(RESULT).splitlines())
    assert "\n".join(lines) in benchmark.TWIN.read_text(encoding="utf-8")
    rows = "".join(benchmark.MARKS).replace("\n", f"\n{benchmark.code(RESULT)}", 1)
    assert rows in benchmark.TWIN.read_text(encoding="utf-8"), "the figure's numbers"
    for key in ("command", "commit", "hardware", "date", "torch", "weights"):
        assert RESULT[key], key
    assert "dirty" not in RESULT["commit"] and RESULT["command"].endswith("--data data/covid-ct")


def test_what_the_chapter_says_of_it(benchmark):
    folds = {name: row["folds"] for name, row in RESULT["rows"].items()}
    boxes = [folds[name] for name in ("scores", "paper", "spread", "place", "grey", "hidden")]
    assert max(low for _, low, _ in boxes) < min(high for *_, high in boxes)  # they all overlap
    best = max(value for value, *_ in boxes)
    seen = [folds[name][0] for name in ("inside", "maps", "imagenet")]
    assert best + 0.1 < min(seen) and max(seen) - min(seen) < 0.03
    assert folds["paper"][2] < folds["inside"][1]
    assert best < folds["light"][0] < min(seen)  # two grey values
    assert folds["inside"][0] > 0.8
    for part in ("folds", "val"):  # boxes at random places come close, and overlap widely
        inside, elsewhere = (RESULT["rows"][name][part] for name in ("inside", "elsewhere"))
        assert 0 < inside[0] - elsewhere[0] < 0.05 and inside[1] < elsewhere[0]
    val = {name: row["val"] for name, row in RESULT["rows"].items()}
    assert val["light"][1] < 0.5 < val["light"][2]  # no better than a coin
    assert val["inside"][1] < 0.8 < val["inside"][2] and 0.75 < val["inside"][0] < 0.8
    assert max(val[name][0] for name in ("scores", "paper", "spread", "place")) < 0.7


def test_rows_are_those_of_ranked_boxes(benchmark):
    detector = ShippedWeights.SEGMENTER_CT.load()
    config = benchmark.replace(benchmark.PRESETS["semiseg"].classifier, n_boxes=8)
    image = torch.rand(1, 60, 80, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1)
    rows, hidden = benchmark.looks(detector, image, config)
    with torch.no_grad():
        expected = ranked_boxes(detector, [image], config)[0]
    torch.testing.assert_close(rows[:, :5], expected)
    assert rows.shape == (8, 14) and hidden.shape == (8, detector.config.box_features)
    mean, spread, least, most = rows[:, 10:].T
    assert (least <= mean).all() and (mean <= most).all() and (spread >= 0).all()


def test_boxes_elsewhere_keep_their_sizes_and_stay_inside(benchmark):
    detector = ShippedWeights.SEGMENTER_CT.load()
    place = benchmark.Elsewhere(detector, benchmark.PRESETS["semiseg"].classifier)
    place.drawn = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[0.0, 0, 10, 20], [50, 30, 80, 40], [0, 0, 80, 60]])
    moved = place.placed(boxes, (60, 80))
    assert torch.allclose(moved[:, 2:] - moved[:, :2], boxes[:, 2:] - boxes[:, :2])
    assert (moved >= 0).all() and (moved[:, 2] <= 80.001).all() and (moved[:, 3] <= 60.001).all()
    assert not torch.allclose(moved[:2], boxes[:2])


def test_grey_of_a_box(benchmark):
    image = torch.zeros(3, 10, 20)
    image[:, :5, :10] = 1  # the upper left quarter
    places = torch.tensor([[0, 0, 0.5, 0.5], [0, 0, 1, 1], [0.5, 0.5, 1, 1]])
    values = benchmark.grey_of(image, places)
    assert values[:, 0].tolist() == [1, 0.25, 0]
    assert values[0].tolist() == [1, 0, 1, 1] and values[1, 2:].tolist() == [0, 1]


def test_each_image_is_judged_by_a_fold_without_its_figure(benchmark):
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=60).tolist()

    class Slices(list):
        pass

    slices = Slices(range(60))
    slices.labels, slices.patients = labels, [f"f{i // 2}" for i in range(60)]
    told = np.array(labels)[:, None] + rng.normal(0, 0.3, (60, 1))
    value, low, high = benchmark.judged(benchmark.in_folds(told, slices), slices)
    assert value == pytest.approx(roc_auc_score(labels, told[:, 0]), abs=0.05)
    assert low < value < high
    # a number that only names the figure helps nobody whose figure is in the test fold
    figure = np.eye(30)[np.arange(60) // 2]
    assert benchmark.judged(benchmark.in_folds(figure, slices), slices)[0] < 0.7
