"""`covidmask predict` on scans: slices, tables, and nothing of a patient in any output."""

import csv
import os
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scan_files import SECRETS, SERIES, chest, write_series, write_slice
from tiny import TINY_CLASSIFIER, TINY_DETECTOR

from covidmask import predict as module
from covidmask.cli import main
from covidmask.config import IMAGE_CLASSES
from covidmask.datasets.medical import hounsfield_to_unit
from covidmask.datasets.scans import LUNG_WINDOW
from covidmask.errors import DataError, OutputError
from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import save_model


class Networks(torch.nn.Module):
    """In place of both: brightness decides, so that every number below can be worked out.

    A slice whose mark (see `chest`) is at an even column has two overlapping lesions, GGO and C,
    and one of a low score; the first probability is 0.1 times the number of the slice.
    """

    def __init__(self, masks):
        super().__init__()
        self.config = TINY_DETECTOR if masks else TINY_CLASSIFIER
        self.classes = ("GGO", "C")
        self.masks, self.batches = masks, []

    def __deepcopy__(self, memo):
        return self  # `for_inference` copies; the tests look at what was done

    def forward(self, images):
        self.batches.append([tuple(image.shape) for image in images])
        numbers = [int(image[0, 2].argmax()) - 1 for image in images]
        if not self.masks:
            p = torch.tensor([[0.1 * min(k, 9), 0.45, 0.2] for k in numbers])
            return p.clamp(1e-4, 1 - 1e-4).logit()
        return [
            self.lesions(image, 0 if k % 2 else 3) for image, k in zip(images, numbers, strict=True)
        ]

    def lesions(self, image, count):
        masks = torch.zeros(3, 1, *image.shape[1:])
        masks[0, 0, 10:20, 10:20] = 0.9  # 100 pixels
        masks[1, 0, 15:25, 10:20] = 0.8  # 100 pixels, 50 of them the same
        masks[2, 0, 40:50, 40:50] = 0.7
        boxes = torch.tensor([[10, 10, 20, 20], [10, 15, 20, 25], [40, 40, 50, 50]]).float()
        values = {"boxes": boxes, "labels": torch.tensor([1, 2, 1]), "masks": masks}
        values["scores"] = torch.tensor([0.9, 0.8, 0.4])
        return {key: value[:count] for key, value in values.items()}


@pytest.fixture
def stub(monkeypatch):
    """Both networks, without weights files; gives back the segmenter."""
    networks = Networks(True), Networks(False)
    monkeypatch.setattr(module, "load_segmenter", lambda path, device: networks[0])
    monkeypatch.setattr(module, "load_classifier", lambda path, device: networks[1])
    return networks[0]


def predict(paths, out, *options):
    """Through the command line; status, and the two tables."""
    words = ["predict", *paths, "--segmenter", "s", "--classifier", "c", "--out", out, *options]
    status = main([*map(str, words), "--device", "cpu"])
    return status, table(out, "predictions"), table(out, "summary")


def table(out, name):
    if not (out / f"{name}.csv").exists():
        return None
    with open(out / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- privacy --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    segmenter = lesion_mask_rcnn(TINY_DETECTOR)
    save_model(segmenter, folder / "seg.safetensors")
    save_model(covid_ct_mask_net(segmenter, TINY_CLASSIFIER), folder / "cls.safetensors")
    return [f"--{kind}={folder / name}.safetensors" for kind, name in NAMES.items()]


NAMES = {"segmenter": "seg", "classifier": "cls"}


@pytest.mark.parametrize("named", ["folder", "files"])
def test_no_patient_tag_and_no_file_name_leaves_the_tool(named, tmp_path, tiny_weights, capfd):
    nibabel = pytest.importorskip("nibabel", reason="needs the extra `medical`")
    scan = write_series(tmp_path / "scan", 6)
    for path in scan.iterdir():  # values that pydicom would warn of, and quote
        damaged = path.read_bytes().replace(b"19530307", b"xx-yy-zz").replace(b"777003", b"7770zz")
        path.write_bytes(damaged)
    image = nibabel.Nifti1Image(np.stack([chest(k).T for k in range(3)], -1), np.eye(4))
    image.header["descrip"] = b"Secret^Person"
    nibabel.save(image, tmp_path / "Secret_Person.nii.gz")
    sources = [scan] if named == "folder" else sorted(scan.iterdir())
    words = ["predict", *sources, tmp_path / "Secret_Person.nii.gz", *tiny_weights]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        words += ["--out", tmp_path / "out", "--score", 0.0]
        assert main([str(word) for word in words]) == 0
    screen = "".join([*capfd.readouterr(), *(str(warning.message) for warning in caught)])
    assert "research and teaching only" in screen
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 9 + 2
    everything = screen.replace(str(tmp_path / "Secret_Person.nii.gz"), "")  # as the reader typed
    everything += " ".join(path.name for path in files)
    content = b"".join(path.read_bytes() for path in files) + everything.encode()
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.info == {} and not picture.getexif()
    secrets = [*SECRETS.values(), SERIES, "1.2.826", "Secret", "secret", "xx-yy-zz", "7770"]
    assert not [word for word in secrets if word.encode() in content]


def test_pictures_keep_their_names_but_not_their_folders(tmp_path, stub):
    folder = tmp_path / "Secret_Person"
    folder.mkdir()
    for name in ("b.png", "a.jpg"):
        Image.fromarray(np.full((64, 64), 99, np.uint8)).save(folder / name)
    status, rows, summary = predict([folder], tmp_path / "out")
    assert status == 0
    assert [row["image"] for row in rows] == ["a.jpg", "b.png"]
    assert [row["picture"] for row in rows] == ["a_lesions.png", "b_lesions.png"]
    assert {row["slice"] + row["position_mm"] + row["lesion_mm2"] for row in rows} == {""}
    assert [row["image"] for row in summary] == ["pictures"]
    assert not any("Secret" in (tmp_path / "out" / f"{n}.csv").read_text() for n in TABLES)


TABLES = ("predictions", "summary")


# ---- tables ---------------------------------------------------------------------------------


def test_tables_of_a_series(tmp_path, stub, capsys):
    status, rows, summary = predict([write_series(tmp_path / "scan", 10)], tmp_path / "out")
    assert status == 0 and len(rows) == 10
    assert [row["slice"] for row in rows] == [str(k) for k in range(1, 11)]
    assert [row["instance"] for row in rows] == [str(k) for k in range(10, 0, -1)]
    assert [float(row["position_mm"]) for row in rows] == [-100 + 2.5 * k for k in range(10)]
    assert [row["picture"] for row in rows][::9] == [
        "slice_0001_lesions.png",
        "slice_0010_lesions.png",
    ]
    for k, row in enumerate(rows):
        sick = k % 2 == 0
        assert (row["lesions"], row["GGO"], row["C"]) == (("2", "1", "1") if sick else ("0",) * 3)
        assert float(row["lesion_mm2"]) == (150 * 0.75 * 0.5 if sick else 0)  # of the union
        assert float(row["Control"]) == pytest.approx(max(0.1 * k, 1e-4), abs=1e-5)
        assert row["likeliest"] == ("Control" if k > 4 else "Common pneumonia")
        with Image.open(tmp_path / "out" / row["picture"]) as picture:
            assert picture.size == (512, 512)
    (row,) = summary
    assert (row["image"], row["slices"], row["looked_at"]) == ("volume 1", "10", "10")
    assert row["lesion_slices"] == "5"
    assert float(row["share Control"]) == 0.5 and float(row["share COVID-19"]) == 0
    assert float(row["mean Control"]) == pytest.approx(0.45, abs=1e-4)
    assert float(row["max Control"]) == pytest.approx(0.9, abs=1e-4)
    assert float(row["mean COVID-19"]) == pytest.approx(0.2, abs=1e-4)
    assert "not a patient diagnosis" in row["note"] and "not validated on volumes" in row["note"]
    text = capsys.readouterr().out
    assert row["note"] in text and "lesions in 5 of 10 slices" in text
    assert "volume 1, slice 3 (-95.0 mm): Control 0.200" in text
    assert len(os.listdir(tmp_path / "out")) == 12


def test_batches_hold_one_size(tmp_path, stub):
    write_series(tmp_path / "a", 6)
    write_series(tmp_path / "b", 5, size=96)
    status, rows, _ = predict([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert status == 0
    assert [len(batch) for batch in stub.batches] == [4, 2, 4, 1]
    assert all(len(set(batch)) == 1 for batch in stub.batches)
    assert rows[0]["picture"] == "volume_1_slice_0001_lesions.png"
    assert rows[-1]["picture"] == "volume_2_slice_0005_lesions.png"
    assert (rows[-1]["image"], rows[-1]["slice"]) == ("volume 2", "5")


@pytest.mark.parametrize("pixels, sizes", [(2 * 64 * 64, [2, 2, 1]), (1, [1] * 5)])
def test_batches_of_large_slices_are_smaller(pixels, sizes, tmp_path, stub, monkeypatch):
    monkeypatch.setattr(module, "BATCH_PIXELS", pixels)
    assert predict([write_series(tmp_path / "a", 5)], tmp_path / "out")[0] == 0
    assert [len(batch) for batch in stub.batches] == sizes


def test_two_networks_give_a_slice_the_same_numbers_alone_and_in_a_batch(tmp_path, tiny_weights):
    write_series(tmp_path / "scan", 5)
    tables = []
    for name, options in (("all", []), ("one", ["--slices", "3"])):
        words = ["predict", tmp_path / "scan", "--out", tmp_path / name, *tiny_weights, *options]
        assert main([str(word) for word in words]) == 0
        tables.append(table(tmp_path / name, "predictions"))
    (alone,) = tables[1]
    for name in IMAGE_CLASSES:
        assert float(alone[name]) == pytest.approx(float(tables[0][2][name]), abs=1e-4)
    assert alone["slice"] == "3" and alone["position_mm"] == "-95.00"


# ---- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, slices",
    [
        ([], list(range(1, 7))),
        (["--slices", "all", "--every", "4"], [1, 5]),
        (["--slices", "2-4,6"], [2, 3, 4, 6]),
        (["--every", "3"], [1, 4]),
    ],
)
def test_slice_choice(options, slices, tmp_path, stub):
    status, rows, summary = predict([write_series(tmp_path / "scan", 6)], tmp_path / "o", *options)
    assert status == 0 and [int(row["slice"]) for row in rows] == slices
    assert (summary[0]["slices"], summary[0]["looked_at"]) == ("6", str(len(slices)))


def test_a_large_volume_is_sampled_evenly(tmp_path, stub):
    nibabel = pytest.importorskip("nibabel", reason="needs the extra `medical`")
    volume = np.full((64, 64, 320), -800, np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([0.5, 0.75, 1, 1])), tmp_path / "v.nii")
    status, rows, _ = predict([tmp_path / "v.nii"], tmp_path / "out")
    assert status == 0 and [int(row["slice"]) for row in rows] == list(range(6, 321, 10))
    assert float(rows[0]["lesion_mm2"]) in (0, 150 * 0.5 * 0.75)


def test_window(tmp_path, stub, monkeypatch):
    seen = []
    monkeypatch.setattr(stub, "lesions", lambda image, _: seen.append(image) or LESION_FREE)
    path = write_slice(tmp_path / "a.dcm", chest(0))
    for options in ([], ["--window", "40", "400"], ["--window", "-600", "1500"]):
        assert predict([path], tmp_path / "out", *options)[0] == 0
    np.testing.assert_allclose(seen[0][0], hounsfield_to_unit(chest(0), LUNG_WINDOW), atol=1e-6)
    np.testing.assert_allclose(seen[1][0], hounsfield_to_unit(chest(0), (40, 400)), atol=1e-6)
    assert torch.equal(seen[0], seen[2])


LESION_FREE = {
    "boxes": torch.zeros(0, 4),
    "labels": torch.zeros(0, dtype=torch.int64),
    "scores": torch.zeros(0),
    "masks": torch.zeros(0, 1, 64, 64),
}


def test_values_that_are_no_hounsfield_units_are_noted(tmp_path, stub, capsys):
    nibabel = pytest.importorskip("nibabel", reason="needs the extra `medical`")
    grey = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(grey, np.eye(4)), tmp_path / "grey.nii")
    assert predict([tmp_path / "grey.nii"], tmp_path / "out")[0] == 0
    shown = capsys.readouterr().out
    assert "Note: 3 (volume 1, slice 1, volume 1, slice 2, vol" in shown
    assert predict([write_series(tmp_path / "scan", 3)], tmp_path / "out")[0] == 0
    shown = capsys.readouterr().out
    assert "eighth" not in shown


@pytest.mark.parametrize(
    "options, words",
    [
        (["--slices", "2-9"], "volume 1 has no slices '2-9'"),
        (["--slices", "last"], "numbers and ranges from 1 to 3"),
        (["--every", "0"], "--every 0: must be at least 1"),
        (["--series", "0"], "--series 0: must be at least 1"),
        (["--series", "2"], "holds 1 axial CT series"),
        (["--window", "-600", "0"], "window -600 0: give finite numbers, the width above 0"),
        (["--window", "nan", "10"], "--window nan: must be at least"),
    ],
)
def test_bad_options(options, words, tmp_path, stub, capsys):
    status, rows, _ = predict([write_series(tmp_path / "scan", 3)], tmp_path / "out", *options)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert status == 2 and rows is None and not (tmp_path / "out").exists()
    assert len(errors) == 1 and words in errors[0]


@pytest.mark.parametrize("name", ["score", "threshold"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.1])
def test_shares_outside_0_to_1(name, value, tmp_path):
    with pytest.raises(DataError, match=f"{name} .*: must be a number from 0 to 1"):
        module.predict(["a.png"], "s", "c", tmp_path / "out", **{name: value})


def write_picture(path, low=0, high=255):
    Image.fromarray(np.linspace(low, high, 64 * 80).reshape(64, 80).astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize("way", ["itself", "symbolic link", "hard link"])
def test_no_picture_is_written_over_an_input(way, tmp_path, stub, capsys):
    one, two = write_picture(tmp_path / "a.png"), write_picture(tmp_path / "a_lesions.png")
    before, out = two.read_bytes(), tmp_path
    if way != "itself":
        out = tmp_path / "out"
        out.mkdir()
        (os.symlink if way == "symbolic link" else os.link)(two, out / "a_lesions.png")
    status, rows, _ = predict([one, two], out)
    assert status == 2 and rows is None and not stub.batches
    assert two.read_bytes() == before
    assert "is a folder, one of the images to look at" in capsys.readouterr().err


def test_no_table_is_written_over_an_input_or_a_folder(tmp_path, stub):
    picture, odd = write_picture(tmp_path / "a.png"), tmp_path / "odd" / "summary.csv"
    odd.parent.mkdir()
    shutil.copy(picture, odd)
    (tmp_path / "out" / "summary.csv").mkdir(parents=True)
    weights = shutil.copy(picture, tmp_path / "a_lesions.png")
    for out, images, segmenter, words in (
        (odd.parent, [odd], "s", "summary.csv: is a folder, one of the images"),
        (tmp_path / "out", [picture], "s", "summary.csv: is a folder, one of the images"),
        (tmp_path, [picture], weights, "a_lesions.png: is a folder, one .* or a file of weights"),
    ):
        with pytest.raises(OutputError, match=words):
            module.predict(images, segmenter, "c", out)
    assert not stub.batches and list((tmp_path / "out").iterdir()) == [tmp_path / "out/summary.csv"]


@pytest.mark.parametrize("name", ["x" * 251, "\u60a3" * 83])
def test_a_name_as_long_as_the_system_allows(name, tmp_path, stub):
    picture = write_picture(tmp_path / f"{name}.png")
    assert predict([picture], tmp_path / "out")[0] == 0
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".csv", ".csv", ".png"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that are no text")
def test_a_name_that_is_no_text(tmp_path, stub):
    name = os.fsdecode(b"\xff.png")
    write_picture(tmp_path / name)
    status, rows, _ = predict([tmp_path / name], tmp_path / "out")
    assert status == 0 and rows[0]["image"] == r"\udcff.png"
    assert (tmp_path / "out" / name.replace(".png", "_lesions.png")).exists()


def test_flat_pictures_are_noted(tmp_path, stub, capsys):
    flat = write_picture(tmp_path / "flat.png", 100, 120)
    assert predict([flat, write_picture(tmp_path / "a.png")], tmp_path / "out")[0] == 0
    assert "Note: 1 (flat.png) use less than an eighth" in capsys.readouterr().out
    hot = np.array(Image.open(flat))
    hot[0, 0] = 255
    Image.fromarray(hot).save(flat)
    assert predict([flat], tmp_path / "out")[0] == 0
    assert "Note: 1 (flat.png) use less than an eighth" in capsys.readouterr().out


def test_networks_that_give_no_numbers(tmp_path, stub, monkeypatch, capsys):
    nothing = {**LESION_FREE, "semantic": torch.full((2, 32, 40), torch.nan)}
    monkeypatch.setattr(stub, "lesions", lambda image, _: nothing)
    nothing["masks"] = torch.zeros(0, 1, 64, 80)
    status, rows, _ = predict([write_picture(tmp_path / "a.png")], tmp_path / "out")
    assert status == 2 and rows is None and not (tmp_path / "out").exists()
    assert "values that are not numbers" in capsys.readouterr().err


def test_class_names_come_from_the_weights(tmp_path, stub, monkeypatch):
    names = ("healthy", "ill", "other")
    other = Networks(False)
    other.config = replace(TINY_CLASSIFIER, classes=names)
    monkeypatch.setattr(module, "load_classifier", lambda path, device: other)
    _, rows, summary = predict([write_picture(tmp_path / "a.png")], tmp_path / "out")
    assert set(names) < set(rows[0]) and rows[0]["likeliest"] in names
    assert "Control" not in rows[0] and "share ill" in summary[0]


def test_a_name_cannot_be_two_columns(tmp_path, stub, monkeypatch, capsys):
    other = Networks(False)
    other.config = replace(TINY_CLASSIFIER, classes=("healthy", "C", "other"))
    monkeypatch.setattr(module, "load_classifier", lambda path, device: other)
    status, rows, _ = predict([write_picture(tmp_path / "a.png")], tmp_path / "out")
    assert status == 2 and rows is None and not (tmp_path / "out").exists()
    assert "two columns would have one name" in capsys.readouterr().err


def test_a_cut_file_stops_before_anything_is_written(tmp_path, stub, capsys):
    write_series(tmp_path / "scan", 5)
    path = tmp_path / "scan" / "Secret_Person_0003"
    path.write_bytes(path.read_bytes()[:-50])
    status, rows, _ = predict([tmp_path / "scan"], tmp_path / "out")
    assert status == 2 and rows is None and not (tmp_path / "out").exists()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("covidmask: error:") and str(path) in last
    assert not stub.batches


@pytest.mark.skipif(
    not os.environ.get("COVIDMASK_REAL"), reason="COVIDMASK_REAL (folder of real CT) is not set"
)
def test_real_dicom_folder(tmp_path, tiny_weights):
    pytest.importorskip("pydicom", reason="needs the extra `medical`")
    folder = Path(os.environ["COVIDMASK_REAL"]) / "dicom"
    words = ["predict", folder, "--out", tmp_path, *tiny_weights]
    assert main([str(word) for word in words]) == 0
    rows = table(tmp_path, "predictions")
    assert [row["position_mm"] for row in rows] == ["0.00", "1.00"]
    assert all(float(row["lesion_mm2"]) >= 0 for row in rows)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"1.2.826" not in written and b"1.3.6.1.4" not in written
