"""The numbers of README.md are those of the results file, and the file says where it came from."""

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

from tiny import has_settings

from covidmask.config import PRESETS

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "results" / "quick_preset.json").read_text())


def test_readme_shows_the_results_file(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it imports its neighbour
    path = ROOT / "benchmarks" / "quick_preset.py"
    spec = importlib.util.spec_from_file_location("quick_preset", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.markdown(RESULT) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_results_name_their_origin_and_belong_to_the_preset():
    for key in ("command", "commit", "hardware", "date", "torch", "torchvision"):
        assert RESULT[key], key
    assert has_settings(asdict(PRESETS["quick"]), RESULT["preset"]), (
        "the preset has changed since: run benchmarks/quick_preset.py again"
    )


def test_quick_preset_reached_its_targets():
    assert len(RESULT["seeds"]) >= 3
    for row in RESULT["seeds"]:
        assert row["lesion_test_slices"] >= 300 and row["class_test_slices"] >= 300
        assert row["mask_ap50"] >= 0.75 and row["mask_ap"] >= 0.38
        assert 0.75 <= row["accuracy"] <= 0.95
        assert row["accuracy_random_detector"] <= 0.45
        assert row["seconds_total"] <= 360
    assert RESULT["threshold_detector"]["mask_ap50"] < 0.5
