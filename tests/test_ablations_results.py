"""Chapter 11 shows the numbers of the results file."""

import importlib
import json
from pathlib import Path

import pytest
from tiny import warn_if_stale

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "results" / "ablations.json").read_text("utf-8"))


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
    assert RESULT["train_slices"] >= 3000 and RESULT["test_slices"] >= 600
    assert len(RESULT["seeds"]) >= 3
    trained = [entry for entry in RESULT["variants"] if entry["group"] != "Logistic regression"]
    assert [entry["name"] for entry in trained] == [variant.name for variant in benchmark.VARIANTS]
    for entry in trained:
        assert len(entry["accuracies"]) == len(RESULT["seeds"])
