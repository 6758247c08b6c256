"""book/reproduce.md: its commands, run in order on stand-ins, and its tables, computed again.

The commands and the Python block are read from the page. The stand-ins have the layout of
COVIDx-CT, of CNCB's masked slices and of the author's release; their weights are random, their
architectures the real ones, but for the large models of two classes, which are small here. Training
runs in the preset `paper` with a tiny detector.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from author_files import author_file
from PIL import Image
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, tiny_training

from covidmask import cli, config
from covidmask.config import PRESETS, ClassifierConfig, DetectorConfig
from covidmask.datasets import classes, public_sets
from covidmask.datasets.patients import make_slice
from covidmask.metrics import report, wilson
from covidmask.models import lesion_mask_rcnn
from covidmask.models.classifier import CovidCTMaskNet
from covidmask.models.weights import read_card

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "book" / "reproduce.md").read_text("utf-8")
BLOCKS = re.findall(r"^```([^\n]*)\n(.*?)^```$", PAGE, re.M | re.S)
INSTALL = ["python3 -m venv .venv", ". .venv/bin/activate", "python -m pip install -e ."]
LINES = [
    line
    for language, block in BLOCKS
    if not language
    for line in block.replace("\\\n", " ").splitlines()
]
COMMANDS = [" ".join(line.split()) for line in LINES if line.startswith("covidmask ")]
(PYTHON,) = (block for language, block in BLOCKS if language == "python")
WORDS = ("Normal", "CP", "NCP")  # of the names in COVIDx-CT, for classes 0, 1, 2
LIGHT = {"n_boxes": 128, "hidden": 512}


def released():
    """Name without suffix -> backbone and lesion classes, from the page's table of files."""
    rows = re.findall(r"^\| `(\w+)\.pth` \| (\w+)(.*?)\| (.*?) \|$", PAGE, re.M)
    found = {name: (kind, more, lesions) for name, kind, more, lesions in rows}
    assert len(found) == 8
    return found


def architecture(name, lesions):
    """Backbone and cut of the stand-in for one of the author's files, and whether it is light."""
    if size := re.search(r"resnet\d+", name):
        return size[0], 1, True
    return ("resnet50", 0, False) if lesions == "merged" else ("resnet18", 2, False)


def stand_in(name, kind, lesions):
    """A model of such an architecture, with random weights."""
    backbone, cut, light = architecture(name, lesions)
    lesions = "merged" if lesions == "merged" else "both"
    detector = DetectorConfig(backbone, cut, lesions, light_mask_head=light)
    if kind == "segmenter":
        return lesion_mask_rcnn(detector)
    settings = ClassifierConfig(**LIGHT) if light else ClassifierConfig()
    # his large classifiers carry a mask branch that is never run
    return CovidCTMaskNet(lesion_mask_rcnn(detector, masks=not light), settings)


def picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    scaled = pixels * 255 if pixels.dtype.kind == "f" else pixels
    Image.fromarray(scaled.astype(np.uint8)).save(path)


def listed(folder, data_set, lists, patch):
    """Lists where `fetch` puts those that it downloads, and their sums in the place of the real."""
    for name, lines in lists.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n")
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in lists}
    files = public_sets.SETS[data_set]["files"]
    assert {name for part in files.values() for name in part} == set(lists)
    table = {address: {name: sums[name] for name in part} for address, part in files.items()}
    patch.setitem(public_sets.SETS[data_set], "files", table)


def covidx_ct(root, patch):
    """As on Kaggle: two training patients of each class with two slices, and one each to judge."""
    lists, author = {}, []
    for split, patients in {"train": (1, 2), "val": (3,), "test": (4,)}.items():
        lines = []
        for label, word in enumerate(WORDS):
            for patient in patients:
                for number in (1, 2) if split == "train" else (1,):
                    rest = f"{10 * label + patient}_{100 + patient}_{number:04}.png"
                    pixels = make_slice(10 * patient + label, label, 64)[0]
                    picture(root / f"downloads/covidxct/2A_images/{word}_{rest}", pixels)
                    lines.append(f"{word}_{rest} {label} 1 2 60 61")
                    if split == "train":
                        author.append(f"{label}_{rest}")
        lists[f"{split}_COVIDx_CT-1.txt"] = lines
    lists["train_split_classification.txt"] = author
    listed(root / "data/covidx-ct/lists", "covidx-ct", lists, patch)


def cncb_lesions(root, patch):
    """An archive with image/ and mask/ of six patients, two of them to judge."""
    lists = {}
    for split, patients in {"train": range(4), "test": (8, 9)}.items():
        names = [f"{patient}_{20 + number}.jpg" for patient in patients for number in range(2)]
        names = names[:: 1 if split == "train" else 2]
        for seed, name in enumerate(names):
            image, mask = make_slice(100 + seed, 2, 128, position=0.6)
            place = name.replace("_", "/").removesuffix(".jpg")
            picture(root / f"masks/image/{place}.jpg", image)
            picture(root / f"masks/mask/{place}.png", mask)
        lists[f"{split}_split_segmentation.txt"] = names
    (root / "downloads").mkdir(exist_ok=True)
    with zipfile.ZipFile(root / "downloads/masked_slices.zip", "w") as archive:
        for path in sorted((root / "masks").rglob("*.*")):
            archive.write(path, f"any/{path.relative_to(root / 'masks')}")
    listed(root / "data/cncb-lesions/lists", "cncb-lesions", lists, patch)


def say(argv):
    """What one command prints; it must end well."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(argv)
    assert status == 0, f"{shlex.join(argv)}: {err.getvalue()}"
    return out.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Everything on the page, in order: the folder, and what each command and the block said."""
    root, printed = tmp_path_factory.mktemp("reproduce"), {}
    sample = classes.balanced_sample
    tiny = replace(
        PRESETS["paper"],
        detector=TINY_DETECTOR,
        segmenter=tiny_training(epochs=1),
        classifier=TINY_CLASSIFIER,
        classifier_training=tiny_training(epochs=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("COVIDMASK_DATA", raising=False)
        patch.setattr(os, "fsync", lambda file: None)  # nobody waits for a disk that is thrown away
        patch.setitem(config.PRESETS, "paper", tiny)
        few = lambda part, count, seed=0, **how: sample(part, min(count, 2), seed, **how)  # noqa: E731
        patch.setattr(classes, "balanced_sample", few)
        covidx_ct(root, patch)
        cncb_lesions(root, patch)
        torch.manual_seed(0)
        (root / "released").mkdir()
        anchors = DetectorConfig().anchor_sizes, DetectorConfig().anchor_ratios
        for name, (kind, _, lesions) in released().items():
            author_file(root / f"released/{name}.pth", stand_in(name, kind, lesions), *anchors)
        for command in COMMANDS:
            printed[command] = say(shlex.split(command)[1:])
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(PYTHON, "book/reproduce.md", "exec"), {})
        printed["python"] = out.getvalue()
    yield root, printed
    shutil.rmtree(root)  # hundreds of megabytes of random weights


def test_the_page_has_no_other_commands():
    others = [line for line in LINES if line.strip() and not line.startswith("covidmask ")]
    assert others == INSTALL
    code = [
        line for language, block in BLOCKS if "{" not in language for line in block.splitlines()
    ]
    assert max(map(len, code)) <= 76
    assert len(COMMANDS) == len(set(COMMANDS))


@pytest.mark.slow
def test_every_command_writes_what_it_names(run):
    root, printed = run
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        named = [words[i + 1] for i, word in enumerate(words) if word in ("--out", "--json")]
        if words[0] == "convert":
            named.append(words[2])
        if words[0] == "fetch":
            named.append(f"data/{words[1]}")
        assert named or words[0] == "check", command
        for name in named:
            assert (root / name).exists(), command
            assert name in printed[command]
    missing = root / "data/covidx-ct/missing.txt"
    assert missing.exists() and not missing.read_text().strip()
    slices = root / "data/covidx-ct/slices"
    assert {f"{split}.txt" for split in ("train", "val", "test")} <= {
        p.name for p in slices.iterdir()
    }
    assert not list(root.glob("weights/*.ckpt")) and list(root.glob("data/ranked/*"))


@pytest.mark.slow
def test_the_last_step_prints_confusion_matrices(run):
    root, printed = run
    judged = [c for c in COMMANDS if "evaluate classifier" in c]
    assert len(judged) == 4 + 3
    for command in judged:
        text = printed[command]
        assert "Confusion matrix in slices (rows: true class" in text
        assert "drawing whole patients" in text and "3 slices of 3 patients" in text
        found = json.loads((root / command.split("--json ")[1]).read_text())
        assert np.array(found["confusion"]).sum(1).tolist() == [1, 1, 1]
    assert printed["python"].count("your confusion matrix, and yours - published") == 2
    assert printed["python"].count("published 0.9") == 2


@pytest.mark.slow
def test_models_are_read_off_the_files(run):
    root, printed = run
    for name, (kind, _, lesions) in released().items():
        (command,) = (c for c in COMMANDS if c.startswith(f"covidmask convert released/{name}.pth"))
        text, (backbone, cut, light) = printed[command], architecture(name, lesions)
        lesion = "merged" if lesions == "merged" else "both"
        assert f"backbone='{backbone}', cut={cut}, lesions='{lesion}'" in text
        assert f"light_mask_head={light}" in text
        if kind == "classifier":
            assert f"n_boxes={128 if light else 256}" in text
        file = root / f"weights/{name}.safetensors"
        assert read_card(file)["min_area"] == 101
        if "two_classes" not in name:
            about = {"34": 46, "18": 24}.get(name[-5:-3], 127)  # MB, as the page says
            assert f"{about} MB" in PAGE
            assert file.stat().st_size / 1e6 == pytest.approx(about, rel=0.05)


@pytest.mark.slow
def test_segmenters_are_judged_as_the_page_says(run):
    root, _ = run
    for command in (c for c in COMMANDS if "evaluate segmenter" in c):
        options = dict(re.findall(r"--([\w-]+) (\S+)", command))
        found = json.loads((root / options["json"]).read_text())
        assert {"author_ap50", "author_ap75", "author_ap"} <= set(found)
        assert found["mask_threshold"] == float(options["mask-threshold"]) == 0.622
        assert found["score"] == float(options.get("score", 0.75))
        assert found["nms"] == float(options.get("nms", 0.75))
        assert found["min_area"] == 101
    assert torch.tensor(0.5).sigmoid().item() == pytest.approx(0.622, abs=1e-3)


def test_options_of_light_models():
    """Those that the text gives make the models that the author released."""
    text = " ".join(PAGE.split())
    detector = re.search(r"`(--detector.backbone resnet34 [^`]*)`", text)[1]
    s = re.search(r"`(--classifier.n-boxes [^`]*)`", text)[1]
    train = ["train", "segmenter", "--preset", "paper", *detector.split()]
    assert cli._parse(train).detector == DetectorConfig("resnet34", 1, light_mask_head=True)
    train = ["train", "classifier", "--preset", "paper", *s.split()]
    assert cli._parse(train).classifier == ClassifierConfig(**LIGHT)
    assert cli._parse([*train, "--no-validation"]).validation is False


# ---- the tables -----------------------------------------------------------------------------


def table(name):
    """Rows of the table between two comments, without its head."""
    text = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE, re.S)[1]
    rows = [[cell.strip("` ") for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {first: rest for first, *rest in rows[2:]}


OLD = [[8703, 738, 9], [406, 6767, 213], [14, 386, 3946]]  # of an older README


def matrices():
    space: dict = {}
    exec(PYTHON[PYTHON.index("published = {") : PYTHON.index("for name, matrix")], space)
    return space["published"]


def percent(values):
    return [f"{100 * value:.2f}" for value in values]


def test_published_results_follow_from_the_matrices():
    rows = table("released")
    for name, matrix in matrices().items():
        found = report(matrix)
        assert found["support"] == [9450, 7395, 4346]
        assert rows[name] == percent([*found["sensitivity"], found["accuracy"]])
    assert set(rows) == {name for name, (kind, *_) in released().items() if kind == "classifier"}
    support = np.array([9450, 7395, 4346])
    for row in [*rows.values(), *table("table 2").values()]:
        *sensitivities, accuracy = map(float, row)
        assert support @ sensitivities / support.sum() == pytest.approx(accuracy, abs=0.01)
    old = report(OLD)
    assert table("table 2")["heads + BN"] == percent([*old["sensitivity"], old["accuracy"]])
    # "accuracy 0.45, 0.35 or 0.21" where all slices are given one class
    shares = [f"{share:.2f}" for share in support / support.sum()]
    assert f"accuracy {shares[0]}, {shares[1]} or {shares[2]} " in PAGE


def test_intervals():
    patients = int(table("counts")["test"][1])
    for row, matrix in zip(table("intervals").values(), [*matrices().values(), OLD], strict=True):
        right, n = int(np.trace(matrix)), int(np.sum(matrix))
        ends = wilson(right, n), wilson(round(right / n * patients), patients)
        assert row == [
            f"{right:,} of {n:,}",
            f"{100 * right / n:.2f}",
            "{:.2f} to {:.2f}".format(*(100 * end for end in ends[0])),
            "{:.1f} to {:.1f}".format(*(100 * end for end in ends[1])),
        ]
    assert f"about {21191 / patients:.0f} each" in PAGE


def test_hours_follow_from_the_measured_steps():
    """Within a tenth, so that a repeated benchmark need not change the page."""
    unit = {"min": 60, "h": 3600}
    for column, file in ((1, "benchmarks-cuda.json"), (2, "benchmarks.json")):
        measured = json.loads((ROOT / "results" / file).read_text("utf-8"))["32-true"]
        large, light = measured["ResNet-50"], measured["ResNet-18 cut 1"]
        expected = [
            21191 * large["inference"]["ours"],
            21191 * light["inference"]["ours"],
            (3000 + 21036) * large["heads_only"]["seconds_rank_a_slice"],
            50 * 3000 / 8 * large["step"]["heads_bn"]["ours"],
            50 * 3000 / 8 * large["step"]["full"]["ours"],
            50 * 21036 * large["inference"]["ours"],
        ]
        for row, seconds in zip(table("hours").values(), expected, strict=True):
            value, name = row[column].split()
            assert float(value) * unit[name] == pytest.approx(seconds, rel=0.1), row


def test_disk():
    assert 27 < 104_009 * 512**2 / 1e9 < 28 and 1500 * 512**2 / 1e9 < 0.4
    assert f"({24_036 * 256 * 5 * 4 / 1e6:.0f} MB)" in PAGE  # ranked boxes, float32


def test_items_of_paper_v_code_are_there():
    text = (ROOT / "book" / "py" / "paper_v_code.py").read_text("utf-8")
    last = PAGE[PAGE.index("## What is known to differ") :]
    numbers = re.findall(r"^\| ([\d, ]+) \|", last, re.M)
    assert len(numbers) == 10
    for number in ",".join(numbers).replace(" ", "").split(","):
        assert f"# ### {number}. " in text
