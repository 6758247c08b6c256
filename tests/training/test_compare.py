"""Every system of `covidmask compare`, tiny: it trains, is judged, saved and read back."""

import json
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from sklearn.metrics import roc_auc_score
from tiny import TINY_CLASSIFIER, TINY_DETECTOR

from covidmask.cli import main
from covidmask.config import PhantomConfig, TrainingConfig
from covidmask.datasets import open_lesions, open_slices, write_phantoms
from covidmask.errors import CheckpointError, DataError, OutputError
from covidmask.models import fit_area_classifier, lesion_mask_rcnn, save_model
from covidmask.models.ranked_boxes import propose, rank_boxes, run_box_head
from covidmask.models.systems import (
    BoxMaps,
    ImageClassifier,
    LinearReader,
    PooledMaps,
    load_system,
    save_system,
    with_lungs,
)
from covidmask.training import compare
from covidmask.training.classification import logits_of

pytest.importorskip("segmentation_models_pytorch", reason="covidmask[systems] is not installed")
FIT = TrainingConfig(epochs=1, batch_size=4, lr=1e-3)
BUDGET = compare.Budget(FIT, FIT, FIT, TINY_DETECTOR, TINY_CLASSIFIER, size=64)
SYSTEMS = ("heads", "heads_bn", "full", "scores", "mask", "faster", "maps", "inside", "areas",
           "unet", "fcn", "resnet18", "mobilenet_v2+lungs", "timm/resnet10t")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    size = PhantomConfig(64, 2, (3, 1, 1), (3, 1, 2))
    return write_phantoms(tmp_path_factory.mktemp("compare"), size, progress=False)


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    """The slices without the third class, as a data set of two."""
    source, root = folder / "slices", tmp_path_factory.mktemp("two")
    (root / "classes.txt").write_text("Normal\nCP\n", encoding="utf-8")
    for split in ("train", "test"):
        lines = [line for line in (source / f"{split}.txt").read_text().splitlines()
                 if not line.startswith("NCP")]  # fmt: skip
        (root / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
        for line in lines:
            name = line.split()[0]
            (root / name).write_bytes((source / name).read_bytes())
    return root


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return lesion_mask_rcnn(TINY_DETECTOR).eval()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", SYSTEMS)
def test_each_system_trains_and_comes_back(name, classes, folder, two, detector, tmp_path):
    root = folder if classes == 3 else two
    train, test = (open_slices(root, split) for split in ("train", "test"))
    lesions = open_lesions(folder, "train")
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    options = {"budget": BUDGET, "detector": detector, "lesions": lesions, "progress": False}
    row = compare.row_of(name, [(train, test)], keep=tmp_path / "w.safetensors", **options)
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())
    assert 0 < row["trained"] <= row["parameters"] and row["ms"] > 0 and row["seconds"] > 0
    assert 0 <= row["accuracy"] <= 1 and 0 <= row["auc"] <= 1 and row["n"] == len(test)
    assert len(row["sensitivity"]) == len(row["ppv"]) == classes
    again = load_system(tmp_path / "w.safetensors")
    logits = logits_of(again, test, progress=False)
    assert logits.shape == (len(test), classes) and logits.isfinite().all()
    assert "".join(map(str, logits.argmax(1).tolist())) == row["predictions"]
    shares = logits.softmax(1)[:, 1:]
    torch.testing.assert_close(shares, torch.tensor(row["probabilities"]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t", "mobilenet_v2+lungs"])
def test_every_weight_of_an_ordinary_classifier_gets_a_gradient(name, folder):
    slices = open_slices(folder, "train")
    network, plus, _ = name.partition("+")
    model = ImageClassifier(network, slices.classes, 64, lungs=bool(plus)).train()
    images = [slices[i][0] for i in range(4)]
    model(images).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    dead = [name for name, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    # timm begins each block as the identity: what is before its last scale learns a step later
    assert not dead or (name.startswith("timm") and len(dead) < 30), dead


def test_a_linear_reader_is_the_logistic_regression_that_it_was_fitted_to(folder, detector):
    slices = open_slices(folder, "train")
    reader = LinearReader(PooledMaps(detector), slices.classes)
    rows = torch.cat([reader.features([slices[i][0]]) for i in range(len(slices))])
    assert rows.shape == (len(slices), 2 * TINY_DETECTOR.fpn_channels)
    reader.fit(rows, slices.labels)
    expected = fit_area_classifier(rows.numpy(), slices.labels).predict_proba(rows.numpy())
    found = logits_of(reader, slices, progress=False).softmax(1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)
    # the mean and the maximum of each channel of the map, one slice at a time
    maps = detector.backbone(detector.transform([slices[0][0]])[0].tensors)["0"]
    torch.testing.assert_close(rows[0], torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)[0])


def test_what_lies_inside_the_boxes(folder, detector):
    """Each row holds the largest value of each channel of the map within its box."""
    image = open_slices(folder, "train")[0][0]
    with torch.no_grad():
        (rows,) = BoxMaps(detector, TINY_CLASSIFIER).rows([image])
        features, proposals, shapes = propose(detector, [image])
        found = *run_box_head(detector, features, proposals, shapes), proposals, shapes
        (one,) = zip(*found, strict=True)
        boxes = rank_boxes(*one, detector.roi_heads.box_coder, TINY_CLASSIFIER).box
    (name, maps), stride = next(iter(features.items())), detector.strides[0]
    assert rows.shape == (len(boxes), TINY_DETECTOR.fpn_channels) and len(boxes) > 1
    for row, (x1, y1, x2, y2) in zip(rows, (boxes / stride).round().int().tolist(), strict=True):
        part = maps[0, :, y1 : y2 + 1, x1 : x2 + 1]
        torch.testing.assert_close(row, part.amax((1, 2)), msg=name)
    both = BoxMaps(detector, TINY_CLASSIFIER)([image, image[:, :48]])
    torch.testing.assert_close(both[0], rows.amax(0))  # of several sizes, too


def test_the_lungs_are_a_channel(folder):
    image = open_slices(folder, "test")[0][0]
    both = with_lungs(image)
    lungs = both[2].bool()
    assert 0.05 < lungs.float().mean() < 0.6
    assert torch.equal(both[0], image[0]) and (both[1][~lungs] == 0).all()
    assert image[0][lungs].mean() < image[0].max() / 2  # dark


@pytest.mark.parametrize("classes", [2, 3])
def test_auc_is_that_of_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(classes, size=60)
    shares = rng.dirichlet(np.ones(classes), 60).round(1)  # with ties
    parts = [1] if classes == 2 else range(classes)
    expected = np.mean([roc_auc_score(labels == c, shares[:, c]) for c in parts])
    assert compare.auc(labels, shares) == pytest.approx(expected)
    assert np.isnan(compare.auc(np.zeros(4, int), shares[:4]))


def test_folds_share_no_patient_and_leave_no_slice_out(folder):
    slices = open_slices(folder, "train")
    tests = []
    for train, test in compare.folds_of(slices, 3):
        owners = [{(slices.labels[i], slices.patients[i]) for i in part} for part in (train, test)]
        assert not owners[0] & owners[1]
        tests += test
    assert sorted(tests) == list(range(len(slices)))


def test_few_takes_as_many_of_each_class(folder):
    slices = open_slices(folder, "train")
    part = compare.few(slices, 4, seed=0)
    assert np.bincount(part.labels).tolist() == [4, 4, 4] and len(set(part.names)) == 12
    assert compare.few(slices, 4, seed=0).names == part.names
    assert compare.few(slices, 4, seed=1).names != part.names
    with pytest.raises(DataError, match="--per-class 100: of Control there are 6 slices"):
        compare.few(slices, 100, seed=0)


def command(folder, weights, out, *options):
    tiny = [f"--{part}.{name}" for part in ("budget", "classifier-training")
            for name in ("epochs=1", "batch-size=4")]  # fmt: skip
    files = ["--data", str(folder), "--weights", str(weights), "--out", str(out)]
    return main(["compare", *files, "--size", "32", *tiny, *options])


def test_a_table_grows_and_is_not_mixed(folder, detector, tmp_path, capsys):
    weights, out = tmp_path / "d.safetensors", tmp_path / "t.json"
    save_model(detector, weights)
    assert command(folder, weights, out, "--systems", "maps") == 0
    assert "maps 0" in capsys.readouterr().out
    first = json.loads(out.read_text())["rows"]["maps 0"]
    assert command(folder, weights, out, "--systems", "maps", "resnet18", "--seeds", "0", "1") == 0
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == {"maps 0", "resnet18 0", "maps 1", "resnet18 1"}
    assert rows["maps 0"] == first  # not trained again
    assert rows["resnet18 0"]["predictions"] != rows["resnet18 1"]["predictions"]
    assert out.with_suffix(".csv").read_text().count("\n") == 5
    assert "resnet18 1" in out.with_suffix(".txt").read_text()
    assert command(folder, weights, out, "--systems", "maps", "--budget.lr", "0.1") == 2
    assert "come from other settings (training)" in capsys.readouterr().err
    lists = tmp_path / "one.txt"
    lists.write_text("\n".join(open_slices(folder, "test").names[::2]), encoding="utf-8")
    assert command(folder, weights, out, "--systems", "maps", "--split", str(lists)) == 2
    assert "come from other settings (split, lists)" in capsys.readouterr().err
    out.write_text("[]", encoding="utf-8")
    assert command(folder, weights, out) == 2
    assert "is no table" in capsys.readouterr().err


def test_a_row_that_no_seed_changes_is_computed_once(
    folder, detector, tmp_path, capsys, monkeypatch
):
    weights, out, trained = tmp_path / "d.safetensors", tmp_path / "t.json", []
    save_model(detector, weights)

    def counted(name, *args, **options):
        trained.append(name)
        return row_of(name, *args, **options)

    row_of = compare.row_of
    monkeypatch.setattr(compare, "row_of", counted)
    seeds = ("--seeds", "0", "1", "--systems")
    assert command(folder, weights, out, *seeds, "maps", "scores") == 0
    assert trained == ["maps", "scores", "scores"]
    assert "maps 1: the row of maps 0, since no seed changes it" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert rows["maps 0"] == rows["maps 1"] and list(rows)[2:] == ["maps 1", "scores 1"]
    few = tmp_path / "few.json"  # here the seed draws the slices
    assert command(folder, weights, few, *seeds, "maps", "--per-class", "4") == 0
    assert trained[3:] == ["maps", "maps"]
    assert command(folder, weights, tmp_path / "n.json", *seeds, "maps", "--per-class", "9") == 2
    assert "error: --per-class 9: of Control there are 6 slices" in capsys.readouterr().err
    assert (
        command(folder, weights, tmp_path / "k.json", *seeds, "maps", "--keep", str(tmp_path / "k"))
        == 0
    )
    assert sorted(path.name for path in (tmp_path / "k").iterdir()) == [
        "maps-0.safetensors", "maps-1.safetensors"]  # fmt: skip


def test_weights_that_cannot_be_downloaded_are_not_blamed_on_the_name(
    folder, detector, tmp_path, capsys, monkeypatch
):
    weights = tmp_path / "d.safetensors"
    save_model(detector, weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    options = ("--systems", "resnet18", "--weights-backbone", "IMAGENET1K_V1")
    assert command(folder, weights, tmp_path / "t.json", *options) == 2
    err, path = capsys.readouterr().err, tmp_path / "hub/checkpoints/resnet18-f37072fd.pth"
    assert f"{path}: the weights cannot be downloaded from download.pytorch.org (<url" in err
    assert "put a copy of https://download.pytorch.org/models/resnet18-f37072fd.pth there" in err
    assert "TORCH_HOME" in err and "choose one of" not in err and err.count("covidmask:") == 1
    with pytest.raises(DataError, match="cannot be downloaded from download.pytorch.org"):
        lesion_mask_rcnn(compare.replace(TINY_DETECTOR, backbone="resnet18"), "IMAGENET1K_V1")
    path.write_bytes(b"<html>")
    assert command(folder, weights, tmp_path / "t.json", *options) == 2
    assert f"{path}: this copy of the weights cannot be read" in capsys.readouterr().err
    assert command(folder, weights, tmp_path / "t.json", *options[:-1], "NONE") == 2
    assert "weights NONE: 'NONE'; choose one of torchvision" in capsys.readouterr().err
    path.unlink()
    torch.save(torchvision.models.resnet18().state_dict(), path)  # a copy works
    assert command(folder, weights, tmp_path / "t.json", *options) == 0


def test_folds_judge_every_training_slice(folder, detector, tmp_path):
    weights, out = tmp_path / "d.safetensors", tmp_path / "t.json"
    save_model(detector, weights)
    assert command(folder, weights, out, "--systems", "areas", "--folds", "3") == 0
    row = json.loads(out.read_text())["rows"]["areas 0"]
    assert row["n"] == 18 and set(row["dice"]) == {"infection", "GGO", "C"}


@pytest.mark.parametrize(
    "name, words",
    [("resnet0", "system 'resnet0': choose among heads"), ("resnet18+heart", "only +lungs may"),
     ("heads+lungs", "only +lungs may follow"), ("raft_small", "system 'raft_small'"),
     ("timm/none", "classifier 'timm/none'"), ("googlenet", "googlenet: cannot be trained")],
)  # fmt: skip
def test_unknown_systems(name, words, folder, detector):
    with pytest.raises(DataError, match=words.replace("+", r"\+")):
        compare.train_system(name, open_slices(folder, "train"), BUDGET, detector)


def test_a_wrong_batch_size_is_not_blamed_on_the_images(folder, detector):
    budget = compare.replace(BUDGET, training=compare.replace(FIT, batch_size=100))
    with pytest.raises(DataError, match=r"^batch size 100: give"):
        compare.train_system("resnet18", open_slices(folder, "train"), budget, detector)


@pytest.mark.parametrize("name", ["faster", "unet"])
def test_without_masks_nothing_that_needs_them(name, folder, detector):
    with pytest.raises(DataError, match=f"{name}: learns from slices with lesion masks"):
        compare.train_system(name, open_slices(folder, "train"), BUDGET, detector)


def test_files_of_systems_that_cannot_be_built(tmp_path):
    model = ImageClassifier("resnet18", ("a", "b"), 32)
    model.settings["name"] = "resnet0"
    path = save_system(model, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="its model cannot be built"):
        load_system(path)


def test_a_table_that_cannot_be_written(tmp_path):
    (tmp_path / "t.json").write_text("{", encoding="utf-8")
    with pytest.raises(OutputError, match="is no table"):
        compare.Table(tmp_path / "t.json", {})


def test_what_is_there_is_not_written_over(folder, detector, tmp_path, capsys):
    weights, mine = tmp_path / "d.safetensors", tmp_path / "test.txt"
    save_model(detector, weights)
    mine.write_text("my list", encoding="utf-8")
    assert command(folder, weights, tmp_path / "test.json", "--systems", "maps") == 2
    assert "test.txt: is there and would be lost" in capsys.readouterr().err
    assert mine.read_text(encoding="utf-8") == "my list"


def test_two_calls_write_one_table(tmp_path):
    one, other = (compare.Table(tmp_path / "t.json", {"a": 1}) for _ in range(2))
    row = {"accuracy": 0.5, "auc": float("nan"), "f1": 0.5, "accuracy_interval": [0.4, 0.6],
           "auc_interval": [float("nan")] * 2}  # fmt: skip
    one.add("x 0", row)
    other.add("y 0", row)
    again = compare.Table(tmp_path / "t.json", {"a": 1})
    assert set(again.rows) == {"x 0", "y 0"} and "NaN" not in (tmp_path / "t.json").read_text()
    assert "y 0" in again.text()


@pytest.mark.parametrize(
    "options, words",
    [(("--split", "train"), "are in both lists; divide them"), (("--systems",), "name one of each"),
     (("--folds", "1"), "1 folds: the 9 patients"), (("--folds", "40"), "40 folds: the 9 patients"),
     (("--folds", "3", "--keep", "k"), "there are several models"),
     (("--systems", "maps", "nosuch"), "system 'nosuch'")],
)  # fmt: skip
def test_what_cannot_be_compared_is_said_before_the_work(
    options, words, folder, detector, tmp_path, capsys
):
    weights = tmp_path / "d.safetensors"
    save_model(detector, weights)
    assert command(folder, weights, tmp_path / "t.json", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "t.json").exists()


def test_each_class_numbers_its_own_patients():
    class Slices(list):
        classes = ("a", "b")
        labels, patients = [0, 0, 1, 1] * 3, ["1", "2", "1", "2"] * 3

    slices = Slices(range(12))
    assert len(set(compare.owners(slices))) == 4
    found = compare.judge(torch.eye(2)[torch.tensor(slices.labels)], slices)
    assert found["accuracy"] == found["f1"] == found["auc"] == 1
    # a class without slices counts nowhere
    slices.labels, slices.classes = [0] * 12, ("a", "b", "c")
    assert compare.judge(torch.eye(3)[torch.zeros(12, dtype=int)], slices)["f1"] == 1


def test_dice_of_merged_lesions_is_that_of_any_lesion(folder, detector):
    lesions = open_lesions(folder, "train", "merged")
    options = {"budget": BUDGET, "detector": detector, "lesions": lesions, "progress": False}
    model = compare.train_system("fcn", open_slices(folder, "train"), **options)
    found = compare.dice_of(model, lesions)
    assert found["infection"] == found["lesion"]
    areas = compare.train_system("areas", open_slices(folder, "train"), **options)
    assert compare.dice_of(areas, lesions) == {}  # its detector knows GGO and C
