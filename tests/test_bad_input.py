"""Bad input through the command line: status 2, one sentence that names the file, nothing left."""

import builtins
import errno
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from author_files import Payload, author_file
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from scan_files import write_series
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, tiny_training

from covidmask import config
from covidmask.cli import main
from covidmask.config import PhantomConfig
from covidmask.datasets.phantom_sets import write_phantoms
from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import load_segmenter, save_model
from covidmask.training import loop

TINY = replace(
    config.PRESETS["quick"],
    phantoms=PhantomConfig(64, 1, (4, 1, 1), (2, 1, 1)),
    detector=TINY_DETECTOR,
    segmenter=tiny_training(epochs=1),
    classifier=TINY_CLASSIFIER,
    classifier_training=tiny_training(epochs=1),
)


@pytest.fixture(autouse=True, scope="module")
def whole(tmp_path_factory):
    """A folder in which everything is as it should be; every test spoils a copy."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    segmenter = lesion_mask_rcnn(TINY_DETECTOR)
    write_phantoms(folder / "data", TINY.phantoms, progress=False)
    save_model(segmenter, folder / "seg.safetensors", min_area=7)
    save_model(covid_ct_mask_net(segmenter, TINY_CLASSIFIER), folder / "cls.safetensors")
    anchors = TINY_DETECTOR.anchor_sizes, TINY_DETECTOR.anchor_ratios
    author_file(folder / "author.pth", segmenter, *anchors)
    image, _ = next((folder / "data" / "slices").glob("NCP*.png")), (folder / "out").mkdir()
    shutil.copy(image, folder / "scan.png")
    (folder / "out" / "kept.txt").write_text("was here before")
    (folder / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(config.PRESETS, "quick", TINY)
        yield folder


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    """The copy, as the working folder: commands below name files relative to it."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    """Every file and folder, hidden ones too, with what is in it; but not the ranked boxes.

    The next training goes on from them, so a run that fails leaves them on purpose.
    """
    ranked = folder / "data" / "ranked"
    kept = {ranked, *ranked.glob("ranked-*.npy"), *ranked.glob(".ranked-*.npy")}
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path not in kept
    }


def fails(command, here, capsys, *words):
    """Run a command that must fail; return its sentence."""
    before = contents(here)
    capsys.readouterr()
    status = main(command.split())
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    errors = [line for line in lines if "covidmask: error:" in line]
    assert status == 2
    assert "Traceback" not in captured.err and "Traceback" not in captured.out
    assert len(errors) == 1 and lines[-1] == errors[0] and errors[0].startswith("covidmask: error:")
    missing = [word for word in words if word not in errors[0]]
    assert not missing, errors[0]
    after = contents(here)
    assert set(after) == set(before)
    assert after == before
    return errors[0]


SEGMENTER = "train segmenter --data data --out out/new.safetensors --device cpu"
CLASSIFIER = (
    "train classifier --data data --segmenter seg.safetensors --out out/new.safetensors"
    " --device cpu"
)
PREDICT = "predict {} --segmenter seg.safetensors --classifier cls.safetensors --out out"
CONVERT = "convert author.pth out/new.safetensors"


# ---- data -----------------------------------------------------------------------------------


def first(folder, pattern):
    return sorted(folder.glob(pattern))[0]


def pick(here, part):
    """A training slice of lesions/, image or mask, and the name that its list gives it."""
    name = (here / "data/lesions/train.txt").read_text().split()[0]
    patient, piece = name.split("_")
    return here / "data/lesions" / part / patient / piece, name


def no_mask(here):
    path, name = pick(here, "mask")
    path.unlink()
    return SEGMENTER, name.split("_")[1], "without a mask"


def mask_of_another_size(here):
    path, _ = pick(here, "mask")
    Image.fromarray(np.zeros((32, 64), dtype=np.uint8)).save(path)
    return SEGMENTER, str(path.relative_to(here)), "64 x 32", "64 x 64"


def mask_codes(here):
    path, _ = pick(here, "mask")
    Image.fromarray(np.full((64, 64), 7, dtype=np.uint8)).save(path)
    return SEGMENTER, str(path.relative_to(here)), "[7]", "0..3"


def mask_codes_in_a_worker(here):
    return (SEGMENTER + " --workers 1", *mask_codes(here)[1:])


def mask_codes_in_stats(here):
    return ("stats --data data --json out/new.json", *mask_codes(here)[1:])


def damaged_training_slice(here):
    path, _ = pick(here, "image")
    path.write_bytes(path.read_bytes()[:500])
    return SEGMENTER, str(path.relative_to(here)), "truncated"


def damaged_class_slice(here):
    name = (here / "data/slices/train.txt").read_text().split()[0]
    path = here / "data/slices" / name
    path.write_bytes(path.read_bytes()[:500])
    return CLASSIFIER, name, "truncated"


def damaged_test_slice(here):
    name = (here / "data/slices/test.txt").read_text().split()[0]
    (here / "data/slices" / name).write_bytes(b"")
    return "evaluate classifier --data data --weights cls.safetensors --json out/new.json", name


def truncated(suffix):
    def spoil(here):
        path = here / f"cut{suffix}"
        Image.open(here / "scan.png").save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return PREDICT.format(f"scan.png {path.name}"), path.name, "truncated"

    return spoil


def text_called_png(here):
    (here / "notes.png").write_text("this is no picture")
    return PREDICT.format("notes.png"), "notes.png", "no image"


def one_pixel(here):
    Image.fromarray(np.zeros((1, 1), dtype=np.uint8)).save(here / "dot.png")
    return PREDICT.format("dot.png"), "dot.png", "1 x 1"


def not_finite(value):
    def spoil(here):
        pixels = np.full((16, 16), 0.5, dtype=np.float32)
        pixels[3, 4] = value
        Image.fromarray(pixels).save(here / "float.tif")
        return PREDICT.format("float.tif"), "float.tif", "NaN or infinite"

    return spoil


def no_image(here):
    return PREDICT.format("gone.png"), "gone.png", "No such file"


def bad_image_before_bad_weights(here):
    (here / "notes.png").write_text("this is no picture")
    (here / "seg.safetensors").write_bytes(b"")
    return PREDICT.format("scan.png notes.png"), "notes.png"


def nothing_to_predict(here):
    return PREDICT.format(""), "no image"


def lists(folder, split, text, command, *words):
    def spoil(here):
        (here / "data" / folder / f"{split}.txt").write_text(text)
        return (command, f"{folder}/{split}.txt", *words)

    return spoil


def class_missing(here):
    path = here / "data/slices/train.txt"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("CP_")]
    path.write_text("\n".join(lines))
    return CLASSIFIER, "slices/train.txt", "Common pneumonia"


def fixed(command, *words):
    return lambda here: (command, *words)


def cut_series(here):
    path = write_series(here / "scan", 3) / "Secret_Person_0001"
    path.write_bytes(path.read_bytes()[:-50])
    return PREDICT.format("scan"), "scan/Secret_Person_0001", "decoded"


def scan_without_slice(options, *words):
    def spoil(here):
        write_series(here / "scan", 3)
        return (f"{PREDICT.format('scan')} {options}", *words)

    return spoil


EVALUATE = "evaluate {} --data data --weights {}.safetensors"
DATA = {
    "missing folder: train segmenter": fixed(
        "train segmenter --data gone --out out/n.safetensors", "gone", "covidmask phantoms"
    ),
    "missing folder: train classifier": fixed(
        CLASSIFIER.replace("--data data", "--data gone"), "gone", "covidmask phantoms"
    ),
    "missing folder: stats": fixed("stats --data gone", "gone", "no such data folder"),
    "missing folder: evaluate": fixed(
        "evaluate segmenter --data gone --weights seg.safetensors", "gone"
    ),
    "folder of something else: stats": fixed("stats --data out", "out", "no data"),
    "folder of something else: train": fixed(
        "train segmenter --data out --out out/n.safetensors", "out/image"
    ),
    "missing list": fixed(EVALUATE.format("segmenter", "seg") + " --split extra.txt", "extra.txt"),
    "image without mask": no_mask,
    "mask of another size": mask_of_another_size,
    "mask codes": mask_codes,
    "mask codes, read by a worker process": mask_codes_in_a_worker,
    "mask codes: stats": mask_codes_in_stats,
    "truncated slice with mask": damaged_training_slice,
    "truncated slice with class": damaged_class_slice,
    "empty slice file: evaluate": damaged_test_slice,
    "truncated PNG": truncated(".png"),
    "truncated JPEG": truncated(".jpg"),
    "text called .png": text_called_png,
    "image of one pixel": one_pixel,
    "NaN": not_finite(np.nan),
    "infinity": not_finite(np.inf),
    "missing image": no_image,
    "images come before weights": bad_image_before_bad_weights,
    "no image named": nothing_to_predict,
    "slice name that does not parse": lists(
        "slices", "train", "Normal_1.png\n", CLASSIFIER, "line 1", "Normal_1.png"
    ),
    "split line that does not parse": lists(
        "slices", "train", "NCP_1_1_1.png 2 a b c d\n", CLASSIFIER, "line 1", "literal", "'a'"
    ),
    "lesion line that does not parse": lists(
        "lesions", "train", "nonsense\n", SEGMENTER, "not on disk", "nonsense"
    ),
    "empty split of masks": lists("lesions", "train", "\n", SEGMENTER, "empty"),
    "empty split of classes": lists("slices", "train", "", CLASSIFIER, "empty"),
    "empty validation split": lists("slices", "val", "", CLASSIFIER, "empty"),
    "empty test split": lists("slices", "test", "", EVALUATE.format("classifier", "cls"), "empty"),
    "class missing from the training split": class_missing,
    "series with a cut file": cut_series,
    "slices that a scan does not have": scan_without_slice("--slices 2-9", "no slices '2-9'"),
    "window of no width": scan_without_slice("--window 40 0", "window 40 0", "above 0"),
    "folder without a scan": fixed(PREDICT.format("empty"), "empty: holds no axial CT slice"),
    "no source of COVIDx-CT": fixed("fetch covidx-ct --from gone --out out", "gone", "name a"),
    "no archive": fixed("fetch cncb-lesions --from scan.png --out out", "scan.png: is no archive"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case, here, capsys):
    command, *words = DATA[case](here)
    fails(command, here, capsys, *words)


# ---- weights and checkpoints ----------------------------------------------------------------


def read_tensors(path):
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


def other_shape(here):
    state, header = read_tensors(here / "seg.safetensors")
    state["roi_heads.box_head.fc7.weight"] = torch.zeros(3, 5)
    del state["rpn.head.cls_logits.bias"]
    save_file(state, here / "seg.safetensors", header)
    words = ("fc7.weight: copying", "Size([3, 5])", "Size([32, 32])", "rpn.head.cls_logits.bias")
    return (EVALUATE.format("segmenter", "seg"), "seg.safetensors", *words)


def other_backbone(here):
    """The weights of one model with the configuration of another."""
    _, header = read_tensors(here / "seg.safetensors")
    values = json.loads(header["covidmask"])
    values["detector"]["cut"] = 1
    state, _ = read_tensors(here / "seg.safetensors")
    save_file(state, here / "seg.safetensors", {"covidmask": json.dumps(values)})
    return CLASSIFIER, "seg.safetensors", "backbone.body.layer3", "another architecture"


def other_version(here):
    state, header = read_tensors(here / "seg.safetensors")
    values = json.loads(header["covidmask"])
    values["detector"]["colour"] = "red"
    save_file(state, here / "seg.safetensors", {"covidmask": json.dumps(values)})
    return CLASSIFIER, "seg.safetensors", "colour"


def cut_file(name, command):
    def spoil(here):
        content = (here / name).read_bytes()
        (here / name).write_bytes(content[: len(content) // 2])
        return command, name

    return spoil


def foreign_program(here):
    save_file({"a": torch.zeros(1)}, here / "cls.safetensors")
    return PREDICT.format("scan.png"), "cls.safetensors", "another program"


def classifier_for_segmenter(here):
    return (
        PREDICT.format("scan.png").replace("seg.saf", "cls.saf"),
        "cls.safetensors",
        "holds a classifier; give a segmenter",
    )


def payload(zipped):
    def spoil(here):
        content = {"model_weights": {}, "anchor_generator": Payload(here / "marker")}
        torch.save(content, here / "author.pth", _use_new_zipfile_serialization=zipped)
        return CONVERT, "author.pth", "system"

    return spoil


def author_other_shape(here):
    segmenter = load_segmenter(here / "seg.safetensors")
    segmenter.roi_heads.box_head.fc7 = torch.nn.Linear(32, 33)
    anchors = TINY_DETECTOR.anchor_sizes, TINY_DETECTOR.anchor_ratios
    author_file(here / "author.pth", segmenter, *anchors)
    return CONVERT, "author.pth", "fc7.weight: copying a param with shape torch.Size([33, 32])"


def author_not_his(here):
    content = {"model_weights": {"conv.weight": torch.zeros(2)}, "anchor_generator": {}}
    torch.save(content, here / "author.pth")
    return CONVERT, "author.pth"


WEIGHTS = {
    "missing weights": fixed(EVALUATE.format("classifier", "none"), "none.safetensors"),
    "tensor of another shape": other_shape,
    "weights of another backbone": other_backbone,
    "configuration of another version": other_version,
    "truncated segmenter": cut_file("seg.safetensors", CLASSIFIER),
    "truncated classifier": cut_file("cls.safetensors", PREDICT.format("scan.png")),
    "weights of another program": foreign_program,
    "classifier given as segmenter": classifier_for_segmenter,
    "author's file given as weights": fixed(
        "evaluate segmenter --data data --weights author.pth", "author.pth", "covidmask convert"
    ),
    "truncated author's file": cut_file("author.pth", CONVERT),
    "foreign code in an author's file, new format": payload(True),
    "foreign code in an author's file, old format": payload(False),
    "author's file of another architecture": author_other_shape,
    "not the author's file": author_not_his,
    "missing author's file": fixed(CONVERT.replace("author", "gone"), "gone.pth"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case, here, capsys):
    command, *words = WEIGHTS[case](here)
    fails(command, here, capsys, *words)


def interrupted_run(here, *options):
    """Leave out/new.ckpt as a crash after the first epoch does."""
    save = loop.save_checkpoint

    def interrupted(path, state):
        save(path, state)
        raise KeyboardInterrupt

    with patch.object(loop, "save_checkpoint", interrupted):
        assert main([*SEGMENTER.split(), *options]) == 130
    return here / "out" / "new.ckpt"


def test_checkpoint_of_another_run(here, capsys):
    interrupted_run(here, "--seed", "1")
    fails(SEGMENTER, here, capsys, "out/new.ckpt", "another run", "seed was 1, is 0")


def test_checkpoint_of_another_architecture(here, capsys, monkeypatch):
    interrupted_run(here)
    other = replace(TINY_DETECTOR, cut=1)
    monkeypatch.setitem(config.PRESETS, "quick", replace(TINY, detector=other))
    message = fails(SEGMENTER, here, capsys, "out/new.ckpt", "another run", "'cut': 2", "'cut': 1")
    assert "name another checkpoint" in message


def test_truncated_checkpoint(here, capsys):
    path = interrupted_run(here)
    path.write_bytes(path.read_bytes()[:5000])
    fails(SEGMENTER, here, capsys, "out/new.ckpt", "truncated")


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_with_foreign_code(zipped, here, capsys):
    content = {"run": {}, "model": Payload(here / "marker")}
    torch.save(content, here / "out/new.ckpt", _use_new_zipfile_serialization=zipped)
    fails(SEGMENTER, here, capsys, "out/new.ckpt", "more than plain data")  # and no marker


# ---- output that cannot be written ----------------------------------------------------------


@pytest.fixture
def break_disk(monkeypatch):
    """Make a folder refuse files: at once (EACCES), or when bytes come (ENOSPC). Root may too."""

    def break_disk(folder, code, only=""):
        real_open, real_mkdir = io.open, os.mkdir

        def affected(path):
            path = Path(os.path.abspath(path))
            return folder in path.parents and only in path.name

        class Full(io.FileIO):
            def write(self, data):
                raise OSError(code, os.strerror(code))

        def guarded_open(file, mode="r", *args, **kwargs):
            writing = set(mode) & set("wax+") and not isinstance(file, int)
            if not (writing and affected(file)):
                return real_open(file, mode, *args, **kwargs)
            if code == errno.EACCES:
                raise OSError(code, os.strerror(code))
            binary = Full(os.fspath(file), "w")
            return binary if "b" in mode else io.TextIOWrapper(io.BufferedWriter(binary))

        def guarded_mkdir(path, *args, **kwargs):
            if code == errno.EACCES and affected(path):
                raise OSError(code, os.strerror(code))
            return real_mkdir(path, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", guarded_open)
        monkeypatch.setattr(io, "open", guarded_open)
        monkeypatch.setattr(Path, "open", guarded_open)  # Python 3.10 keeps its own `io.open`
        monkeypatch.setattr(os, "mkdir", guarded_mkdir)

    return break_disk


OUTPUTS = {  # command -> the file or folder that its message names
    "phantoms --out out/new --workers 1": "out/new",
    SEGMENTER: "out/",
    CLASSIFIER: "out/",
    PREDICT.format("scan.png"): "out/scan_lesions.png",
    CONVERT: "out/",
    "stats --data data --json out/new.json": "out/",
    EVALUATE.format("classifier", "cls") + " --json out/new.json": "out/",
    "fetch covid-semiseg --source http://127.0.0.1:9 --out out": "out/TERMS.txt",
    "fetch covidx-ct --from data --out out": "out/TERMS.txt",
    "fetch cncb-lesions --from data --out out": "out/TERMS.txt",
}


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC], ids=["EACCES", "ENOSPC"])
@pytest.mark.parametrize("command", OUTPUTS, ids=lambda c: " ".join(c.split()[:2]))
def test_no_permission_or_full_disk(command, code, here, capsys, break_disk):
    break_disk(here / "out", code)
    fails(command, here, capsys, OUTPUTS[command], os.strerror(code), "cannot be written")


FULL_LATER = {  # command, the suffix whose write finds the disk full -> the file it names
    (SEGMENTER, ".safetensors"): "out/new.safetensors",
    (SEGMENTER, ".ckpt"): "out/new.ckpt",
    (CLASSIFIER, ".safetensors"): "out/new.safetensors",
    (CLASSIFIER, ".ckpt"): "out/new.ckpt",
    (PREDICT.format("scan.png"), ".csv"): "out/predictions.csv",
    ("stats --data data --json out/new.json", ".json"): "out/new.json",
    ("phantoms --out out/new --workers 1", ".txt"): "out/new",
}


@pytest.mark.parametrize("case", FULL_LATER, ids=lambda c: f"{' '.join(c[0].split()[:2])} {c[1]}")
def test_disk_full_after_the_work(case, here, capsys, break_disk):
    command, suffix = case
    break_disk(here / "out", errno.ENOSPC, only=suffix)
    if suffix == ".safetensors":  # the checkpoint is whole: the same command goes on from it
        assert main(command.split()) == 2
        assert f"{FULL_LATER[case]}: cannot be written" in capsys.readouterr().err
        assert sorted(os.listdir("out")) == ["kept.txt", "new.ckpt"]
    elif suffix == ".csv":  # the picture before it is whole, too
        assert main(command.split()) == 2
        assert f"{FULL_LATER[case]}: cannot be written" in capsys.readouterr().err
        assert sorted(os.listdir("out")) == ["kept.txt", "scan_lesions.png"]
    else:
        fails(command, here, capsys, FULL_LATER[case], os.strerror(errno.ENOSPC))


def test_after_a_full_disk_the_run_goes_on(here, capsys, break_disk, monkeypatch):
    break_disk(here / "out", errno.ENOSPC, only=".safetensors")
    assert main(SEGMENTER.split()) == 2
    monkeypatch.undo()  # of the broken disk, and of the working folder
    monkeypatch.chdir(here)
    assert main(SEGMENTER.split()) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "Going on from out/new.ckpt"
    assert sorted(os.listdir("out")) == ["kept.txt", "new.safetensors"]


def test_weights_file_that_is_a_folder(here, capsys):
    (here / "out" / "new.safetensors").mkdir()
    fails(SEGMENTER, here, capsys, "out/new.safetensors: is a folder or device", "--out")
    fails(CONVERT, here, capsys, "out/new.safetensors: is a folder or device", "OUT")


SAME = {  # the file that is read -> commands that would write there
    "seg.safetensors": (
        CLASSIFIER.replace("out/new", "seg"),
        CLASSIFIER + " --checkpoint seg.safetensors",
        CLASSIFIER.replace("out/new", "soft"),
        CLASSIFIER.replace("out/new", "hard"),
        "convert seg.safetensors seg.safetensors",
        "convert seg.safetensors ./out/../hard.safetensors",
    ),
    "out/new.safetensors": (SEGMENTER + " --checkpoint out/../out/new.safetensors",),
    "list.json": (
        "evaluate segmenter --data data --weights seg.safetensors"
        " --split list.json --json list.json",
    ),
    "phantoms.json": ("stats --data data --json data/phantoms.json",),
    "w.json": ("evaluate segmenter --data data --weights w.json --json w.json",),
}


@pytest.mark.parametrize("name", SAME)
def test_output_over_an_input(name, here, capsys):
    (here / "soft.safetensors").symlink_to(here / "seg.safetensors")
    (here / "hard.safetensors").hardlink_to(here / "seg.safetensors")
    shutil.copy(here / "seg.safetensors", here / "w.json")
    shutil.copy(here / "data/lesions/test.txt", here / "list.json")
    for command in SAME[name]:
        fails(command, here, capsys, "one file; name another one")


def test_numbers_over_something_else(here, capsys):
    for path in ("data/lesions/train.txt", "scan.png", "seg.safetensors"):
        fails(f"stats --data data --json {path}", here, capsys, path, "end in .json")


def test_weights_named_as_the_working_folder(here, capsys):
    fails(SEGMENTER.replace("out/new.safetensors", "."), here, capsys, ".: is a folder", "--out")
    fails(SEGMENTER.replace("new.safetensors", "new"), here, capsys, "end in .safetensors")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs Unix")
def test_devices(here, capsys):
    fails(SEGMENTER + " --checkpoint /dev/zero", here, capsys, "/dev/zero: is a folder or device")
    command = "evaluate segmenter --data data --weights seg.safetensors --split /dev/zero"
    fails(command, here, capsys, "/dev/zero: this is a folder, pipe or device")


def test_data_that_is_a_file(here, capsys):
    fails("stats --data scan.png", here, capsys, "scan.png: there is no such data folder")


def test_phantoms_whose_note_is_a_list(here, capsys):
    (here / "odd").mkdir()
    (here / "odd" / "phantoms.json").write_text("[1]")
    fails("phantoms --out odd", here, capsys, "odd: holds other files")


def test_folder_for_pictures_that_is_a_file(here, capsys):
    command = PREDICT.format("scan.png").replace("--out out", "--out seg.safetensors")
    fails(command, here, capsys, "seg.safetensors/scan_lesions.png: cannot be written")


def test_json_that_is_a_folder(here, capsys):
    fails("stats --data data --json out", here, capsys, "out: is a folder", "--json")
