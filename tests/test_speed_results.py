"""The page What makes it fast, chapter 6 and README.md show the files of results."""

import importlib
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPU, CUDA = (
    json.loads((ROOT / "results" / f"benchmarks{name}.json").read_text("utf-8"))
    for name in ("", "-cuda")
)
MODELS = ("ResNet-18 cut 1", "ResNet-50")


@pytest.fixture
def speed_page(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("speed_page")


@pytest.fixture
def copies(speed_page, monkeypatch, tmp_path):
    """`write` fills these instead; the files that it copies, by its names for them."""
    files = {name: getattr(speed_page, name) for name in ("PAGE", "README", "TWIN")}
    for name, file in files.items():
        (tmp_path / file.name).write_bytes(file.read_bytes())
        monkeypatch.setattr(speed_page, name, tmp_path / file.name)
    monkeypatch.setattr(speed_page, "FIGURE", tmp_path / "figure.svg")
    return files


def test_page_chapter_and_readme_show_the_files(speed_page, copies, tmp_path):
    figure = speed_page.FIGURE
    speed_page.write()
    for name, file in copies.items():
        shown = getattr(speed_page, name).read_text("utf-8")
        assert shown == file.read_text("utf-8"), (
            f"{file.name}: run `python benchmarks/speed.py --page`, then `make notebooks`"
        )
    stored = (ROOT / "book" / "_static" / "speed_ratios.svg").read_text("utf-8")
    for text in (stored, figure.read_text("utf-8")):
        shown = [element.text for element in ElementTree.fromstring(text).iter()]
        for row in speed_page.rows(CPU):
            assert speed_page.factor(row.values["ratio"]) in shown
        assert "aim" in shown and "Times faster than the baseline" in shown
    assert len(stored) < 100_000


def test_every_table_has_its_place(speed_page):
    page = speed_page.PAGE.read_text("utf-8")
    names = list(speed_page.page_tables(CPU, CUDA))
    assert [line for line in page.splitlines() if line.startswith("<!--")] == [
        mark for name in names for mark in (f"<!-- {name} -->", f"<!-- /{name} -->")
    ]
    for lines in speed_page.page_tables(CPU, CUDA).values():
        cells = {line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}
        assert len(cells) == 1 and len(lines) >= 4


def test_results_name_their_origin_and_agree_with_themselves(speed_page):
    for result in (CPU, CUDA):
        for key in ("command", "commit", "hardware", "processor", "date", "torch", "threads"):
            assert result[key], key
        assert result["scale"] == "full"
        for row in speed_page.rows(result):
            values = row.values
            assert values["ratio"] == pytest.approx(values["baseline"] / values["ours"]), row.work
            if "runs" in values:
                assert len(values["runs"]["ours"]) == len(values["runs"]["baseline"])
    for name in MODELS:
        gradients = CPU["32-true"][name]["gradients"]
        assert gradients["same_layout"] < 1e-5
        assert gradients["loss_same_layout"] == pytest.approx(gradients["loss"], rel=1e-6)


def test_what_the_page_says_of_the_tables_holds_in_them(speed_page):
    """Change both together."""
    page = speed_page.PAGE.read_text("utf-8")
    rows = speed_page.rows(CPU)
    assert "All of them meet the least" in page
    assert all(row.values["ratio"] >= row.least for row in rows if row.least)
    exact = CPU["32-true"]
    assert "48 slices, $S$ from two epochs" in page
    for name in MODELS:
        heads = exact[name]["heads_only"]
        assert speed_page.factor(heads["ratio_to_uncached_no_grad"]) in page
        assert heads["measured"]["ranked_slices"] == 48 and heads["measured"]["epochs"] == 2
        assert heads["measured"]["rows"] == heads["slices"]
        boxes = exact[name]["inference"]["boxes"]
        assert f"N = {boxes}" in page
    assert "Three of four lie within 25 %; inference of ResNet-50 does not" in page
    far = [
        (name, work)
        for name, released in CPU["released_code_seconds"].items()
        for work, then, now in zip(
            ("inference", "step"),
            released,
            (exact[name]["inference"]["baseline"], exact[name]["step"]["heads_bn"]["baseline"]),
            strict=True,
        )
        if abs(now / then - 1) > 0.25
    ]
    assert far == [("ResNet-50", "inference")]
    small = exact[MODELS[0]]["inference"]
    assert small["logits_difference_same_order"] < 1e-4
    assert f"on {CPU['trained']['slices']} test phantoms" in page
    assert f"an\naccuracy of {CPU['trained']['accuracy_baseline']:.3f}" in page.replace(
        "an accuracy", "an\naccuracy"
    )
    assert "Ours is below in all" in page
    for name in MODELS:
        for peak in exact[name]["peak_megabytes"].values():
            assert peak["ours"] < peak["baseline"]
        single = exact[name]["inference"]
        assert single["one by one"] < single["ours"]  # batching alone
    for key in ("n_boxes", "slices"):
        first, last = CPU["growth"][key][0], CPU["growth"][key][-1]
        assert last["seconds"] / first["seconds"] < 1.1 * last["x"] / first["x"]


def test_what_the_page_says_of_a_gpu_holds_in_its_tables(speed_page):
    page = speed_page.PAGE.read_text("utf-8")
    missed = [r for r in speed_page.rows(CUDA) if r.least and r.values["ratio"] < r.least]
    assert [(row.short, row.model) for row in missed] == [("heads + BN, bf16", "ResNet-50")]
    said = " ".join(page.split())
    assert "heads + BN, step of 8, bfloat16, ResNet-50, is 2.74x and not 8x" in said
    assert speed_page.factor(missed[0].values["ratio"]) == "2.74x"
    large = CUDA["32-true"]["ResNet-50"]
    rpn = large["stages"]["RPN"]
    assert f"{100 * rpn['seconds'] / large['inference']['ours']:.0f} % of our inference" in said
    assert f"at {100 * rpn['share_of_roofline']:.0f} % of its roofline" in said
    above = [
        (name, regime)
        for name in MODELS
        for regime, peak in CUDA["32-true"][name]["peak_megabytes"].items()
        if peak["ours"] > peak["baseline"]
    ]
    assert above == [("ResNet-50", "heads_bn"), ("ResNet-50", "full")]
    assert "above the baseline in: heads + BN, ResNet-50; full, ResNet-50." in said
    assert CUDA["not_measured"] in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0123, "12 ms"), (0.62, "0.62 s"), (18.2, "18 s"), (600, "10 min"), (20_000, "5.6 h"),
     (341_250, "3.9 days"), (0, "0 ms")],
)  # fmt: skip
def test_durations(speed_page, seconds, said):
    assert speed_page.duration(seconds) == said
