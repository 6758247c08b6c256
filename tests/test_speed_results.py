"""The page What makes it fast, chapter 9 and README.md show the files of results."""

import importlib
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPU, CUDA = (
    json.loads((ROOT / "results" / f"benchmarks{name}.json").read_text("utf-8"))
    for name in ("", "-cuda")
)
MODELS = ("ResNet-18 cut 1", "ResNet-50")
PAGE = (ROOT / "book" / "fast.md").read_text("utf-8")
SAID = " ".join(PAGE.split())
ONCE = [(CPU, "80492a5"), (CUDA, "9414020")]  # the commits whose numbers stand in unmarked tables


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("speed")


def test_page_chapter_and_readme_show_the_files(speed, monkeypatch, tmp_path):
    files = {name: getattr(speed, name) for name in ("PAGE", "README", "TWIN")}
    for name, file in files.items():  # `write` fills copies
        (tmp_path / file.name).write_bytes(file.read_bytes())
        monkeypatch.setattr(speed, name, tmp_path / file.name)
    speed.write()
    for file in files.values():
        assert (tmp_path / file.name).read_text("utf-8") == file.read_text("utf-8"), (
            f"{file.name}: run `python benchmarks/speed.py --page`, then `make notebooks`"
        )


def cells(line):
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def test_tables_are_whole_and_filled():
    tables = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    assert len(tables) == 15
    for lines in (table.splitlines() for table in tables):
        assert len(lines) >= 4 and len({len(cells(line)) for line in lines}) == 1
        assert all(all(cells(line)) for line in lines), lines


def leaves(value):
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    elif isinstance(value, int | float):
        yield value


once = pytest.mark.skipif(
    not all(result["commit"].startswith(commit) for result, commit in ONCE),
    reason="the results are of a later commit than the tables of what was measured once",
)


@once
def test_what_was_measured_once_is_in_the_files_too(speed):
    """The figure and every number of the tables that nothing fills."""
    values = [*leaves(CPU), *leaves(CUDA)]
    known = {speed.number(v) for v in [*values, *(1000 * v for v in values)]}
    known |= {f"{v:.1e}" for v in values}
    unmarked = re.sub(r"<!-- (.*) -->(.|\n)*?<!-- /\1 -->", "", PAGE)
    shown = [cell for line in unmarked.splitlines() if line[:1] == "|" for cell in cells(line)]
    numbers = [cell for cell in shown if re.fullmatch(r"[\d.,]+(e[+-]\d+)?", cell)]
    assert len(numbers) > 200
    assert set(numbers) - known == set()
    for result, commit in ONCE:
        assert result["commit"].startswith(commit) and f"at commit {commit}, by the" in SAID
    drawn = ElementTree.parse(ROOT / "book" / "_static" / "speed_ratios.svg").iter()
    texts = [element.text for element in drawn]
    assert "aim" in texts and "Times faster than the baseline" in texts
    for *_, values in speed.timed(CPU):
        assert f"{values['ratio']:.3g}x" in texts


@once
def test_what_the_page_says_of_numbers_and_memory_holds_in_the_files():
    exact = CPU["32-true"]
    for name in MODELS:
        gradients = CPU["32-true"][name]["gradients"]
        assert gradients["same_layout"] < 1e-5
        assert gradients["loss_same_layout"] == pytest.approx(gradients["loss"], rel=1e-6)
    assert exact[MODELS[0]]["inference"]["logits_difference_same_order"] < 1e-4
    assert f"on {CPU['trained']['slices']} test phantoms" in SAID
    assert f"an accuracy of {CPU['trained']['accuracy_baseline']:.3f}" in SAID
    assert "Ours is below in all" in SAID
    for name in MODELS:
        for peak in exact[name]["peak_megabytes"].values():
            assert peak["ours"] < peak["baseline"]
    above = [
        (name, regime)
        for name in MODELS
        for regime, peak in CUDA["32-true"][name]["peak_megabytes"].items()
        if peak["ours"] > peak["baseline"]
    ]
    assert above == [("ResNet-50", "heads_bn"), ("ResNet-50", "full")]
    assert "above the baseline in: heads + BN, ResNet-50; full, ResNet-50." in SAID
    assert CUDA["not_measured"] in SAID


def test_results_name_their_origin_and_agree_with_themselves(speed):
    for result in (CPU, CUDA):
        for key in ("command", "commit", "hardware", "processor", "date", "torch", "threads"):
            assert result[key], key
        assert result["scale"] == "full"
        for work, _, values in speed.timed(result):
            assert values["ratio"] == pytest.approx(values["baseline"] / values["ours"]), work
            if "runs" in values:
                assert len(values["runs"]["ours"]) == len(values["runs"]["baseline"])
            if work.startswith("heads, "):
                assert f"{values['slices']:,} slices x {values['epochs']} epochs" in work
            if work.startswith("AP"):
                assert f"{values['thresholds']} thresholds, {values['slices']} slices" in work


def test_what_the_page_says_of_the_tables_holds_in_them(speed):
    """Change both together."""
    assert "All of them meet the least" in SAID
    asked = {line[0]: line[1:] for line in map(cells, PAGE.splitlines()) if len(line) == 3}
    compared = 0
    for work, name, values in speed.timed(CPU):
        word = "inference, bfloat16" if "bfloat16" in work else work.split(",")[0].split(" of")[0]
        least = asked[word][MODELS.index(name)].split("x")[0]
        if least[0] != "-":
            assert values["ratio"] >= float(least)
            compared += 1
    assert compared == 11
    exact = CPU["32-true"]
    assert "48 slices, $S$ from two epochs" in SAID
    for name in MODELS:
        heads = exact[name]["heads_only"]
        assert f"{heads['ratio_to_uncached_no_grad']:.3g}x" in SAID
        assert heads["measured"]["ranked_slices"] == 48 and heads["measured"]["epochs"] == 2
        assert heads["measured"]["rows"] == heads["slices"]
        assert f"N = {exact[name]['inference']['boxes']}" in SAID


def test_what_page_and_readme_say_of_a_gpu_holds_in_the_tables(speed):
    ratios = {(work, name): values["ratio"] for work, name, values in speed.timed(CUDA)}
    missed = ratios["heads + BN, step of 8, bfloat16", "ResNet-50"]
    assert f"heads + BN, step of 8, bfloat16, ResNet-50, is {missed:.3g}x and not 8x" in SAID
    assert missed < 8
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert "On a GPU *heads* is 20 to 40 times as fast, the rest about two to three" in readme
    for (work, _), ratio in ratios.items():
        least, most = (20, 40) if work.startswith("heads, ") else (1.8, 3.2)
        assert least < ratio < most


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0123, "12 ms"), (0.62, "0.62 s"), (18.2, "18 s"), (600, "10 min"), (20_000, "5.6 h"),
     (341_250, "3.9 days"), (0, "0 ms")],
)  # fmt: skip
def test_durations(speed, seconds, said):
    assert speed.duration(seconds) == said
