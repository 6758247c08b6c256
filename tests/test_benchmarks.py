"""The benchmarks run, at tiny width; a second call does what is missing, of the same phantoms."""

import importlib
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, tiny_training

from covidmask.config import PRESETS, PhantomConfig

ROOT = Path(__file__).parents[1]
TINY = replace(
    PRESETS["quick"],
    phantoms=PhantomConfig(64, 2, (2, 1, 1), (1, 1, 1)),
    detector=TINY_DETECTOR,
    segmenter=tiny_training(epochs=1),
    classifier=TINY_CLASSIFIER,
    classifier_training=tiny_training(batch_size=3),
    min_area=4,
)


@pytest.fixture
def benchmark(monkeypatch):
    """A benchmark on the tiny preset, by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name):
        module = importlib.import_module(name)
        for each in (module, importlib.import_module("common")):
            monkeypatch.setattr(each, "QUICK", TINY)
        return module

    return load


def source(commit="a1"):
    values = {"hardware": "one", "torchvision": "1", "threads": 1, "date": "today", "torch": "2"}
    return {"command": "python x.py", "commit": commit, **values}


def run(benchmark, out, commit="a1", **options):
    """What `command` does; the parts that were done."""
    common, parts = importlib.import_module("common"), []
    for path, result in benchmark.measure(out=out, **options):
        parts += result.get("parts", {"all": 0})
        common.save(path, source(commit) | result)
    return parts


def test_quick_preset_seed_by_seed(benchmark, tmp_path, monkeypatch):
    quick, out = benchmark("quick_preset"), tmp_path / "out.json"
    monkeypatch.setattr(quick, "ORDINARY", tiny_training())
    options = {"data": tmp_path / "phantoms", "jobs": 1}
    both = ["threshold detector", "area classifier"]
    assert run(quick, out, seeds=(0,), **options) == ["seed 0", *both]
    assert run(quick, out, seeds=(0,), **options) == []
    result = quick.common.read(out)
    row = result["parts"]["seed 0"]
    assert len(row["ordinary"]["predictions"]) == len(row["few_boxes"]["predictions"]) == 6
    lines = quick.markdown(result).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:7]] == [
        "0",
        *("S on 2 boxes, each seed", "ordinary classifier, each seed"),
        *("intensity threshold", "true lesion areas"),
    ]


def test_regimes_of_two_seeds(benchmark, tmp_path, monkeypatch):
    regimes, out = benchmark("regimes"), tmp_path / "out.json"
    for name, value in {"RATES": (1e-3,), "PILOT_SHARE": 2, "PILOT_EPOCHS": 1}.items():
        monkeypatch.setattr(regimes, name, value)
    options = {"data": tmp_path / "phantoms", "jobs": 1, "epochs": 1}
    done = run(regimes, out, seeds=(0, 1), **options)
    assert [name.split()[0] for name in done] == 3 * ["pilot"] + ["before"] + 12 * ["run"]
    assert run(regimes, out, seeds=(0, 1), **options) == []
    result = regimes.common.read(out)
    rows = regimes.summary(result)
    assert [row["regime"] for row in rows] == ["heads", "heads_bn", "full"] + [
        *("heads_bn", "full", "heads")
    ]
    assert [row["epochs"] for row in rows] == 5 * [1] + [2]
    assert all(len(row["seeds"]) == 2 for row in rows)
    assert rows[0]["minus_heads"] == rows[5]["minus_longer"] == [0, 0, 0]
    assert regimes.markdown(result).count("\n| heads") == 6


def test_ablations(benchmark, tmp_path, monkeypatch):
    ablations, out = benchmark("ablations"), tmp_path / "out.json"
    few = [v for v in ablations.VARIANTS if v.name == "N = 2" or v.random_detector]
    monkeypatch.setattr(ablations, "VARIANTS", ablations.VARIANTS[:1] + few)
    options = {"data": tmp_path / "phantoms", "test_data": tmp_path / "others", "seeds": (0,)}
    assert run(ablations, out, **options) == ["all"]
    assert run(ablations, out, **options) == []
    assert "\nN = 32 minus N = 2: " in ablations.markdown(ablations.common.read(out))
    monkeypatch.setattr(ablations, "predictions", lambda *_: iter(()))
    monkeypatch.setattr(ablations.common, "GENERATOR", 99)  # other phantoms: all of it again
    assert run(ablations, out, **options) == ["all"]


def one(value):
    return value


def wrong():
    raise ValueError("this part")


def lacking(common, out, parts, **settings):
    done = []
    for path, result in common.lacking(out, settings, parts, 1):
        done += result["parts"]
        common.save(path, source() | result)
    return done


def test_parts_of_other_settings_are_done_again(benchmark, tmp_path):
    common, out = benchmark("common"), tmp_path / "out.json"
    parts = {"a": (one, 1), "b": (one, 2)}
    assert lacking(common, out, {"a": (one, 1)}, generator=1) == ["a"]
    assert lacking(common, out, parts, generator=1) == ["b"]
    assert common.read(out)["parts"] == {"a": 1, "b": 2}
    common.save(out, source("b2") | {"generator": 1, "parts": {"c": 3}})
    assert common.read(out)["commit"] == "a1 and b2" and len(common.read(out)["parts"]) == 3
    assert lacking(common, out, {"b": (one, 3)}, generator=2) == ["b"]
    assert common.read(out)["parts"] == {"b": 3}


def test_a_part_that_fails_keeps_what_is_done(benchmark, tmp_path):
    common, out = benchmark("common"), tmp_path / "out.json"
    with pytest.raises(ValueError, match="this part"):
        lacking(common, out, {"a": (one, 1), "b": (wrong,)}, generator=1)
    assert lacking(common, out, {"a": (one, 1), "b": (one, 2)}, generator=1) == ["b"]


def writer(folder, out, name):
    importlib.import_module("sys").path.insert(0, folder)
    common = importlib.import_module("common")
    for part in range(20):
        common.save(out, source() | {"generator": 1, "parts": {f"{name}{part}": 0}})


@pytest.mark.slow
def test_two_processes_write_one_file(benchmark, tmp_path):
    common, out = benchmark("common"), tmp_path / "out.json"
    spawn = multiprocessing.get_context("fork")
    two = [spawn.Process(target=writer, args=(str(ROOT / "benchmarks"), out, n)) for n in "ab"]
    for process in two:
        process.start()
    for process in two:
        process.join()
    assert len(common.read(out)["parts"]) == 40


def test_pages_are_not_filled_from_other_phantoms(benchmark, tmp_path, monkeypatch):
    common, out = benchmark("common"), tmp_path / "out.json"
    common.save(out, source() | {"generator": -1})
    monkeypatch.setattr("sys.argv", ["x.py", "--page"])
    with pytest.raises(SystemExit, match=r"out.json: of phantoms of generator -1, now \d.*page.md"):
        common.command(None, out, (tmp_path / "page.md", "x", str))
