"""Scans by the network for CT: lungs first, coordinates of the whole slice, no probabilities."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from scan_files import write_image
from scipy import ndimage
from tiny import TINY_CLASSIFIER, TINY_DETECTOR

from covidmask import predict as module
from covidmask.cli import main
from covidmask.datasets.chest import draw
from covidmask.datasets.lungs import crop_box, find_lungs
from covidmask.datasets.patients import make_patient
from covidmask.errors import CheckpointError
from covidmask.files import weights_file
from covidmask.models.classifier import covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.models.weights import ShippedWeights, save_model
from covidmask.predict import lesions_in_lungs, predict

nibabel = pytest.importorskip("nibabel", reason="needs the extra `medical`")
SIZE = 128


class Centre(torch.nn.Module):
    """Finds one GGO lesion: a band of 10 rows through the middle, the same when mirrored."""

    def __init__(self):
        super().__init__()
        self.config, self.classes, self.seen = TINY_DETECTOR, ("GGO", "C"), []
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def __deepcopy__(self, memo):
        return self

    def forward(self, images):
        found = []
        for image in images:
            self.seen.append(tuple(image.shape[1:]))
            row, width = image.shape[1] // 2 - 5, image.shape[2]
            mask = torch.zeros(1, 1, *image.shape[1:])
            mask[0, 0, row : row + 10] = 1
            box = torch.tensor([[0, row, width, row + 10]]).float()
            values = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
            found.append(values | {"masks": mask})
        return found


@pytest.fixture
def centre(monkeypatch):
    network = Centre()
    monkeypatch.setattr(module, "load_segmenter", lambda path, device: network)

    def none(*_):
        raise AssertionError("scans need no classifier")

    monkeypatch.setattr(module, "load_classifier", none)
    return network


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """A drawn scan as NIfTI, from the feet, and its slices in HU; the first shows no lung."""
    slices = [draw(make_patient(1, 0), p, SIZE)[0] for p in (0.6, 0.55, 0.5)]
    slices = [np.full_like(slices[0], 40), *slices]
    path = tmp_path_factory.mktemp("scan") / "scan.nii.gz"
    array = np.stack([np.rint(hu).T[::-1, ::-1] for hu in slices], -1).astype(np.int16)  # to RAS
    nibabel.Nifti1Image(array, np.diag([0.8, 0.8, 5, 1])).to_filename(path)
    return path, slices


def near(lungs):
    """What may be lesion: the lungs and a twenty-fourth of the side around them."""
    return ndimage.distance_transform_edt(~lungs) <= SIZE / 24


def table(out, name):
    with open(out / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_scan_is_looked_at_in_its_lungs(volume, centre, tmp_path, capsys):
    path, slices = volume
    predict([path], "s", "c", tmp_path, ct="ct", slices="all")
    rows, (total,) = table(tmp_path, "predictions"), table(tmp_path, "summary")
    lungs = [find_lungs(np.rint(hu)) for hu in slices]
    boxes = [crop_box(each) for each in lungs[1:]]
    sizes = [(r.stop - r.start, c.stop - c.start) for r, c in boxes]
    assert centre.seen == [size for size in sizes for _ in range(2)]  # with the mirrored one
    assert [int(row["lung_pixels"]) for row in rows] == [int(each.sum()) for each in lungs]
    assert [row["lesions"] for row in rows] == ["0", "1", "1", "1"]
    assert rows[0]["lung_share"] == "" and rows[0]["lesion_pixels"] == "0"
    called, all_lung = 0, 0
    for row, each, (r, c) in zip(rows[1:], lungs[1:], boxes, strict=True):
        lesion = np.zeros(each.shape, bool)
        top = r.start + (r.stop - r.start) // 2 - 5
        lesion[top : top + 10, c] = True
        lesion &= near(each)
        assert int(row["lesion_pixels"]) == lesion.sum()
        share = (lesion & each).sum() / each.sum()
        assert abs(float(row["lung_share"]) - share) < 1e-5 and share > 0.05
        called, all_lung = called + share * each.sum(), all_lung + each.sum()
    assert abs(float(total["lung_share"]) - called / all_lung) < 1e-5
    assert "Control" not in rows[0] and rows[0]["likeliest"] == ""
    shown = capsys.readouterr()
    assert "no class probabilities" in shown.out + shown.err and "sigmoid" not in shown.out
    assert "no class probabilities" in total["note"]


def test_boxes_and_maps_have_the_coordinates_of_the_slice():
    hu, _ = draw(make_patient(1, 0), 0.5, SIZE)
    network = Centre()
    found, lungs = lesions_in_lungs(network, hu)
    rows, columns = crop_box(lungs)
    assert found["maps"].shape == (2, SIZE, SIZE)
    top = rows.start + (rows.stop - rows.start) // 2 - 5
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[top : top + 10, columns] = True
    inside &= torch.from_numpy(near(lungs))
    assert ((found["maps"][0] > 0.5) == inside).all()
    assert found["boxes"][0].tolist() == [columns.start, top, columns.stop, top + 10]
    assert (found["maps"][1] == 0).all()


def test_what_is_far_from_the_lungs_is_no_lesion():
    hu, _ = draw(make_patient(1, 0), 0.62, SIZE)
    lungs = find_lungs(hu)
    network = Centre()
    heart = Centre.forward

    def small(self, images):  # a box in the middle of the chest, where the heart lies
        found = heart(self, images)
        for each, image in zip(found, images, strict=True):
            middle, row = image.shape[2] // 2, image.shape[1] // 3
            each["boxes"] = torch.tensor([[middle - 2, row - 2, middle + 2, row + 2]]).float()
        return found

    for forward, count in ((heart, 1), (small, 0)):
        network.forward = forward.__get__(network)
        found, _ = lesions_in_lungs(network, hu)
        assert len(found["boxes"]) == len(found["labels"]) == len(found["scores"]) == count
        assert not found["maps"][0].numpy()[~near(lungs)].any()


def test_pictures_beside_a_scan_keep_their_probabilities(volume, tmp_path):
    torch.manual_seed(0)
    segmenter = lesion_mask_rcnn(TINY_DETECTOR)
    files = [tmp_path / "s.safetensors", tmp_path / "c.safetensors"]
    save_model(segmenter, files[0])
    save_model(covid_ct_mask_net(segmenter, TINY_CLASSIFIER), files[1])
    picture = tmp_path / "one.png"
    write_image(picture, np.random.default_rng(0).random((64, 64)).astype(np.float32))
    predict([volume[0], picture], *files, tmp_path / "out", ct=files[0], slices="3")
    rows = table(tmp_path / "out", "predictions")
    assert [row["image"] for row in rows] == ["one.png", "volume 1"]
    assert float(rows[0]["Control"]) > 0 and rows[0]["likeliest"]
    assert rows[1]["Control"] == "" and rows[1]["likeliest"] == ""
    assert rows[0]["lung_pixels"] == "" and int(rows[1]["lung_pixels"]) > 1000
    pictures, scan = table(tmp_path / "out", "summary")
    assert float(pictures["mean Control"]) > 0 and scan["mean Control"] == ""


def test_a_scan_without_lungs_is_noted(tmp_path, centre, capsys):
    path = tmp_path / "flat.nii"
    array = np.linspace(0, 255, 64 * 64 * 2).reshape(64, 64, 2).astype(np.int16)
    nibabel.Nifti1Image(array, np.diag([1, 1, 5, 1])).to_filename(path)
    predict([path], "s", "c", tmp_path / "out", ct="ct")
    shown = capsys.readouterr()
    assert "no lung is found in any slice; are the values HU?" in shown.out + shown.err
    assert centre.seen == []


def test_a_network_that_gives_no_numbers_is_told(volume, centre, monkeypatch, tmp_path):
    original = Centre.forward

    def broken(self, images):
        found = original(self, images)
        found[0]["masks"] = found[0]["masks"] * float("nan")
        return found

    monkeypatch.setattr(Centre, "forward", broken)
    with pytest.raises(CheckpointError, match="values that are not numbers near slice_0003"):
        predict([volume[0]], "s", "c", tmp_path, ct="ct", slices="3")
    assert not Path(tmp_path / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("yours", "options", "used"),
    [
        (False, [], True),
        (True, [], False),  # what you have trained comes before what is shipped
        (False, ["--segmenter", "mine.safetensors"], False),
        (False, ["--regime", "heads"], False),
    ],
)
def test_the_network_for_ct_is_for_those_without_weights(
    yours, options, used, tmp_path, monkeypatch
):
    monkeypatch.setenv("COVIDMASK_DATA", str(tmp_path))
    if yours:
        save_model(lesion_mask_rcnn(TINY_DETECTOR), weights_file("segmenter", "quick"))
    given = {}
    monkeypatch.setattr(module, "predict", lambda *_, **words: given.update(words) or [])
    assert main(["predict", "scan.nii", "--out", str(tmp_path / "out"), *options]) == 0
    assert given.get("ct") == (ShippedWeights.SEGMENTER_CT.path if used else None)
