"""The numbers of README.md are those of the results file, and the file says where it came from."""

import importlib
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny import warn_if_stale

from covidmask.config import PRESETS

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "results" / "quick_preset.json").read_text("utf-8"))


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it imports its neighbour
    return importlib.import_module("quick_preset")


def test_readme_shows_the_results_file(benchmark):
    assert benchmark.markdown(RESULT) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_results_of_code_that_is_in_no_commit(benchmark, monkeypatch, tmp_path):
    (tmp_path / "covidmask").mkdir()
    code, page = tmp_path / "covidmask" / "code.py", tmp_path / "README.md"
    sums = tmp_path / "covidmask" / "models" / "weights.py"
    sums.parent.mkdir()
    sums.write_text(f'x = 1\n    "{"a" * 64}",\n', encoding="utf-8")
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for file in (code, page):
        file.write_text("1\n", encoding="utf-8")
    for words in (("init", "-q"), ("add", "-A"), (*who, "commit", "-qm", "test")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    common = sys.modules["common"]
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.delenv("ALLOW_DIRTY", raising=False)
    page.write_text("2\n", encoding="utf-8")  # filled by another benchmark
    assert "dirty" not in common.environment()["commit"]
    sums.write_text(f'x = 1\n    "{"b" * 64}",\n', encoding="utf-8")  # by `make results`
    assert "dirty" not in common.environment()["commit"]
    sums.write_text(f'x = 2\n    "{"b" * 64}",\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="in no commit: commit them"):
        common.environment()
    sums.write_text(f'x = 1\n    "{"a" * 64}",\n', encoding="utf-8")
    code.write_text("2\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="in no commit: commit them"):
        common.environment()
    monkeypatch.setenv("ALLOW_DIRTY", "1")
    assert common.environment()["commit"].endswith("-dirty")


def test_results_name_their_origin():
    for key in ("command", "commit", "hardware", "date", "torch", "torchvision", "generator"):
        assert RESULT[key], key
    used = ("phantoms", "detector", "segmenter", "classifier", "classifier_training", "min_area")
    warn_if_stale(RESULT, used, "make bench")


def test_an_edit_of_a_preset_asks_for_no_rerun():
    now = json.loads(json.dumps(asdict(PRESETS["quick"])))
    preset = now | {"classifier": now["classifier"] | {"hidden": 7}, "min_area": 1}
    with pytest.warns(UserWarning, match=r"\(classifier.hidden, min_area\); to renew: make bench"):
        warn_if_stale({"preset": preset}, ("classifier", "min_area"), "make bench")
    assert warn_if_stale({"preset": preset}, ("detector", "segmenter"), "make bench") == []


def test_quick_preset_learns_what_the_readme_says():
    # AP50 and accuracy of 0.75 are the aim, which the README says is not reached
    seeds = [part for name, part in RESULT["parts"].items() if name.startswith("seed")]
    assert len(seeds) >= 3
    for row in seeds:
        assert row["lesion_test_slices"] >= 300 and row["class_test_slices"] >= 300
        assert row["mask_ap50"] >= 0.7 and row["mask_ap"] >= 0.33
        assert 0.72 <= row["accuracy"] <= 0.95
        assert row["accuracy"] > row["few_boxes"]["accuracy"] + 0.01  # N = 32 is worth more than 2
        assert row["accuracy_random_detector"] <= 0.45
        assert row["core_seconds_total"] <= 720
        if ordinary := RESULT["parts"].get(f"ordinary {row['seed']}"):
            assert 0.5 < ordinary["core_seconds"] / row["core_seconds_total"] < 2  # about the same
    assert RESULT["parts"]["threshold detector"]["mask_ap50"] < 0.5
