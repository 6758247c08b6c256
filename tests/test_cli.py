"""Every command, in-process, on phantoms of 64 pixels and a tiny model."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from author_files import author_file
from PIL import Image
from scan_files import write_image
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, tiny_training

from covidmask import config
from covidmask.cli import main
from covidmask.config import PhantomConfig
from covidmask.datasets.classes import open_slices, slice_splits
from covidmask.datasets.lesions import lesion_splits, open_lesions
from covidmask.datasets.patients import old_friend
from covidmask.errors import CheckpointError, DataError
from covidmask.models.weights import (
    WHOSE_SHIPPED,
    ShippedWeights,
    find_weights,
    load_classifier,
    load_segmenter,
    read_card,
    save_model,
    trained_classifier,
    trained_segmenter,
    weights_file,
)
from covidmask.training import loop

TESTS = Path(__file__).parent

TINY = replace(
    config.PRESETS["quick"],
    phantoms=PhantomConfig(64, 2, (4, 2, 3), (2, 1, 2)),
    detector=TINY_DETECTOR,
    segmenter=tiny_training(epochs=1),
    classifier=TINY_CLASSIFIER,
    classifier_training=tiny_training(epochs=2),
)


@pytest.fixture(autouse=True, scope="module")
def root(tmp_path_factory):
    """$COVIDMASK_DATA, with the tiny preset's phantoms and weights in it."""
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(config.PRESETS, "quick", TINY)
        patch.setenv("COVIDMASK_DATA", str(root))
        assert main(["phantoms"]) == 0
        assert main(["train", "segmenter"]) == 0
        assert main(["train", "classifier"]) == 0
        yield root


@pytest.fixture
def run(capsys):
    """Run a command that must succeed; give back the lines that it printed."""

    def run(*argv) -> list[str]:
        capsys.readouterr()
        status = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert status == 0, err
        assert "Traceback" not in err
        return out.strip().splitlines()

    return run


def weights(root, kind):
    return root / "weights" / f"{kind}-quick{'-heads' * (kind == 'classifier')}.safetensors"


# ---- help -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, words",
    [
        ("", "phantoms fetch stats train evaluate predict check convert"),
        ("phantoms", "--preset {quick,colab,paper,semiseg} --out DIR --seed $COVIDMASK_DATA"),
        ("stats", "--data --json"),
        ("train", "segmenter classifier"),
        ("train segmenter", "--preset --data --out --checkpoint --epochs --weights-backbone"),
        ("train segmenter", "{quick,colab,paper,semiseg} --no-pretraining --segmenter.epochs"),
        ("train segmenter", "--detector.anchor-sizes --detector.lesions --min-area 0.001"),
        ("train segmenter --preset semiseg", "--augment.copies --pretraining.lr --phantoms.size"),
        ("train segmenter --preset=paper", "--segmenter.batch-size 1e-05 0.25 0.75 512 1024"),
        ("train classifier", "--classifier.n-boxes --classifier-training.weight-decay 0.0001"),
        ("train classifier", "--segmenter {heads,heads_bn,full} --no-validation --log-dir"),
        ("evaluate", "segmenter classifier"),
        ("evaluate segmenter", "--weights --split --json --score --threshold --mirror --nms"),
        ("evaluate classifier", "--weights --split --json"),
        ("fetch", "covid-semiseg covidx-ct cncb-lesions"),
        ("predict", "IMAGE --segmenter --classifier --out --score DICOM NIfTI"),
        ("predict", "--slices --every --series --window all|20-80|3,17,40-45"),
        ("check", "[FAIL]"),
        ("convert", "AUTHOR.pth OUT.safetensors"),
    ],
)
def test_help(command, words, run):
    text = "\n".join(run(*command.split(), "--help"))
    missing = [word for word in words.split() if word not in text]
    assert not missing, text
    unused = ("--phantoms", "--augment", "--pretraining.") if command == "train segmenter" else ()
    assert not [word for word in unused if word in text]
    assert "None" not in re.sub(r"--detector\.\S+ \{None\}.*\n.*\n.*", "", text)  # but in words


@pytest.mark.parametrize("argv", [[], ["fly"], ["train"], ["stats", "--depth", "3"], ["convert"]])
def test_usage_error(argv, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err and "Traceback" not in err


def test_help_does_not_load_torch():
    code = (
        "import sys; from covidmask.cli import main; main(['--help']); print(sorted(sys.modules))"
    )
    text = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=TESTS.parent
    ).stdout
    assert "usage: covidmask" in text
    loaded = text.splitlines()[-1]
    packages = ("torch", "numpy", "matplotlib", "pandas", "scipy")
    assert not [m for m in packages if f"'{m}'" in loaded]


def test_module_runs_as_a_program():
    command = [sys.executable, "-m", "covidmask", "train", "classifier", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0 and "[CLASSIFIER OPTIONS]" in done.stdout


# ---- data -----------------------------------------------------------------------------------


def test_phantoms_are_made_once(run, root, tmp_path):
    folder = root / "phantoms-quick"
    lines = run("phantoms")
    assert lines[-1].startswith(
        "Phantoms were already there: 2 slices each of 9 patients with masks, 15"
    )
    assert lines[-1].endswith(str(folder))
    lines = run("phantoms", "--out", tmp_path / "other", "--seed", 5, "--workers", 1)
    assert lines[-1].startswith("Phantoms written:")
    first, other = (sorted((f / "slices").glob("*.png")) for f in (folder, tmp_path / "other"))
    assert len(first) == len(other) == 30
    assert first[0].read_bytes() != other[0].read_bytes()


def test_stats(run, root, tmp_path):
    lines = run("stats", "--json", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())
    assert lines[-1].startswith("Statistics of 48 slices in ") and "s.json" in lines[-1]
    assert [found["lesions"][s]["slices"] for s in ("train", "val", "test")] == [8, 4, 6]
    assert found["slices"]["train"]["classes"]["COVID-19"] == {"slices": 4, "patients": 2}
    train = found["lesions"]["train"]["classes"]
    assert 0 <= train["GGO"]["share_of_small_regions"] <= 1
    dataset = open_lesions(root / "phantoms-quick", "train")
    regions = sum(int((dataset[i][1]["labels"] == 2).sum()) for i in range(len(dataset)))
    assert train["C"]["regions"] == regions


def semiseg(root, count=4):
    """COVID-SemiSeg's training folder with a few drawn slices."""
    folder = root / "TrainingSet" / "MultiClassInfection-Train"
    for part in ("Imgs", "GT"):
        (folder / part).mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "Imgs" / f"{i}.jpg")
        mask = np.zeros((64, 64), dtype=np.uint8)
        mask[10:30, 20:50], mask[40:50, 40:50] = 1, 2
        Image.fromarray(mask).save(folder / "GT" / f"{i}.png")
    return root


def test_layouts_are_told_apart_by_what_they_hold(run, root, tmp_path):
    phantoms = root / "phantoms-quick"
    assert lesion_splits(phantoms) == slice_splits(phantoms) == ["train", "val", "test"]
    assert slice_splits(phantoms / "lesions") == [] == lesion_splits(phantoms / "slices")
    assert run("stats", "--data", phantoms / "lesions")[-1].startswith("Statistics of 18 slices")
    assert run("stats", "--data", phantoms / "slices")[-1].startswith("Statistics of 30 slices")
    semiseg(tmp_path)
    assert lesion_splits(tmp_path) == ["train"]
    lines = run("stats", "--data", tmp_path)
    assert lines[0] == "lesions, train: 4 slices of unknown patients"
    assert [line.split() for line in lines[1:3]] == [["GGO", "C"], ["regions", "4", "4"]]
    assert lines[-1].startswith("Statistics of 4 slices")
    with pytest.raises(DataError, match="no split 'val'; choose train"):
        open_lesions(tmp_path, "val")


def test_slices_without_lists(run, tmp_path):
    for part in ("image", "mask"):
        (tmp_path / part / "7").mkdir(parents=True)
        Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(tmp_path / part / "7" / "1.png")
    lines = run("stats", "--data", tmp_path, "--json", tmp_path / "s.json")
    assert lines[0] == "lesions, all: 1 slices of 1 patients" and lines[-2].endswith(" n/a")
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["lesions"]["all"]["classes"]["GGO"]["mean_area_fraction"] is None


# ---- training -------------------------------------------------------------------------------


def test_segmenter_file_and_card(root):
    path = weights(root, "segmenter")
    assert load_segmenter(path).config == TINY_DETECTOR
    card = read_card(path)
    assert card["command"] == "covidmask train segmenter" and card["seed"] == 0
    assert (card["preset"], card["data"], card["split"]) == ("quick", "phantoms-quick", "train")
    assert card["steps"] == 2 and card["last_epoch"]["loss"] > 0 and card["min_area"] == 7
    assert card["torch"] == torch.__version__ and re.match(r"\d{4}-\d\d-\d\dT", card["date"])
    assert str(root) not in json.dumps(card)  # no path of the machine
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "classifier-quick-heads.safetensors",
        "segmenter-quick.safetensors",
    ]


def test_overrides_and_other_data(run, tmp_path):
    data, out = semiseg(tmp_path / "real"), tmp_path / "new" / "s.safetensors"
    lines = run(
        *("train", "segmenter", "--data", data, "--out", out, "--epochs", 2, "--batch-size", 2),
        *("--lr", 1e-4, "--seed", 3, "--device", "cpu", "--workers", 1),
    )
    assert lines[-1].startswith("Segmenter trained on 4 slices: epochs 2, steps 4, mean loss")
    assert lines[-1].endswith(f"weights in {out}")
    card = read_card(out)
    assert card["training"]["lr"] == 1e-4 and card["training"]["batch_size"] == 2
    assert card["seed"] == 3 and card["data"] == "real"


def test_numbers_of_the_preset(run, root, tmp_path):
    """Each has an option, and those that differ from the preset stand in the card."""
    lines = run(
        "phantoms",
        "--phantoms.size",
        48,
        "--phantoms.slices-per-patient",
        1,
        "--workers=1",
        "--phantoms.lesion-patients",
        2,
        1,
        1,
        "--out",
        tmp_path / "p",
    )
    assert lines[-1].startswith(
        "Phantoms written: 1 slices each of 4 patients with masks, 15 more of three classes, 48 pix"
    )
    out = tmp_path / "s.safetensors"
    numbers = ("--detector.lesions", "merged", "--detector.anchor-sizes", 3, 9, "--min-area", 3)
    short = ("--epochs", 2, "--batch_size=1", "--segmenter.no-cosine", "--segmenter.lr=1e-4")
    data = ("--data", tmp_path / "p", "--out", out)
    lines = run("train", "segmenter", *data, *numbers, *short)
    assert lines[-1].startswith("Segmenter trained on 2 slices: epochs 2, steps 4, ")
    card, detector = read_card(out), load_segmenter(out).config
    assert detector == replace(TINY_DETECTOR, lesions="merged", anchor_sizes=(3, 9))
    assert card["training"] == {**asdict(TINY.segmenter), **card["training"]}
    assert card["changed"] == {
        "min_area": 3,
        "segmenter.epochs": 2,
        "segmenter.batch_size": 1,
        "segmenter.lr": 1e-4,
        "segmenter.cosine": False,
        "detector.lesions": "merged",
        "detector.anchor_sizes": [3, 9],
    }
    assert {n: card["training"][n] for n in ("epochs", "batch_size", "lr", "cosine")} == {
        "epochs": 2,
        "batch_size": 1,
        "lr": 1e-4,
        "cosine": False,
    }
    assert read_card(weights(root, "segmenter"))["changed"] == {}
    out = tmp_path / "c.safetensors"
    numbers = ("--classifier.n-boxes", 8, "--classifier.hidden", 24, "--epochs", 1)
    run("train", "classifier", "--out", out, *numbers, "--classifier-training.lr", 3e-4)
    assert load_classifier(out).config == replace(TINY_CLASSIFIER, n_boxes=8, hidden=24)
    assert read_card(out)["changed"] == {
        "classifier.n_boxes": 8,
        "classifier.hidden": 24,
        "classifier_training.epochs": 1,
        "classifier_training.lr": 3e-4,
    }


def test_faults_of_ours_keep_their_traceback(monkeypatch, capsys):
    def fault(*args, **kwargs):
        raise error

    monkeypatch.setattr("covidmask.models.detector.lesion_mask_rcnn", fault)
    for error, words in ((TypeError("ours"), []), (ValueError("ours"), ["--min-area", "2"])):
        with pytest.raises(type(error), match="ours"):
            main(["train", "segmenter"])
        if words:
            assert main(["train", "segmenter", *words]) == 2
            assert "error: --min-area 2: cannot be built" in capsys.readouterr().err
        else:
            with pytest.raises(TypeError):
                main(["train", "segmenter", "--min-area", "2"])


def test_phantoms_first_then_random_copies_of_real_slices(run, tmp_path, monkeypatch):
    tiny = replace(
        TINY,
        name="semiseg",
        augment=config.AugmentConfig(size=64, copies=3, min_area=4),
        pretraining=tiny_training(epochs=1, batch_size=2),
        segmenter=tiny_training(epochs=1, batch_size=2),
    )
    monkeypatch.setitem(config.PRESETS, "semiseg", tiny)
    data, out = semiseg(tmp_path / "real"), tmp_path / "s.safetensors"
    command = ["train", "segmenter", "--preset", "semiseg", "--data", data, "--out", out]
    assert run(*command)[-1].startswith("Segmenter trained on 4 slices: epochs 1, steps 6, mean")
    card = read_card(out)
    assert card["augment"]["copies"] == 3 and card["pretraining"]["batch_size"] == 2
    assert [path.name for path in tmp_path.glob("s.*")] == ["s.safetensors"]  # no checkpoint left
    first = load_segmenter(out).state_dict()
    run(*command, "--no-pretraining")
    assert read_card(out)["pretraining"] is None
    second = load_segmenter(out).state_dict()
    assert any(not torch.equal(first[name], second[name]) for name in first)

    lines = run(
        *("evaluate", "segmenter", "--preset", "semiseg", "--data", data, "--split", "train"),
        *("--weights", out, "--mirror", "--threshold", 0.2, "--json", tmp_path / "e.json"),
    )
    found = json.loads((tmp_path / "e.json").read_text())
    assert "judged on 4 slices of unknown patients: " in lines[-1] and found["patients"] is None
    assert found["mirror"] is True and found["threshold"] == 0.2 and found["min_area"] == 7
    for region in ("infection", "GGO", "C"):
        values = found["overlap"][region]
        assert values["present"] == 4 and 0 <= values["dice"] <= 1 and 0 <= values["mae"] <= 1
    rows = [line.split() for line in lines]
    assert ["infection", "GGO", "C"] in rows and ["present", "4", "4", "4"] in rows
    assert ["dice", *(f"{values['dice']:.3f}" for values in found["overlap"].values())] in rows


def test_log_dir(run, tmp_path):
    pytest.importorskip("tensorboard")
    run("train", "segmenter", "--out", tmp_path / "s.safetensors", "--log-dir", tmp_path / "logs")
    assert list((tmp_path / "logs").rglob("events*"))


def interrupt(*command):
    """Stop after the first epoch."""
    save = loop.save_checkpoint

    def interrupted(path, state):
        save(path, state)
        raise KeyboardInterrupt

    with patch.object(loop, "save_checkpoint", interrupted):
        assert main([*map(str, command)]) == 130


@pytest.mark.parametrize("kind", ["segmenter", "classifier"])
def test_interrupted_training_goes_on(kind, run, tmp_path, capsys):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    options = ["train", kind, "--epochs", 3]
    run(*options, "--out", whole)
    interrupt(*options, "--out", broken)
    assert capsys.readouterr().err.endswith("covidmask: interrupted\n")
    assert broken.with_suffix(".ckpt").exists() and not broken.exists()
    assert run(*options, "--out", broken)[-2] == f"Going on from {broken.with_suffix('.ckpt')}"
    load = load_segmenter if kind == "segmenter" else load_classifier
    one, two = (load(path).state_dict() for path in (whole, broken))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == [broken.name, whole.name]


def test_interrupted_training_goes_on_without_validation(run, tmp_path):
    out = tmp_path / "c.safetensors"
    command = ["train", "classifier", "--epochs", 3, "--out", out]
    interrupt(*command)
    assert "val" not in run(*command, "--no-validation")[-1]
    assert read_card(out)["validation_accuracy"] is None


@pytest.mark.parametrize("regime", ["heads", "heads_bn", "full"])
def test_regimes(regime, run, root, tmp_path):
    out = tmp_path / "c.safetensors"
    lines = run(
        *("train", "classifier", "--regime", regime, "--no-validation", "--out", out),
        *("--segmenter", weights(root, "segmenter"), "--checkpoint", tmp_path / "run.ckpt"),
    )
    assert lines[-1].startswith(f"Classifier ({regime}) trained on 12 slices: epochs 2, steps 6")
    assert "val" not in lines[-1] and lines[-1].endswith(f"weights in {out}")
    assert read_card(out)["regime"] == regime and read_card(out)["validation_accuracy"] is None
    detector = load_classifier(out).detector.state_dict()
    before = load_segmenter(weights(root, "segmenter")).state_dict()
    same = all(torch.equal(tensor, before[name]) for name, tensor in detector.items())
    assert same == (regime == "heads")


def test_validation_keeps_the_best_epoch(run, root, tmp_path):
    lines = run("train", "classifier", "--out", tmp_path / "c.safetensors")
    accuracy = read_card(tmp_path / "c.safetensors")["validation_accuracy"]
    assert f"best accuracy on val {accuracy:.3f} (kept)" in lines[-1]


@pytest.mark.parametrize(
    "options, words",
    [
        ("--epochs 0", "--segmenter.epochs 0: must be at least 1"),
        ("--batch-size -1", "--segmenter.batch-size -1: must be at least 1"),
        ("--lr nan", "--segmenter.lr nan: must be at least 1e-12"),
        ("--segmenter.lr 0", "--segmenter.lr 0.0: must be at least 1e-12"),
        ("--detector.rpn-iou 0.7 1.5", "--detector.rpn-iou 1.5: must be at least 0 and at most 1"),
        ("--detector.rpn-iou 0.2 0.7", "--detector.rpn-iou (0.2, 0.7): cannot be built"),
        ("--seed -1", "--seed -1: must be at least 0 and at most"),
        ("--batch-size 500", "batch size 500: give a multiple of the number of processes"),
        ("--weights-backbone NONE", "weights NONE, "),
        ("--device mps", "--device mps: there is none"),
        ("--out weights.pt", "weights.pt: is written to by --out; let its name end in .safe"),
    ],
)
def test_settings_that_cannot_be(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    out = [] if "--out" in options else ["--out", str(tmp_path / "s.safetensors")]
    assert main(["train", "segmenter", *options.split(), *out]) == 2
    err = capsys.readouterr().err
    assert err.startswith("covidmask: error: ") and err.count("\n") == 1 and words in err
    assert not list(tmp_path.iterdir())


# ---- evaluation -----------------------------------------------------------------------------


def test_evaluate_segmenter(run, root, tmp_path):
    lines = run("evaluate", "segmenter", "--json", tmp_path / "e.json", "--score", 0.01)
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["slices"] == 6 and found["patients"] == 3 and found["min_area"] == 7
    for name in ("mask_ap", "box_ap75", "mask_ap50_GGO", "author_ap", "author_ap50", "dice_C"):
        assert 0 <= found[name] <= 1
    text = "\n".join(lines)
    assert "COCO's AP" in text and "released code's own AP" in text and "mean Dice" in text
    rows = [line.split() for line in lines]
    for name in ("mask_ap50", "box_ap", "author_ap75", "mask_ap50_GGO", "dice_C"):
        assert [name, f"{found[name]:.3f}"] in rows
    assert f"{weights(root, 'segmenter')} judged on 6 slices of 3 patients" in lines[-1]


def test_evaluate_classifier(run, root, tmp_path):
    lines = run("evaluate", "classifier", "--json", tmp_path / "e.json", "--split", "test")
    found = json.loads((tmp_path / "e.json").read_text())
    confusion = np.array(found["confusion"])
    assert confusion.shape == (3, 3) and confusion.sum(1).tolist() == found["support"] == [4, 4, 4]
    assert found["accuracy"] == pytest.approx(confusion.trace() / 12)
    low, high = found["wilson"]["accuracy"]
    assert low <= found["accuracy"] <= high
    text = "\n".join(lines)
    assert "A slice is not a patient: there are 12 slices of 6 patients" in text
    rows = [line.split() for line in lines]
    assert all(
        [name, *map(str, row)] in rows
        for name, row in zip(("Control", "COVID-19"), confusion[::2], strict=True)
    )
    assert "Confusion matrix" in text and "With intervals of 95 %" in text
    assert lines[-1].endswith(f"accuracy {found['accuracy']:.3f}; numbers in {tmp_path / 'e.json'}")


def test_min_area_of_zero_is_not_that_of_the_training(run, tmp_path):
    run("evaluate", "segmenter", "--min-area", 0, "--json", tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["min_area"] == 0


def test_classes_of_a_model_and_of_other_data(root, monkeypatch, capsys):
    def opened(*args, **kwargs):
        dataset = open_slices(*args, **kwargs)
        dataset.classes = ("Nodule", "None", "Both")
        return dataset

    monkeypatch.setattr("covidmask.datasets.classes.open_slices", opened)
    assert main(["evaluate", "classifier"]) == 2
    err = capsys.readouterr().err
    assert "the data set's classes are Nodule, None, Both, the model's Control" in err


# ---- which weights --------------------------------------------------------------------------


@pytest.fixture
def mine(root, tmp_path, monkeypatch):
    """An empty $COVIDMASK_DATA, and a way to put weights of ours there."""
    monkeypatch.setenv("COVIDMASK_DATA", str(tmp_path / "mine"))

    def put(kind, regime=None):
        path = weights_file(kind, "quick", regime)
        return save_model(LOAD[kind](weights(root, kind)), path)

    return put


LOAD = {"segmenter": load_segmenter, "classifier": load_classifier}


@pytest.mark.parametrize("kind", ["segmenter", "classifier"])
def test_named_weights_come_before_yours_and_yours_before_the_shipped_ones(kind, mine, tmp_path):
    shipped = find_weights(kind, "quick")
    assert shipped == (ShippedWeights[f"{kind.upper()}_QUICK"].path, WHOSE_SHIPPED)
    path = mine(kind, "heads" if kind == "classifier" else None)
    assert find_weights(kind, "quick") == (path, "yours")
    assert find_weights(kind, "quick", shipped=True) == shipped
    assert find_weights(kind, "quick", tmp_path / "x") == (tmp_path / "x", "named")
    trained = {"segmenter": trained_segmenter, "classifier": trained_classifier}[kind]
    assert trained("quick").config != trained("quick", shipped=True).config
    with pytest.raises(CheckpointError, match=f"`covidmask train {kind} --preset paper`"):
        find_weights(kind, "paper")


def test_regimes_of_yours(mine, tmp_path):
    with pytest.raises(CheckpointError, match="train classifier --preset quick --regime full`"):
        find_weights("classifier", "quick", regime="full")
    heads, full = mine("classifier", "heads"), mine("classifier", "full")
    with pytest.raises(CheckpointError) as caught:
        find_weights("classifier", "quick")
    for words in (f"{heads}, {full}: there are several", "--regime"):
        assert words in str(caught.value)
    assert find_weights("classifier", "quick", regime="full") == (full, "yours")
    assert find_weights("classifier", "quick", regime="heads") == (heads, "yours")
    with pytest.raises(CheckpointError, match="--regime full: is for your own weights"):
        find_weights("classifier", "quick", tmp_path / "x", regime="full")
    heads.unlink()
    assert find_weights("classifier", "quick") == (full, "yours")
    assert trained_classifier("quick").config == TINY_CLASSIFIER


def test_every_command_says_whose_weights_it_takes(run, root, mine, tmp_path, capsys):
    data = ["--data", root / "phantoms-quick"]
    segmenter = mine("segmenter")
    out = tmp_path / "c.safetensors"
    assert f"Segmenter: yours, {segmenter}" in run("train", "classifier", *data, "--out", out)
    assert f"Segmenter: yours, {segmenter}" in run("evaluate", "segmenter", *data)
    named = ["--weights", out]
    assert f"Classifier: named, {out}" in run("evaluate", "classifier", *data, *named)
    image = next((root / "phantoms-quick" / "slices").glob("NCP*.png"))
    options = ["predict", image, "--out", tmp_path / "o"]
    lines = run(*options)
    assert f"Segmenter: yours, {segmenter}" in lines
    assert any(line.startswith(f"Classifier: {WHOSE_SHIPPED}, ") for line in lines)
    assert "phantoms" not in "\n".join(run(*options, "--classifier", out)).replace(str(root), "")
    mine("classifier", "heads"), mine("classifier", "full")
    for command in (options, ["evaluate", "classifier", *data]):
        assert main([*map(str, command)]) == 2
        assert "there are several of yours" in capsys.readouterr().err
        assert run(*command, "--regime", "full")


def test_each_regime_has_a_file_of_its_own(run, root):
    lines = run("train", "classifier", "--regime", "heads_bn", "--no-validation", "--epochs", 1)
    path = root / "weights" / "classifier-quick-heads_bn.safetensors"
    assert lines[-1].endswith(f"weights in {path}") and read_card(path)["regime"] == "heads_bn"
    assert weights(root, "classifier").is_file()
    path.unlink()  # the other tests have one classifier


# ---- use ------------------------------------------------------------------------------------


def write_dicom(path, name="Secret^Person"):
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dicom = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dicom.PatientName = name
    dicom.Rows = dicom.Columns = 64
    dicom.SamplesPerPixel, dicom.PhotometricInterpretation = 1, "MONOCHROME2"
    dicom.BitsAllocated = dicom.BitsStored = 16
    dicom.HighBit, dicom.PixelRepresentation = 15, 1
    dicom.RescaleSlope, dicom.RescaleIntercept = 1, 0
    pixels = np.random.default_rng(0).integers(-1000, 200, (64, 64)).astype(np.int16)
    dicom.PixelData = pixels.tobytes()
    dicom.save_as(path, enforce_file_format=True)


def predict(run, root, out, *images):
    files = [weights(root, kind) for kind in ("segmenter", "classifier")]
    lines = run(
        *("predict", *images, "--segmenter", files[0], "--classifier", files[1]),
        *("--out", out, "--score", 0.01),
    )
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        return lines, list(csv.DictReader(file))


def test_predict_reads_what_scanners_and_editors_write(run, root, tmp_path):
    pytest.importorskip("pydicom")
    source = next((root / "phantoms-quick" / "slices").glob("NCP*.png"))
    grey = np.asarray(Image.open(source))
    (tmp_path / "a").mkdir()
    images = [tmp_path / name for name in ("one.png", "a/one.png", "A.PNG", "b.jpg", "c.dcm")]
    for path in (images[0], images[3]):
        Image.fromarray(grey).save(path)
    Image.fromarray(grey.astype(np.uint16) * 257).save(images[1])  # the same in 16 bits
    Image.fromarray(np.stack([grey] * 3, -1)).save(images[2], format="PNG")
    write_dicom(images[4])
    out = tmp_path / "out"
    lines, rows = predict(run, root, out, *images)
    assert "research and teaching only" in lines[0] and "need not sum to 1" in lines[-2]
    assert (
        lines[-1].startswith("5 slices done") and "summary.csv and predictions.csv in" in lines[-1]
    )
    names = ["one_lesions.png", "one_2_lesions.png", "A_lesions.png", "b_lesions.png"]
    names.append("slice_0001_lesions.png")  # of the DICOM file, whose name might tell a patient's
    assert [row["picture"] for row in rows] == names
    tables = ["predictions.csv", "summary.csv"]
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, *tables])
    columns = ("Control", "Common pneumonia", "COVID-19")
    values = np.array([[float(row[c]) for c in columns] for row in rows])
    assert ((values > 0) & (values < 1)).all()
    assert np.allclose(values[0], values[1], atol=1e-5)  # 8 and 16 bits of one slice
    for row, each in zip(rows, values, strict=True):
        assert row["likeliest"] == columns[each.argmax()] and int(row["lesions"]) >= 0
        with Image.open(out / row["picture"]) as picture:
            assert picture.mode == "RGB" and picture.size == (512, 512)
    written = b"".join(path.read_bytes() for path in out.iterdir())
    assert b"Secret" not in written and "Secret" not in "\n".join(lines)


def test_predict_takes_the_shipped_weights_and_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COVIDMASK_DATA", str(tmp_path / "nothing of mine"))
    image, _ = old_friend(128)
    write_image(tmp_path / "friend.png", image)
    lines = run("predict", tmp_path / "friend.png", "--out", tmp_path / "out")
    for kind in ("Segmenter", "Classifier"):
        start = f"{kind}: shipped with the package, trained on phantoms and wrong on real CT, "
        assert any(line.startswith(start) for line in lines)
    with open(tmp_path / "out" / "predictions.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert int(row["lesions"]) >= 3 and float(row["Control"]) < 0.5


def test_predict_real_dicom(run, root, tmp_path):
    if "COVIDMASK_REAL" not in os.environ:
        pytest.skip("COVIDMASK_REAL, the folder of real slices, is not set")
    folder = Path(os.environ["COVIDMASK_REAL"]) / "dicom"
    images = sorted(path for path in folder.rglob("*") if path.suffix in (".dcm", ".dicom"))
    assert len(images) == 2
    _, rows = predict(run, root, tmp_path / "out", *images)
    assert len(rows) == 2
    assert all((tmp_path / "out" / row["picture"]).stat().st_size > 1000 for row in rows)


@pytest.mark.parametrize("what", ["segmenter", "classifier"])
def test_convert(what, run, root, tmp_path):
    load = load_segmenter if what == "segmenter" else load_classifier
    model = load(weights(root, what))
    detector = TINY_DETECTOR
    source = author_file(tmp_path / "a.pth", model, detector.anchor_sizes, detector.anchor_ratios)
    lines = run("convert", source, tmp_path / "o.safetensors")
    text = "\n".join(lines)
    for words in ("backbone='resnet18'", "cut=2", "lesions='both'"):
        assert words in text
    assert "(2.0, 4.0, 8.0, 16.0, 32.0)" in text and "(0.1, 0.25, 0.5, 1.0, 1.5, 2.0)" in text
    assert ("n_boxes=16, hidden=32" in text) == (what == "classifier")
    assert lines[-1].endswith(f"converted; weights in {tmp_path / 'o.safetensors'}")
    # objects of up to 100 pixels are no lesion, as in the released code
    assert read_card(tmp_path / "o.safetensors")["min_area"] == 101
    converted = load(tmp_path / "o.safetensors").state_dict()
    assert all(torch.equal(t, converted[name]) for name, t in model.state_dict().items())


# ---- check ----------------------------------------------------------------------------------


class FakeInstallation:
    """What `importlib.metadata` says of covidmask, whether or not it is installed here."""

    def __init__(self, requires):
        self.requires = lambda name: requires

    PackageNotFoundError = metadata.PackageNotFoundError

    def version(self, name):
        return "9.9" if name == "covidmask" else metadata.version(name)


def test_check(run, root):
    fake = FakeInstallation(
        ["torch>=2.2", "tyro>=0.9", 'absent-one>=1; extra == "medical"', 'x; extra == "book"']
    )
    with patch("covidmask.check.metadata", fake):
        lines = run("check")
    assert all(re.match(r"\[(OK|--)\] ", line) for line in lines[:-1])
    text = "\n".join(lines)
    for part in ("covidmask 9.9, Python 3.", f"torch {metadata.version('torch')}, needs >=2.2"):
        assert part in text
    assert "[--] absent-one: absent, needs >=1; optional (medical)" in text
    assert "torchvision, numpy and lightning: fit together" in text and "device: c" in text
    assert f"data folder {root}: can be written" in text and lines[-1] == "All is well"


def test_check_fails_where_something_is_wrong(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COVIDMASK_DATA", str(tmp_path / "not" / "yet"))
    fake = FakeInstallation(["torch>=99", "absent-one>=1"])
    monkeypatch.setattr("covidmask.check.metadata", fake)
    monkeypatch.setattr("torchvision.ops.nms", lambda *_: torch.tensor([0, 1]))
    assert main(["check"]) == 2
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("[FAIL]")]
    assert len(failed) == 3 and lines[-1] == f"3 of {len(lines) - 1} checks failed"
    text = "\n".join(failed)
    for part in (
        "needs >=99",
        "absent-one: absent",
        "nms of torchvision gives a wrong",
    ):
        assert "install covidmask" not in text  # no such project on the package index is ours
        assert part in text
    assert not list(tmp_path.iterdir())  # looking changes nothing


def test_check_tells_what_does_not_fit(capsys, monkeypatch):
    def gone(*_):
        raise RuntimeError("gone\nand more")

    monkeypatch.setattr("covidmask.check.metadata", FakeInstallation([]))
    monkeypatch.setattr("torch.from_numpy", gone)
    assert main(["check"]) == 2
    failed = [line for line in capsys.readouterr().out.splitlines() if line[:6] == "[FAIL]"]
    assert len(failed) == 1 and "numpy and lightning: gone; install torch" in failed[0]


def test_check_without_installation(capsys, monkeypatch):
    fake = FakeInstallation([])

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    fake.version = missing
    monkeypatch.setattr("covidmask.check.metadata", fake)
    assert main(["check"]) == 2
    assert "[FAIL] covidmask is not installed" in capsys.readouterr().out


# ---- several processes ----------------------------------------------------------------------


def test_only_the_first_process_prints_and_writes(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    assert main(["phantoms", "--out", str(tmp_path / "p")]) == 0
    assert main(["evaluate", "segmenter", "--json", str(tmp_path / "e.json")]) == 0
    assert main(["train", "classifier", "--out", str(tmp_path / "c.safetensors")]) == 0
    assert capsys.readouterr().out == ""
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".ckpt"]


@pytest.mark.parametrize("rank", ["", "first"])
def test_a_rank_that_is_no_number(rank, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", rank)
    assert main(["stats", "--data", str(tmp_path / "none")]) == 2
    assert "there is no such data folder" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(root, tmp_path):
    code = (
        f"import sys; sys.path[:0] = [{str(TESTS)!r}]\n"
        "from covidmask import config, cli; import test_cli\n"
        "config.PRESETS['quick'] = test_cli.TINY\n"
        "raise SystemExit(cli.main(sys.argv[1:]))"
    )
    (tmp_path / "program.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    program = [*torchrun, "--standalone", str(tmp_path / "program.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COVIDMASK_DATA": str(root)}
    out = tmp_path / "out" / "s.safetensors"
    done = subprocess.run(
        [*program, "train", "segmenter", "--out", str(out), "--device", "cpu"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    last = [line for line in done.stdout.splitlines() if line.startswith("Segmenter trained on 8")]
    assert len(last) == 1
    assert [p.name for p in out.parent.iterdir()] == ["s.safetensors"]
