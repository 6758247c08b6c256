"""Chapter 6 shows the results of benchmarks/regimes.py, and the file says where they came from."""

import importlib
import json
import warnings
from pathlib import Path

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
    notebook = ROOT / "book" / "06_three_regimes.ipynb"
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
    for key in ("command", "commit", "hardware", "date", "torch", "torchvision", "threads"):
        assert RESULT[key], key
    command = "python benchmarks/regimes.py"
    used = ("phantoms", "detector", "classifier", "classifier_training", "min_area")
    warn_if_stale(RESULT, used, command)
    shipped = ShippedWeights.SEGMENTER_QUICK.value
    if RESULT["segmenter"] != list(shipped):
        warnings.warn(f"made with an earlier shipped segmenter; to renew: {command}", stacklevel=1)


def test_rows_agree_with_themselves(benchmark):
    rows = benchmark.summary(RESULT)
    assert [row["regime"] for row in rows] == [*REGIMES, *REGIMES[1:], "heads"]
    assert [row["detector_lr"] is not None for row in rows] == [False] * 3 + [True] * 2 + [False]
    assert {row["epochs"] for row in rows[:5]} == {RESULT["epochs"]}
    preset = RESULT["preset"]
    model = covid_ct_mask_net(
        lesion_mask_rcnn(stored_config(DetectorConfig, preset["detector"])),
        stored_config(ClassifierConfig, preset["classifier"]),
    )
    for row in rows:
        low, high = row["accuracy_by_patient"]
        assert low <= row["accuracy"] <= high
        of_rate = "heads" if row["detector_lr"] else row["regime"]
        assert row["lr"] == benchmark.best_rate(benchmark.pilots(RESULT), of_rate)
        set_regime(model, row["regime"])
        for seed in row["seeds"]:
            counts = seed["confusion"]
            assert sum(map(sum, counts)) == len(RESULT["test_labels"])
            right = sum(counts[k][k] for k in range(3))
            assert seed["accuracy"] == pytest.approx(right / len(RESULT["test_labels"]))
            for k in range(3):
                assert seed["sensitivity"][k] == pytest.approx(counts[k][k] / sum(counts[k]))
            assert seed["parameters"] == count_trainable(model)
            accuracies = seed["validation_accuracy_of_epoch"]
            assert len(accuracies) == row["epochs"]
            assert accuracies[seed["best_epoch"] - 1] == max(accuracies)
            if row["regime"] == "heads":  # the detector is untouched
                before = RESULT["parts"]["before"]["box_ap50"]
                assert seed["detection"]["box_ap50"] == pytest.approx(before)


def test_minus_heads_is_a_difference_on_the_same_slices(benchmark):
    shared = {"seed": 0, "lr": 1, "detection": {"box_ap50": 0}}
    shared |= dict.fromkeys(("accuracy", "sensitivity", "ppv"), 0)
    runs = (("heads", 1, None, "0100"), ("full", 1, None, "0122"), ("full", 1, 0.1, "0100"))
    parts = {
        f"run {number}": shared
        | {"regime": regime, "epochs": epochs, "detector_lr": gentle, "predictions": predictions}
        for number, (regime, epochs, gentle, predictions) in enumerate(runs)
    }
    result = {"parts": parts, "epochs": 1, "test_labels": "0122", "test_patients": "a a b c"}
    assert [row["minus_heads"] for row in benchmark.summary(result)] == [
        [0, 0, 0],
        [0.5, 0, 1],
        [0, 0, 0],
    ]
