"""The page What makes it fast, chapter 6 and README.md show the file of results."""

import copy
import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODELS = ("ResNet-18 cut 1", "ResNet-50")


def module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def speed_page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # it imports its neighbours
    return module("speed_page")


@pytest.fixture
def result(speed_page):
    found = speed_page.load(ROOT)
    if found is None:
        pytest.skip("not measured: run `python benchmarks/speed.py`")
    return found


def made_up(device="cpu"):
    """Numbers that no machine measured, in the form of the file."""
    times = {"baseline": 8.0, "ours": 2.0, "ratio": 4.0}
    timed = {**times, "ratio_lowest_highest": [3.0, 5.0], "repeats": 5, "runs": {}}
    change = {"mean": 1e-6, "median": 1e-6, "max": 2e-6}
    stage = {"seconds": 0.1, "gflops": 10.0, "megabytes": 50.0, "share_of_roofline": 0.5}
    one = {
        "inference": {
            **timed, "one by one": 2.5, "slices": 8, "logits_difference_same_order": 3e-5,
            "order_changed_slices": 1, "probability_change": change, "boxes_changed": 1.5,
            "boxes": 128,
        },
        "stages": {
            "peak_flops": 1e11, "peak_bytes": 1e10, "backbone": stage, "RPN": stage,
            "RoIAlign and box head": stage,
        },
        "step": {"heads_bn": timed, "full": timed},
        "heads_only": {
            **times, "ratio_to_uncached_no_grad": 40.0, "slices": 3000, "epochs": 50,
            "measured": {"ranked_slices": 48, "rows": 3000, "epochs": 2, "repeats": 3},
        },
        "ap": {**timed, "slices": 10, "thresholds": 10},
        "peak_megabytes": {
            regime: {"baseline": 900.0, "ours": 300.0} for regime in ("heads_bn", "full")
        },
        "gradients": {
            "loss": 1.0, "loss_same_layout": 1.0 + 1e-7, "same_layout": 2e-6, "as_trained": 3e-6
        },
        "tried": {
            "milliseconds": {
                "backbone, as torchvision has it": 30.0, "backbone, both (in use)": 20.0
            },
            "compile_seconds": None,
        },
        "batches": [{"batch": 8, "seconds_a_slice": 0.01, "megabytes": 4000.0}],
        "waiting": {"memory, 0 workers": 0.01},
    }  # fmt: skip
    precision = {name: copy.deepcopy(one) for name in MODELS}
    judged = {"accuracy": 0.8, "predictions_changed": 3, "probability_change": change}
    points = [{"x": x, "seconds": 0.1 * x**0.9, "megabytes": 10.0 + x} for x in (16, 64, 256)]
    found = {
        "command": f"python benchmarks/speed.py --device {device}", "commit": "0000000",
        "date": "2000-01-01", "hardware": "made up", "processor": "made up", "threads": 2,
        "torch": "0", "minutes": 30.0, "released_code_seconds": {n: [8.1, 7.9] for n in MODELS},
        "32-true": precision, "bf16-mixed": copy.deepcopy(precision),
        "reading": {
            "file": 0.004, "memory": 0.0001, "kilobytes_a_slice": 262.1,
            "share_of_a_step_from_file": 0.01, "share_of_inference_from_file": 0.03,
            "share_of_inference_from_memory": 0.001,
        },
        "growth": {"model": MODELS[0], **{k: points for k in ("side", "n_boxes", "slices")}},
        "trained": {
            "slices": 600, "accuracy_baseline": 0.8, "32-true": judged, "bf16-mixed": judged
        },
    }  # fmt: skip
    return json.loads(json.dumps(found))  # no part is the same object as another


def test_page_and_figures_show_the_file(speed_page):
    expected = speed_page.files(speed_page.load(ROOT), speed_page.load(ROOT, "cuda"))
    for name, text in expected.items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, (
            f"{name}: run `python benchmarks/speed.py --page`"
        )


def test_chapter_and_readme_show_the_file(speed_page, result):
    wanted = speed_page.readme_text(result, speed_page.load(ROOT, "cuda"))
    twin = (ROOT / "book" / "py" / "06_three_regimes.py").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text, marks, content in (
        (twin, speed_page.TABLE_MARKS, speed_page.commented(speed_page.chapter_table(result))),
        (twin, speed_page.CODE_MARKS, speed_page.chapter_code(result)),
        (readme, speed_page.README_MARKS, wanted),
    ):
        assert f"{marks[0]}\n{content}\n{marks[1]}\n" in text, (
            "run `python benchmarks/speed.py --page`, then `make notebooks`"
        )


def test_results_name_their_origin_and_agree_with_themselves(speed_page, result):
    for key in ("command", "commit", "hardware", "processor", "date", "torch", "threads"):
        assert result[key], key
    assert result["scale"] == "full"
    for row in speed_page.rows(result):
        values = row.values
        assert values["ratio"] == pytest.approx(values["baseline"] / values["ours"]), row.work
        if "runs" in values:
            assert len(values["runs"]["ours"]) == len(values["runs"]["baseline"])
    for name in MODELS:
        gradients = result["32-true"][name]["gradients"]
        assert gradients["same_layout"] < 1e-5
        assert gradients["loss_same_layout"] == pytest.approx(gradients["loss"], rel=1e-5)
        for peak in result["32-true"][name]["peak_megabytes"].values():
            assert peak["ours"] <= peak["baseline"]
    small = result["32-true"][MODELS[0]]["inference"]
    assert small["logits_difference_same_order"] < 1e-4


def test_page_says_what_fell_short(speed_page):
    good = made_up()
    for name in MODELS:
        for values in (good["32-true"][name]["heads_only"], good["32-true"][name]["ap"]):
            values["ratio"] = 300.0
    text = speed_page.page(good, None)
    assert "All of them meet" in text and "All lie within 25%" in text
    assert "Ours is below in all." in text and "nothing grows worse than linearly" in text
    bad = copy.deepcopy(good)
    large = bad["32-true"]["ResNet-50"]
    large["step"]["full"]["ratio"] = 1.1
    large["inference"]["baseline"] = 20.0
    large["peak_megabytes"]["full"]["ours"] = 1000.0
    bad["growth"]["n_boxes"] = [
        {"x": 16, "seconds": 1.0, "megabytes": 1.0},
        {"x": 64, "seconds": 9.0, "megabytes": 1.0},
    ]
    text = speed_page.page(bad, None)
    assert "not: full, step of 8, ResNet-50." in text
    assert "differ by more than 25% (inference of a slice, ResNet-50)" in text
    assert "ResNet-50: 0.33 s then, 30 ms here" in text
    assert "Ours is above the baseline in: full, ResNet-50." in text
    assert "Worse than linear: N." in text


def test_page_without_a_gpu_and_with_one(speed_page):
    text = speed_page.page(made_up(), None)
    assert "Not measured" in text and f"    {speed_page.COMMANDS['cuda']}\n" in text
    text = speed_page.page(made_up(), made_up("cuda"))
    assert "no GPU was at hand" not in text and "results/benchmarks-cuda.json" in text
    assert "heads + BN, step of 8, bfloat16" in text and "waits for slices" in text
    assert "bfloat16, ResNet-50, is 4x and not 8x" in text and "Not measured:" not in text
    stopped = made_up("cuda")
    stopped["not_measured"] = "batches of ResNet-18"
    for part in ("batches", "waiting", "heads_only"):
        del stopped["bf16-mixed"][MODELS[0]][part]
    text = speed_page.page(made_up(), stopped)
    assert text.endswith("Not measured: batches of ResNet-18.\n")
    assert text.count("| ResNet-18 cut 1 | float32 | 8 | 10 ms |") == 1
    assert "| ResNet-18 cut 1 | bfloat16 | 8 |" not in text
    readme = speed_page.readme_text(made_up(), made_up("cuda"))
    assert "On a GPU (made up) *heads* is 4x (ResNet-18) and 4x (ResNet-50) as fast" in readme
    assert "GPU" not in speed_page.readme_text(made_up(), None)


def test_figures_are_pictures_that_say_what_they_show(speed_page):
    result = made_up()
    for name, text in speed_page.files(result, None).items():
        assert text == speed_page.files(result, None)[name]  # the same text each time
        if not name.endswith(".svg"):
            continue
        root = ElementTree.fromstring(text)
        width, height = map(float, root.get("viewBox").split()[2:])
        for element in root.iter():
            x, y = float(element.get("x", 0)), float(element.get("y", 0))
            assert 0 <= x <= width and 0 <= y <= height, element.attrib
        described = root.find("{http://www.w3.org/2000/svg}desc").text
        assert len(described) > 100
    shown = [
        e.text
        for e in ElementTree.fromstring(speed_page.ratio_figure(speed_page.rows(result))).iter()
    ]
    assert shown.count("4x") == len(speed_page.rows(result))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0123, "12 ms"), (0.62, "0.62 s"), (18.2, "18 s"), (600, "10 min"), (20_000, "5.6 h"),
     (341_250, "3.9 days"), (0, "0 ms")],
)  # fmt: skip
def test_durations(speed_page, seconds, said):
    assert speed_page.duration(seconds) == said


def test_filling_twice_changes_nothing(speed_page, tmp_path):
    file = tmp_path / "file"
    file.write_text("a\n<s>\nold\n</s>\nb\n", encoding="utf-8")
    for _ in range(2):
        speed_page.fill(file, ("<s>", "</s>"), "new\n\nlines")
        assert file.read_text(encoding="utf-8") == "a\n<s>\nnew\n\nlines\n</s>\nb\n"
