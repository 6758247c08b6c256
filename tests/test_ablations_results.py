"""Chapter 8 shows the numbers of the results file, and its claims about them hold there."""

import importlib
import json
from pathlib import Path

import pytest
from tiny import warn_if_stale

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "results" / "ablations.json").read_text("utf-8"))
BY_NAME = {entry["name"]: entry for entry in RESULT["variants"]}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it imports from its neighbour
    return importlib.import_module("ablations")


def test_chapter_shows_the_results_file(benchmark, tmp_path):
    copy = tmp_path / "twin.py"
    copy.write_bytes(benchmark.TWIN.read_bytes())
    benchmark.common.fill(copy, "ablations", benchmark.markdown(RESULT))
    assert copy.read_bytes() == benchmark.TWIN.read_bytes()


def test_results_name_their_origin_and_all_parts_are_there(benchmark):
    for key in ("command", "commit", "hardware", "date", "torch", "torchvision", "generator"):
        assert RESULT[key], key
    assert "ablations.py" in RESULT["command"]
    used = ("phantoms", "detector", "classifier", "classifier_training", "min_area")
    warn_if_stale(RESULT, used, "python benchmarks/ablations.py")
    assert RESULT["train_slices"] >= 3000 and RESULT["test_slices"] == 600
    assert len(RESULT["seeds"]) >= 3
    trained = [entry for entry in RESULT["variants"] if entry["group"] != "Logistic regression"]
    assert [entry["name"] for entry in trained] == [variant.name for variant in benchmark.VARIANTS]
    for entry in trained:
        assert len(entry["accuracies"]) == len(RESULT["seeds"])


def test_what_the_chapter_says_of_the_table_holds_in_it():
    def mean(name):
        return BY_NAME[name]["mean"]

    def clear_of_zero(name):
        low, high = BY_NAME[name]["difference_interval"]
        return low > 0 or high < 0

    full = mean("score and deltas, N = 32, NMS 0.75")
    assert mean("N = 1") < mean("N = 2") - 0.04  # few boxes, but more than one
    assert all(abs(mean(f"N = {n}") - full) < 0.03 for n in (2, 4, 8, 16))
    assert mean("N = 64") < mean("N = 16")  # while it fits the training slices better
    assert BY_NAME["N = 64"]["mean_train"] > BY_NAME["N = 2"]["mean_train"] + 0.05
    assert full > mean("scores alone") > mean("deltas alone") >= mean("ranks shuffled") - 0.01
    assert not clear_of_zero("scores alone") and clear_of_zero("ranks shuffled")
    assert not clear_of_zero("score above 0.05 only, then padded")
    for setting in ("NMS 0.25", "no NMS"):
        assert mean(f"N = 32, {setting}") > full and clear_of_zero(f"N = 32, {setting}")
    assert mean("N = 2, NMS 0.25") > mean("N = 32, NMS 0.25") - 0.02  # one rank, one lesion
    assert mean("N = 16, no NMS") > mean("N = 2, no NMS") + 0.04  # copies need room
    for setting, base in (
        ("NMS 0.75", full),
        ("NMS 0.25", mean("N = 32, NMS 0.25")),
        ("no NMS", mean("N = 32, no NMS")),
    ):
        for wider in ("+ lesion class", "place instead of deltas"):
            assert mean(f"{wider}, {setting}") < base + 0.02
        name = "best score and count of each lesion class"
        plain = mean(f"best score and count, {setting}")
        assert mean(f"{name}, {setting}") > plain  # the rule does use the class
    best = max(entry["mean"] for entry in RESULT["variants"] if entry["n"])
    rule = mean("best score and count of each lesion class, no NMS")
    assert rule > best - 0.02
    assert mean("true areas and counts") > best + 0.02
    assert mean("S without hidden layers") < full - 0.05
    assert mean("S without hidden layers, no NMS") > mean("N = 32, no NMS") - 0.04
    assert mean("detector with random weights") < 0.45
