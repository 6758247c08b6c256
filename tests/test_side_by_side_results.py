"""Chapters 12 and 16 show the results of benchmarks/side_by_side.py; each row can be made."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = {
    name: json.loads((ROOT / "results" / f"side_by_side_{name}.json").read_text("utf-8"))
    for name in ("phantoms", "covid_ct")
    if (ROOT / "results" / f"side_by_side_{name}.json").exists()
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it imports its neighbour
    return importlib.import_module("side_by_side")


@pytest.mark.parametrize("name", list(RESULTS))
def test_the_chapter_shows_the_results_files(benchmark, name, tmp_path, monkeypatch):
    copies = {key: tmp_path / twin.name for key, twin in benchmark.TWIN.items()}
    for key, twin in benchmark.TWIN.items():
        copies[key].write_bytes(twin.read_bytes())
    monkeypatch.setattr(benchmark, "TWIN", copies)
    benchmark.page()
    copy = copies[name]
    same = copy.read_text("utf-8") == (ROOT / "book" / "py" / copy.name).read_text("utf-8")
    assert same, "run `python benchmarks/side_by_side.py page`, then `make notebooks`"
    for key in ("command", "commit", "hardware", "date", "torch", "generator"):
        assert RESULTS[name][key], key
    assert "dirty" not in RESULTS[name]["commit"]


def test_a_row_of_few_slices_sees_as_many_as_one_of_many(benchmark):
    for slices in (90, 900, 3000):
        budget = benchmark.budget(benchmark.common.QUICK, slices, 64, None)
        assert budget.training.epochs * slices == pytest.approx(benchmark.LOOKS, rel=0.01)
        assert budget.s_training.epochs * slices == pytest.approx(benchmark.S_LOOKS, rel=0.01)
    tuned = benchmark.budget(benchmark.common.QUICK, 900, 64, "IMAGENET1K_V1")
    rates = tuned.training.lr * tuned.gentle, budget.training.lr
    assert rates[0] < rates[1]  # what knows something already is changed more gently
