"""The benchmarks run, at tiny width; a second call does what is missing, of the same phantoms."""

import importlib
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, tiny_training

from covidmask.config import PRESETS, PhantomConfig
from covidmask.datasets.phantom_sets import write_semiseg_phantoms
from covidmask.models import lesion_mask_rcnn
from covidmask.models.weights import read_card
from tools import shipped_weights

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
            monkeypatch.setattr(each, "QUICK", TINY, raising=False)
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


@pytest.mark.slow
def test_quick_preset_seed_by_seed(benchmark, tmp_path, monkeypatch):
    quick, out = benchmark("quick_preset"), tmp_path / "out.json"
    monkeypatch.setattr(quick, "ORDINARY", tiny_training())
    options = {"data": tmp_path / "phantoms", "jobs": 1}
    names = ["seed 0", "ordinary 0", "threshold detector", "area classifier"]
    assert run(quick, out, seeds=(0,), **options) == names
    assert run(quick, out, seeds=(0,), **options) == []
    result = quick.common.read(out)
    for row in (result["parts"]["ordinary 0"], result["parts"]["seed 0"]["few_boxes"]):
        assert len(row["predictions"]) == 6
    lines = quick.markdown(result).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:7]] == [
        "0",
        *("S on 2 boxes", "ordinary classifier"),
        *("intensity threshold", "true lesion areas"),
    ]


@pytest.mark.slow
def test_every_system_side_by_side(benchmark, tmp_path, monkeypatch):
    pytest.importorskip("segmentation_models_pytorch", reason="covidmask[systems] is not installed")
    side, out = benchmark("side_by_side"), tmp_path / "out.json"
    slices, lesions = side.common.quick_data(tmp_path / "phantoms")
    there = {"train": slices["train"], "test": slices["test"], "lesions": lesions["train"]}
    there |= {"lesions_test": lesions["test"], "detector": lesion_mask_rcnn(TINY_DETECTOR).eval()}
    monkeypatch.setattr(side, "quick", lambda: there)
    monkeypatch.setattr(side.common, "environment", source)
    small = {"LOOKS": 12, "S_LOOKS": 12, "MIDDLE": 1, "SIZES": (1, 2), "SEEDS": (0, 1)}
    for name, value in small.items():
        monkeypatch.setattr(side, name, value)
    side.phantoms(systems=("heads", "unet", "resnet18"), out=out)
    result = side.common.read(out)
    cases = "heads, 1", "heads, 2", "resnet18, 1", "resnet18, 2", "unet, 1"
    assert set(result["parts"]) == {f"{name}, {seed}" for seed in (0, 1) for name in cases}
    for name, row in result["parts"].items():
        assert row["n"] == len(there["test"]) and "probabilities" not in row
        assert ("dice" in row) == name.startswith("unet")
    lines = side.markdown(result | {"name": "phantoms"}, "1", "About.").splitlines()
    assert sorted(line.split("|")[1].strip() for line in lines[2:5]) == [
        *("`heads`", "`resnet18`", "`unet`"),
    ]
    values = {}
    exec(side.curve_lines(result), values)
    assert set(values["curve"]["heads"]) == {1, 2} and len(values["curve"]["heads"][1]) == 2


@pytest.mark.slow
def test_regimes_of_two_seeds(benchmark, tmp_path, monkeypatch):
    regimes, out = benchmark("regimes"), tmp_path / "out.json"
    for name, value in {"RATES": (1e-3,), "PILOT_SHARE": 2, "PILOT_EPOCHS": 1}.items():
        monkeypatch.setattr(regimes, name, value)
    options = {"data": tmp_path / "phantoms", "jobs": 1, "epochs": 1}
    done = run(regimes, out, seeds=(0, 1), **options)
    assert [name.split()[0] for name in done] == [
        *("ranked", "pilot", "pilot", "pilot", "before"),
        *12 * ["run"],
    ]
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
    assert "\nAccuracy with N = 32 minus that with N = 2, NMS 0.75: " in ablations.markdown(
        ablations.common.read(out)
    )
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


def test_pages_say_when_their_phantoms_are_of_another_generation(benchmark):
    common = benchmark("common")
    facts = {key: "x" for key in ("command", "hardware", "threads", "torch", "date", "commit")}
    now, before = (facts | {"generator": n} for n in (common.GENERATOR, common.GENERATOR - 1))
    assert "earlier and simpler generation" in common.origin(before, "a file")
    assert "generation" not in common.origin(now, "a file")


@pytest.mark.slow
def test_a_fold_of_real_slices(benchmark, tmp_path, monkeypatch):
    """On phantoms in their layout. A model is found again by the generator of its phantoms."""
    semiseg, preset = benchmark("covid_semiseg"), PRESETS["semiseg"]
    training = tiny_training(epochs=1, average=0.9)
    tiny = replace(
        preset,
        phantoms=TINY.phantoms,
        detector=replace(TINY_DETECTOR, semantic=True),
        segmenter=training,
        augment=replace(preset.augment, size=64, copies=1, min_area=4),
        pretraining=training,
    )
    monkeypatch.setattr(semiseg, "PRESET", tiny)
    monkeypatch.setenv("COVIDMASK_DATA", str(tmp_path))
    data, folder = write_semiseg_phantoms(tmp_path / "real", 64, (5, 1)), tmp_path / "runs"
    assert semiseg.phantoms_first(folder, "32-true")["steps"] == 1
    row = semiseg.one_fold(0, data, folder, "32-true")
    assert row["training_slices"] == 4 and len(row["overlap_mirrored"]) == 1
    names = {path.name for path in folder.glob("*.safetensors")}
    assert names == {semiseg.PHANTOMS, semiseg.file_of(0)}
    assert all(str(semiseg.GENERATOR) in name for name in names)  # not those of other phantoms


@pytest.mark.slow
def test_shipped_weights_are_made_once_for_these_phantoms(benchmark, tmp_path, monkeypatch, capsys):
    benchmark("quick_preset")  # trains S
    out, package = tmp_path / "shipped", tmp_path / "covidmask" / "models"
    for file, folder in (
        (shipped_weights.SHIPPED / shipped_weights.CT, out),
        (ROOT / "covidmask" / "models" / "weights.py", package),
        (shipped_weights.PAGE, tmp_path),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder)
    monkeypatch.setattr(shipped_weights, "PRESET", TINY)
    monkeypatch.setattr(shipped_weights, "ROOT", tmp_path)
    monkeypatch.setattr(shipped_weights, "PAGE", tmp_path / "weights.md")
    monkeypatch.setenv("ALLOW_DIRTY", "1")
    shipped_weights.main(tmp_path / "phantoms", out, missing=True)
    made = shipped_weights.sha256(out / shipped_weights.CLASSIFIER)
    for file in (package / "weights.py", tmp_path / "weights.md"):
        assert made in file.read_text(encoding="utf-8")
    assert read_card(out / shipped_weights.CLASSIFIER)["generator"] == shipped_weights.GENERATOR
    capsys.readouterr()
    shipped_weights.main(tmp_path / "phantoms", out, missing=True)
    assert "are there" in capsys.readouterr().out
    monkeypatch.setattr(shipped_weights, "GENERATOR", 99)
    monkeypatch.setattr(shipped_weights, "environment", dict)
    monkeypatch.setattr(shipped_weights, "write_phantoms", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # it begins
        shipped_weights.main(tmp_path / "phantoms", out, missing=True)
