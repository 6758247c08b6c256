"""COVNet, JCS and predictions made elsewhere in `covidmask compare`, and the numbers of scans."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny import TINY_CLASSIFIER, TINY_DETECTOR

from covidmask.cli import main
from covidmask.config import PhantomConfig, TrainingConfig
from covidmask.datasets import open_lesions, open_slices, write_phantoms
from covidmask.datasets.predictions import read_predictions
from covidmask.errors import CheckpointError, DataError
from covidmask.models import lesion_mask_rcnn, save_model
from covidmask.models.systems import JointClassifier, ScanClassifier, load_system, save_system
from covidmask.training import compare
from covidmask.training.classification import evaluate_classifier, logits_of
from covidmask.training.scans import Scans, scan_logits

FIT = TrainingConfig(epochs=1, batch_size=4, lr=1e-3, weight_decay=0)
BUDGET = compare.Budget(FIT, FIT, FIT, TINY_DETECTOR, TINY_CLASSIFIER, size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    size = PhantomConfig(64, 2, (3, 1, 1), (3, 1, 2))
    return write_phantoms(tmp_path_factory.mktemp("scans"), size, progress=False)


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
            (root / line.split()[0]).write_bytes((source / line.split()[0]).read_bytes())
    return root


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return lesion_mask_rcnn(TINY_DETECTOR).eval()


class Listed(list):
    """Images with names, labels, patients and classes, in the form of `SliceImages`."""

    def __init__(self, names, labels, patients, classes):
        super().__init__((torch.full((3, 8, 8), i / 1000), k) for i, k in enumerate(labels))
        self.names, self.labels, self.patients, self.classes = names, labels, patients, classes


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ["covnet+resnet18", "jcs"])
def test_each_trains_is_judged_and_comes_back(
    name, classes, folder, two, detector, tmp_path, monkeypatch
):
    root, history, fit = folder if classes == 3 else two, [], compare.fit
    monkeypatch.setattr(compare, "fit", lambda *a, **k: history.extend(fit(*a, **k)))
    train, test = (open_slices(root, split) for split in ("train", "test"))
    lesions = {split: open_lesions(folder, split) for split in ("train", "test")}
    options = {"budget": BUDGET, "detector": detector, "progress": False}
    options |= {"lesions": lesions["train"], "keep": tmp_path / "w.safetensors"}
    row = compare.row_of(name, [(train, test)], lesions["test"], **options)
    # of each class three patients with two slices: a step has two scans, or four slices
    assert len(history) == (3 * classes // 2 if name != "jcs" else 6 * classes // 4)
    assert set(history[0]) >= ({"bce", "ce", "dice"} if name == "jcs" else {"bce"})
    assert row["trained"] == row["parameters"] > 1e7 and row["ms"] > 0 and row["seconds"] > 0
    again = load_system(tmp_path / "w.safetensors")
    if name == "jcs":
        logits = logits_of(again, test, progress=False)
        assert set(row["dice"]) == {"infection", "GGO", "C"}
        assert row["dice"] == compare.dice_of(again, lesions["test"])
        assert all(0 <= value <= 1 for value in row["dice"].values())
        assert evaluate_classifier(again, test, progress=False)["accuracy"] == row["accuracy"]
    else:
        logits = scan_logits(again, test, progress=False)
        assert row["scan_accuracy"] == row["accuracy"] and row["scan_auc"] == row["auc"]
        assert row["scan_accuracy_interval"] == row["accuracy_interval"] and "dice" not in row
        with pytest.raises(DataError, match="COVNet reads scans"):
            evaluate_classifier(again, test, progress=False)
    assert row["scans"] == 2 * classes and row["n"] == (2 + 2 * (name == "jcs")) * classes
    assert logits.shape == (row["n"], classes) and logits.isfinite().all()
    assert "".join(map(str, logits.argmax(1).tolist())) == row["predictions"]
    shares = logits.softmax(1)[:, 1:]
    torch.testing.assert_close(shares, torch.tensor(row["probabilities"]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["covnet+resnet18", "jcs"])
def test_every_weight_learns(name, folder, detector):
    slices, lesions = open_slices(folder, "train"), open_lesions(folder, "train")
    torch.manual_seed(0)
    if name == "jcs":
        fresh = JointClassifier("resnet18", slices.classes, ("GGO", "C"), 64)
    else:
        fresh = ScanClassifier("resnet18", slices.classes, 64)
    options = {"detector": detector, "lesions": lesions, "progress": False}
    trained = dict(compare.train_system(name, slices, BUDGET, **options).named_parameters())
    before = dict(fresh.named_parameters())
    assert before.keys() == trained.keys()
    assert not [key for key, value in before.items() if torch.equal(value, trained[key])]


def test_the_two_tasks_of_jcs_meet_in_the_encoder(folder):
    slices, lesions = open_slices(folder, "train"), open_lesions(folder, "train")
    torch.manual_seed(0)
    model = JointClassifier("resnet18", slices.classes, ("GGO", "C"), 64, channels=8).train()
    images, targets = zip(*(lesions[i] for i in range(4)), strict=True)

    def reached(loss):
        model.zero_grad()
        loss.backward()
        parts = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        return parts

    assert reached(model(images).square().sum()) == {"body", "network"}
    sides = model(images, pixels=True)
    assert [list(side.shape) for side in sides] == [[4, 3, 64, 64]] * 4
    losses = compare.pixel_losses(sides[0], targets)
    assert reached(losses["ce"] + losses["dice"]) == {"body", "decoder", "sides"}
    assert model.sides[0].weight.grad.any() and model.sides[3].weight.grad is None
    cuts = []
    model.cut.register_forward_hook(lambda *_: cuts.append(1))
    model(images, pixels=True)
    assert not cuts  # a mask would no longer lie on its slice
    model(images)
    assert len(cuts) == 4


def test_the_loss_of_jcs_is_that_of_all_sides(folder, detector, monkeypatch):
    slices, lesions, seen = open_slices(folder, "train"), open_lesions(folder, "train"), []
    whole = compare.pixel_losses

    def counted(logits, targets):
        seen.append(whole(logits, targets))
        return seen[-1]

    def first_step(model, dataset, losses, training, **options):
        found = losses(model.train(), [dataset[i] for i in range(3)])
        for key in ("ce", "dice"):
            assert found[key].item() == pytest.approx(np.mean([part[key].item() for part in seen]))

    monkeypatch.setattr(compare, "pixel_losses", counted)
    monkeypatch.setattr(compare, "fit", first_step)
    compare.train_system("jcs", slices, BUDGET, detector, lesions, progress=False)
    assert len(seen) == 4


def test_a_scan_is_the_maximum_of_its_slices(folder):
    slices = open_slices(folder, "train")
    torch.manual_seed(0)
    model = ScanClassifier("resnet18", slices.classes, 64).eval()
    one, other = [slices[0][0], slices[1][0]], [slices[4][0]]
    with torch.no_grad():
        rows = torch.cat([model.network(model.ready([i], False)) for i in (*one, *other)])
        expected = model.linear(torch.stack([torch.maximum(rows[0], rows[1]), rows[2]]))
        found = model([one, other])
        assert not torch.equal(rows[0], rows[1])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(model([one[::-1]]), expected[:1], atol=1e-4, rtol=1e-3)
    for wrong in (one, [one, []]):
        with pytest.raises(DataError, match="COVNet reads scans, each a list of slices"):
            model(wrong)


@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "vgg11"])
def test_other_backbones_of_covnet(name):
    model = ScanClassifier(name, ("a", "b"), 32).eval()
    scans = [[torch.rand(3, 32, 32)] * 2, [torch.rand(3, 40, 40)]]
    assert model(scans).shape == (2, 2)


def test_a_scan_is_in_order_and_not_too_long():
    names = [f"s{i}.png" for i in (10, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8)] + ["other.png"]
    slices = Listed(names, [0] * 11 + [1], ["1"] * 12, ("a", "b"))  # each class has a patient 1
    scans = Scans(slices)
    assert [[names[i] for i in own] for own in scans.members] == [
        [f"s{i}.png" for i in range(11)], ["other.png"]]  # fmt: skip
    assert scans.labels == [0, 1] and scans.patients == ["1", "1"] and len(scans.names) == 2
    few = Scans(slices, longest=3)
    assert [names[i] for i in few.members[0]] == ["s0.png", "s5.png", "s10.png"]
    images, label = few[0]
    assert label == 0 and [round(image[0, 0, 0].item() * 1000) for image in images] == [2, 7, 0]
    assert max(len(own) for own in Scans(Listed([f"{i}.png" for i in range(40)], [0] * 40,
                                                ["1"] * 40, "ab")).members) == 16  # fmt: skip


def test_numbers_of_scans_by_hand():
    # shares of class b of each slice; patient 1 of class a and patient 1 of class b are two
    shares = np.array([0.1, 0.6, 0.6, 0.9, 0.2, 0.3, 0.56])
    labels, patients = [0, 0, 0, 1, 1, 1, 0], ["1", "1", "1", "1", "1", "2", "3"]
    slices = Listed([f"{i}.png" for i in range(7)], labels, patients, ("a", "b"))
    logits = torch.from_numpy(np.stack([1 - shares, shares], 1)).log()
    row = compare.judge(logits, slices)
    # means: a1 1.3/3 right, b1 1.1/2 right, b2 0.3 wrong, a3 0.56 wrong
    assert row["accuracy"] == pytest.approx(2 / 7) and row["n"] == 7 and row["scans"] == 4
    assert row["scan_accuracy"] == 0.5
    assert row["scan_auc"] == 0.25  # of four pairs (b, a) one is in order: b1 above a1
    low, high = row["scan_accuracy_interval"]
    assert 0 <= low < 0.5 < high <= 1
    # of four drawn from two right and two wrong, a share of 1/16 is all right: within 95 %
    assert (low, high) == (0, 1)
    # where each patient has one slice, slices and scans are the same, and nothing is added
    slices.patients = [str(i) for i in range(7)]
    assert not [key for key in compare.judge(logits, slices) if key.startswith("scan")]


def test_intervals_of_scans_draw_scans():
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(2, size=30), 5)
    patients = [str(i) for i in np.repeat(np.arange(30), 5)]
    shares = (0.3 * labels + rng.random(150)) / 1.3
    slices = Listed([f"{i}.png" for i in range(150)], labels.tolist(), patients, ("a", "b"))
    row = compare.judge(torch.from_numpy(np.stack([1 - shares, shares], 1)).log(), slices)
    means, whose = shares.reshape(30, 5).mean(1), labels[::5]
    assert row["scan_auc"] == pytest.approx(roc_auc_score(whose, means))
    own = rng.integers(30, size=(4000, 30))
    expected = np.quantile(((means > 0.5) == whose)[own].mean(1), [0.025, 0.975])
    assert row["scan_accuracy_interval"] == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    "name, words",
    [("covnet+", "after [+] stands a classifier of torchvision's, as in covnet[+]resnet18"),
     ("covnet+resnet0", "after [+] stands a classifier"), ("jcs+vgg11", "[+] stands a ResNet"),
     ("covnet+squeezenet1_0", "does not end in a linear layer")],
)  # fmt: skip
def test_backbones_that_will_not_do(name, words, folder, detector):
    with pytest.raises(DataError, match=words):
        compare.train_system(
            name, open_slices(folder, "train"), BUDGET, detector, open_lesions(folder, "train")
        )


def test_jcs_needs_masks_and_resnets(folder, detector):
    with pytest.raises(DataError, match="jcs[+]resnet34: learns from slices with lesion masks"):
        compare.train_system("jcs+resnet34", open_slices(folder, "train"), BUDGET, detector)
    with pytest.raises(DataError, match="jcs on vgg11: choose a ResNet"):
        JointClassifier("vgg11", ("a", "b"), ("GGO",))


def test_files_of_other_systems_are_refused(tmp_path):
    model = ScanClassifier("resnet18", ("a", "b"), 32)
    model.settings["system"] = "covid-net"
    with pytest.raises(CheckpointError, match="its model cannot be built"):
        load_system(save_system(model, tmp_path / "w.safetensors"))


def test_own_detector_with_merged_lesions(folder, detector):
    merged = compare.replace(TINY_DETECTOR, lesions="merged")
    budget = compare.replace(BUDGET, detector=merged)
    lesions = open_lesions(folder, "train", "merged")
    options = {"lesions": lesions, "progress": False}
    model = compare.train_system(
        "faster", open_slices(folder, "train"), budget, detector, **options
    )
    assert model.detector.classes == ("lesion",)
    joint = compare.train_system("jcs", open_slices(folder, "train"), budget, detector, **options)
    found = compare.dice_of(joint, lesions)
    assert set(found) == {"infection", "lesion"} and found["infection"] == found["lesion"]
    assert compare.dice_of(joint, open_lesions(folder, "test")) == {}  # GGO and C it does not know


SLICES = SimpleNamespace(names=["x_1.png", "y_1.png", "y_2.png"], labels=[0, 1, 1],
                         patients=["1", "2", "2"], classes=("Normal", "CP"))  # fmt: skip


def test_predictions_are_read_in_the_order_of_the_list(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("\ufeffCP, file, note, Normal\n0.6,y_2.png,a,0.2\n\n0,x_1.png,,1\n"
                    '1e-1,"y_1.png",b,0.3\n', encoding="utf-8")  # fmt: skip
    shares, known = read_predictions(path, SLICES)
    np.testing.assert_allclose(shares, [[1, 0], [0.75, 0.25], [0.25, 0.75]])
    assert known
    path.write_text("file,class\ny_1.png,0\ny_2.png,CP\nx_1.png,Normal\n", encoding="utf-8")
    shares, known = read_predictions(path, SLICES)
    assert shares.tolist() == [[1, 0], [1, 0], [0, 1]] and not known


def test_classes_may_be_called_as_in_file_names(tmp_path):
    path, classes = tmp_path / "p.csv", ("Control", "Common pneumonia", "COVID-19")
    slices = SimpleNamespace(names=["a.png"], classes=classes)
    for header in ("NCP,Normal,CP", "COVID-19,Control,Common pneumonia", "2,0,1"):
        path.write_text(f"file,{header}\na.png,0.5,0.2,0.3\n", encoding="utf-8")
        np.testing.assert_allclose(read_predictions(path, slices)[0], [[0.2, 0.3, 0.5]])


@pytest.mark.parametrize(
    "text, words",
    [("", "its columns are missing; give `file` and `class`"),
     ("file,score\n", "its columns are file, score; give"),
     ("class\nCP\n", "its columns are class; give"),
     ("file,Normal\nx_1.png,1\n", "its columns are file, Normal; give"),
     ("file,Normal,CP,CP\n", "its columns are file, Normal, CP, CP; give"),
     ("file,class,class\n", "its columns are file, class, class; give"),
     ("file,class\nx_1.png,NCP\n", "line 2: NCP; give one of Normal, CP"),
     ("file,class\nx_1.png\n", "line 2: None; give one of Normal, CP"),
     ("file,class\nx_1.png,CP,CP\n", "line 2: CP, CP; give one of Normal, CP"),
     ("file,Normal,CP\n\nx_1.png,0.2,high\n", "line 3: 0.2, high; give a number from 0 to 1"),
     ("file,Normal,CP\nx_1.png,0.2,nan\n", "line 2: 0.2, nan; give a number"),
     ("file,Normal,CP\nx_1.png,0.2,\n", "line 2: 0.2, ; give a number"),
     ("file,Normal,CP\nx_1.png,0.2\n", "line 2: 0.2, None; give a number"),
     ("file,Normal,CP\nx_1.png,-0.2,1\n", "line 2: -0.2, 1; give a number"),
     ("file,Normal,CP\nx_1.png,2,1\n", "line 2: 2, 1; give a number"),
     ("file,Normal,CP\nx_1.png,0,0\n", "line 2: 0, 0; give a number from 0 to 1 for each"),
     ("file,class\nx_1.png,CP\nx_1.png,CP\n", r"slices there twice: 1 \(x_1.png\)"),
     ("file,class\nx_1.png,CP\nz.png,CP\n", r"slices not in the list: 1 \(z.png\)"),
     ("file,class\nx_1.png,CP\n", r"slices missing: 2 \(y_1.png, y_2.png\)"),
     ('file,class\n"x_1.png,CP\n', "is no CSV in UTF-8"), (b"\xff\xfe\x00", "is no CSV in UTF-8")],
)  # fmt: skip
def test_wrong_files_of_predictions(text, words, tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=words) as caught:
        read_predictions(path, SLICES)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="nothing.csv"):
        read_predictions(tmp_path / "nothing.csv", SLICES)


def test_a_row_of_predictions_by_hand(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("file,Normal,CP\nx_1.png,0.7,0.3\ny_1.png,0.9,0.1\ny_2.png,0.2,0.8\n")
    row = compare.row_of_file(path, SLICES)
    assert row["accuracy"] == pytest.approx(2 / 3) and row["n"] == 3 and row["predictions"] == "001"
    assert row["sensitivity"] == [1, 0.5] and row["ppv"] == [0.5, 1] and row["auc"] == 0.5
    assert row["probabilities"] == [[0.3], [0.1], [0.8]]
    assert row["scans"] == 2 and row["scan_accuracy"] == 0.5 and row["scan_auc"] == 1  # 0.45, 0.3
    path.write_text("file,class\nx_1.png,Normal\ny_1.png,CP\ny_2.png,CP\n")
    row = compare.row_of_file(path, SLICES)
    assert row["accuracy"] == 1 and row["scan_accuracy"] == 1 and "probabilities" not in row
    numbers = [row["auc"], row["scan_auc"], *row["auc_interval"], *row["scan_auc_interval"]]
    assert np.isnan(numbers).all() and len(numbers) == 6


def test_predictions_in_the_table(folder, detector, tmp_path, capsys):
    weights, out = tmp_path / "d.safetensors", tmp_path / "t.json"
    save_model(detector, weights)
    names = open_slices(folder, "test").names
    for name, known in (("a", "class"), ("b", "NCP,CP,Normal")):
        lines = [f"{n},{n.split('_')[0] if name == 'a' else '0.2,0.1,0.7'}" for n in names]
        (tmp_path / f"{name}.csv").write_text("\n".join([f"file,{known}", *lines]))

    def call(*options):
        tiny = ["--budget.epochs=1", "--budget.batch-size=4", "--size", "64"]
        files = ["--data", str(folder), "--weights", str(weights), "--out", str(out)]
        return main(["compare", *files, *tiny, *options])

    a, b = f"covidnet-ct={tmp_path / 'a.csv'}", f"b={tmp_path / 'b.csv'}"
    assert call("--systems", "--predictions", a, b) == 0
    said = capsys.readouterr().out
    assert "covidnet-ct -" in said and "nan" not in said
    rows = json.loads(out.read_text())["rows"]
    assert set(rows) == {"covidnet-ct -", "b -"}
    assert rows["covidnet-ct -"]["accuracy"] == 1 and rows["covidnet-ct -"]["auc"] is None
    assert rows["b -"]["accuracy"] == pytest.approx(1 / 3) and rows["b -"]["auc"] == 0.5
    (tmp_path / "b.csv").write_text((tmp_path / "a.csv").read_text())
    assert call("--systems", "covnet+resnet18", "--predictions", b) == 0  # read again, others stay
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["covidnet-ct -", "b -", "covnet+resnet18 0"]
    assert rows["b -"]["accuracy"] == 1 and rows["covnet+resnet18 0"]["n"] == 6
    assert out.with_suffix(".csv").read_text().count("\n") == 4
    for wrong in (["a.csv"], ["=a.csv"], ["a="], [a, a]):
        assert call("--systems", "--predictions", *wrong) == 2
        assert "write NAME=FILE.csv, each name once" in capsys.readouterr().err
    assert call("--systems", "--predictions", a, "--split", "val") == 2
    assert "slices not in the list" in capsys.readouterr().err


def test_folds_judge_scans_and_predictions_of_the_training_list(folder, detector, tmp_path):
    weights, out = tmp_path / "d.safetensors", tmp_path / "t.json"
    save_model(detector, weights)
    names = open_slices(folder, "train").names
    (tmp_path / "p.csv").write_text("\n".join(["file,class", *(f"{n},CP" for n in names)]))
    files = ["--data", str(folder), "--weights", str(weights), "--out", str(out)]
    options = ["--folds", "3", "--systems", "covnet+resnet18", "--budget.epochs=1"]
    more = ["--predictions", f"p={tmp_path / 'p.csv'}", "--size", "64", "--budget.batch-size=4"]
    assert main(["compare", *files, *options, *more]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert rows["covnet+resnet18 0"]["n"] == rows["covnet+resnet18 0"]["scans"] == 9
    assert rows["p -"]["n"] == 18 and rows["p -"]["scans"] == 9
    assert rows["p -"]["accuracy"] == pytest.approx(1 / 3)
