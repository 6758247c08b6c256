"""Chapter 8 shows the results of benchmarks/regimes.py, and the file says where they came from."""

import importlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from tiny import stored_config, warn_if_stale

from covidmask.config import ClassifierConfig, DetectorConfig
from covidmask.models.classifier import REGIMES, count_trainable, covid_ct_mask_net, set_regime
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import ShippedWeights

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "results" / "regimes.json").read_text(encoding="utf-8"))


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it imports its neighbour
    return importlib.import_module("regimes")


def test_chapter_shows_the_results_file(benchmark, tmp_path):
    table = benchmark.markdown(RESULT)
    copy = tmp_path / "twin.py"
    copy.write_bytes(benchmark.TWIN.read_bytes())
    benchmark.common.fill(copy, "regimes", table)
    assert copy.read_text("utf-8") == benchmark.TWIN.read_text("utf-8"), (
        "run `python benchmarks/regimes.py --page`, then `make notebooks`"
    )
    notebook = ROOT / "book" / "08_three_regimes.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert any(table in "".join(cell["source"]) for cell in cells)


def test_filling_the_chapter_twice_changes_nothing(benchmark, tmp_path):
    start, end = "# <!-- regimes -->", "# <!-- /regimes -->"
    twin = tmp_path / "twin.py"
    twin.write_text(f"# before\n{start}\n# old\n{end}\n# after\n", encoding="utf-8")
    for _ in range(2):
        benchmark.common.fill(twin, "regimes", "| new |\n\ntext")
        expected = f"# before\n{start}\n# | new |\n#\n# text\n{end}\n# after\n"
        assert twin.read_text(encoding="utf-8") == expected


def test_results_name_their_origin():
    for key in ("command", "commit", "hardware", "date", "torch", "torchvision", "generator"):
        assert RESULT[key], key
    command = "python benchmarks/regimes.py"
    used = ("phantoms", "detector", "classifier", "classifier_training", "min_area")
    warn_if_stale(RESULT, used, command)
    if RESULT["segmenter"] != list(ShippedWeights.SEGMENTER_QUICK.value):
        warnings.warn(f"made with an earlier shipped segmenter; to renew: {command}", stacklevel=1)


def test_runs_agree_with_themselves(benchmark):
    preset, pilots = RESULT["preset"], benchmark.pilots(RESULT)
    model = covid_ct_mask_net(
        lesion_mask_rcnn(stored_config(DetectorConfig, preset["detector"])),
        stored_config(ClassifierConfig, preset["classifier"]),
    )
    for row in (part for name, part in RESULT["parts"].items() if name.startswith("run")):
        counts = row["confusion"]
        right, total = sum(counts[k][k] for k in range(3)), sum(map(sum, counts))
        assert total == len(row["predictions"]) == len(RESULT["test_labels"])
        assert row["accuracy"] == pytest.approx(right / total)
        for k in range(3):
            assert row["sensitivity"][k] == pytest.approx(counts[k][k] / sum(counts[k]))
        low, high = row["accuracy_by_patient"]
        assert low <= row["accuracy"] <= high
        set_regime(model, row["regime"])
        assert row["parameters"] == count_trainable(model)
        accuracies = row["validation_accuracy_of_epoch"]
        assert len(accuracies) == row["epochs"]
        assert accuracies[row["best_epoch"] - 1] == max(accuracies)
        of_rate = "heads" if row["detector_lr"] else row["regime"]
        assert row["lr"] == benchmark.best_rate(pilots, of_rate)
        if row["regime"] == "heads":  # the detector is untouched
            before = RESULT["parts"]["before"]["box_ap50"]
            assert row["detection"]["box_ap50"] == pytest.approx(before)


def test_rows_are_means_of_seeds(benchmark):
    rows = benchmark.summary(RESULT)
    assert [row["regime"] for row in rows] == [*REGIMES, *REGIMES[1:], "heads"]
    assert [row["detector_lr"] is not None for row in rows] == [False] * 3 + [True] * 2 + [False]
    assert {row["epochs"] for row in rows[:5]} == {RESULT["epochs"]}
    for row in rows:
        assert row["accuracy"] == pytest.approx(np.mean([one["accuracy"] for one in row["seeds"]]))
        assert len(row["seeds"]) == len(rows[0]["seeds"])


def test_minus_heads_is_a_difference_on_the_same_slices(benchmark):
    def run(regime, epochs, *predictions):
        report = {
            "accuracy": 0,
            "sensitivity": [0] * 3,
            "ppv": [0] * 3,
            "lr": 1,
            "detector_lr": None,
        }
        report |= {"regime": regime, "epochs": epochs, "detection": {"box_ap50": 0}}
        return [report | {"seed": s, "predictions": p} for s, p in enumerate(predictions)]

    runs = run("full", 1, "0122", "0102") + run("heads", 2, "0122", "0122")
    runs += run("heads", 1, "0100", "0100")
    parts = {f"run {i}": row for i, row in enumerate(runs)}
    rows = benchmark.summary(
        {"epochs": 1, "test_labels": "0122", "test_patients": "a a b c", "parts": parts}
    )
    assert [row["regime"] for row in rows] == ["heads", "full", "heads"]
    assert [row["minus_heads"][0] for row in rows] == [0, 0.375, 0.5]
    assert rows[2]["minus_heads"] == [0.5, 0.0, 1.0]
    assert [row["minus_longer"][0] for row in rows] == [-0.5, -0.125, 0]
