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
    if [RESULT["segmenter"][key] for key in ("file", "sha256")] != list(shipped):
        warnings.warn(f"made with an earlier shipped segmenter; to renew: {command}", stacklevel=1)


def test_rows_agree_with_themselves(benchmark):
    rows = RESULT["regimes"]
    assert [row["regime"] for row in rows] == [*REGIMES, *REGIMES[1:], "heads"]
    assert [row["detector_lr"] is not None for row in rows] == [False] * 3 + [True] * 2 + [False]
    assert {row["epochs"] for row in rows[:5]} == {RESULT["training"]["epochs"]}
    preset = RESULT["preset"]
    model = covid_ct_mask_net(
        lesion_mask_rcnn(stored_config(DetectorConfig, preset["detector"])),
        stored_config(ClassifierConfig, preset["classifier"]),
    )
    for row in rows:
        counts = row["confusion"]
        right, total = sum(counts[k][k] for k in range(3)), sum(map(sum, counts))
        assert total == RESULT["test_slices"]
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
        assert row["lr"] == benchmark.best_rate(RESULT["pilot"], of_rate)
        if row["regime"] == "heads":  # the detector is untouched
            assert row["detection"]["box_ap50"] == pytest.approx(
                RESULT["detection_before"]["box_ap50"]
            )


def test_minus_heads_is_a_difference_on_the_same_slices(benchmark):
    class Test:
        labels, patients = [0, 1, 2, 2], ["a", "a", "b", "c"]

    rows = [{"predictions": "0100"}, {"predictions": "0122"}, {"predictions": "0100"}]
    assert benchmark.difference(rows[:1], Test, 0) is None
    assert benchmark.difference(rows[:2], Test, 0) == [0.5, 0.0, 1.0]
    assert benchmark.difference(rows, Test, 0) == [0, 0, 0]


def test_what_the_chapter_says_about_the_results():
    """The sentences below the table, in numbers: change both together."""
    heads, bn, full, gentle_bn, gentle_full, longer = RESULT["regimes"]
    assert bn["minus_heads"][1] < 0 < bn["minus_heads"][2]
    for row in (full, gentle_full, longer):
        assert row["minus_heads"][1] > 0
    assert abs(gentle_bn["minus_heads"][1]) < 0.005 < gentle_bn["minus_heads"][2]
    assert gentle_bn["accuracy"] - bn["accuracy"] > 0.03 > heads["accuracy"] - bn["accuracy"]
    assert abs(longer["accuracy"] - gentle_bn["accuracy"]) < 0.01
    best = max(row["accuracy"] for row in (heads, bn, gentle_bn, longer))
    assert min(full["accuracy"], gentle_full["accuracy"]) > best + 0.02
    before = RESULT["detection_before"]["box_ap50"]
    ap50 = [row["detection"]["box_ap50"] / before for row in RESULT["regimes"]]
    assert ap50[1] < 0.3 and ap50[2] < 0.3 and ap50[3] > 0.9 and ap50[4] < 0.5
