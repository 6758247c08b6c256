"""Ranked boxes are kept in a file: the right one, whole, and found again."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY_CLASSIFIER, TINY_DETECTOR, TinySlices
from torch.utils.data import Subset
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

import covidmask
from covidmask.datasets.classes import SliceImages
from covidmask.datasets.scans import read_image
from covidmask.errors import OutputError, TrainingError
from covidmask.models.classifier import CovidCTMaskNet, covid_ct_mask_net
from covidmask.models.detector import lesion_mask_rcnn
from covidmask.training import ranked_cache
from covidmask.training.loop import make_fabric
from covidmask.training.ranked_cache import cache_ranked_boxes


class Files(SliceImages):
    """Tiny slices as files; counts what is read, and can fail at one of them."""

    def __init__(self, root, count, monkeypatch):
        self.root, self.slices = root, TinySlices(count)
        self.names, self.labels = self.slices.names, self.slices.labels
        self.reads, self.fails_at = [], None
        monkeypatch.setattr("covidmask.datasets.classes.read_image", self.read)
        for i, name in enumerate(self.names):
            levels = (self.slices[i][0][0] * 255).round().to(torch.uint8).numpy()
            Image.fromarray(levels).save(root / name)

    def read(self, path):
        index = self.slices.names.index(path.name)
        if index == self.fails_at:
            raise KeyboardInterrupt
        self.reads.append(index)
        return read_image(path)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    (tmp_path / "slices").mkdir()
    return Files(tmp_path / "slices", 6, monkeypatch)


@pytest.fixture(autouse=True)
def every_batch_is_kept(monkeypatch):
    monkeypatch.setattr(ranked_cache, "SECONDS", 0)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return covid_ct_mask_net(lesion_mask_rcnn(TINY_DETECTOR), TINY_CLASSIFIER)


def rank(model, dataset, folder=None, **options):
    fabric = make_fabric(options.pop("precision", "32-true"), "cpu")
    options = {"batch_size": 2, "fabric": fabric, "progress": False, "folder": folder, **options}
    return cache_ranked_boxes(model, dataset, **options)


def test_boxes_are_found_again_and_mapped(model, dataset, folder):
    rows = rank(model, dataset, folder)
    assert rows.shape == (6, 16, 5) and not rows.isnan().any()
    images = [dataset[i][0] for i in range(6)]
    with torch.no_grad():
        expected = model.ranked_boxes(images)
    torch.testing.assert_close(rows[..., 0], expected[..., 0], rtol=1e-4, atol=1e-5)
    assert [path.suffix for path in folder.iterdir()] == [".npy"]  # no part is left over
    dataset.reads.clear()
    again = rank(model, dataset, folder)
    assert torch.equal(again, rows) and dataset.reads == []
    (path,) = folder.iterdir()
    before = path.read_bytes()
    again.zero_()  # a mapped copy: the file stays
    assert path.read_bytes() == before


def test_every_change_is_another_file(model, dataset, folder):
    """Weights, detector's settings, N, precision, a pixel, the order: none may find old boxes."""
    rank(model, dataset, folder)
    names = [set(folder.iterdir())]

    def changed(model, dataset, **options):
        rank(model, dataset, folder, **options)
        names.append(set(folder.iterdir()))
        assert len(names[-1]) == len(names[-2]) + 1

    other = covid_ct_mask_net(lesion_mask_rcnn(TINY_DETECTOR), TINY_CLASSIFIER)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.detector.roi_heads.box_predictor.cls_score.bias[1] += 1e-3
    changed(other, dataset)
    fewer = dataclasses.replace(TINY_CLASSIFIER, n_boxes=8)
    changed(CovidCTMaskNet(model.detector, fewer), dataset)
    detector = lesion_mask_rcnn(dataclasses.replace(TINY_DETECTOR, rpn_test_proposals=50))
    settings = covid_ct_mask_net(detector, TINY_CLASSIFIER)
    settings.load_state_dict(model.state_dict())
    changed(settings, dataset)
    changed(model, dataset, precision="bf16-mixed")
    pixels = np.array(Image.open(dataset.root / dataset.names[2]))
    pixels[5, 5] ^= 1
    Image.fromarray(pixels).save(dataset.root / dataset.names[2])
    changed(model, dataset)
    dataset.names = dataset.names[::-1]
    changed(model, dataset)
    rank(model, dataset, folder)  # and the same once more is none
    assert set(folder.iterdir()) == names[-1]


def test_s_is_no_part_of_the_key(model, dataset, folder):
    rank(model, dataset, folder)
    other = covid_ct_mask_net(model.detector, TINY_CLASSIFIER)  # another random S
    dataset.reads.clear()
    rank(other, dataset, folder)
    assert dataset.reads == [] and len(list(folder.iterdir())) == 1


def test_a_killed_run_goes_on(model, dataset, folder):
    expected = rank(model, dataset)
    dataset.fails_at = 4
    with pytest.raises(KeyboardInterrupt):
        rank(model, dataset, folder)
    dataset.fails_at = None
    dataset.reads.clear()
    rows = rank(model, dataset, folder)
    assert dataset.reads == [4, 5]  # the first four were on disk
    torch.testing.assert_close(rows, expected)
    assert len(list(folder.iterdir())) == 1


def test_another_kill_at_another_batch_size(model, dataset, folder):
    expected = rank(model, dataset)
    for fails_at, size in ((3, 1), (5, 2)):
        dataset.fails_at = fails_at
        with pytest.raises(KeyboardInterrupt):
            rank(model, dataset, folder, batch_size=size)
    dataset.fails_at = None
    dataset.reads.clear()
    torch.testing.assert_close(rank(model, dataset, folder, batch_size=4), expected)
    assert dataset.reads == [5]


def test_not_every_batch_is_kept_at_once(model, dataset, folder, monkeypatch):
    monkeypatch.setattr(ranked_cache, "SECONDS", 60)
    dataset.fails_at = 4
    with pytest.raises(KeyboardInterrupt):
        rank(model, dataset, folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("damage", [lambda c: c[:-7], lambda c: bytes(len(c)), lambda c: b""])
def test_what_a_killed_run_left_is_trusted_as_far_as_it_is_whole(model, dataset, folder, damage):
    expected = rank(model, dataset)
    dataset.fails_at = 4
    with pytest.raises(KeyboardInterrupt):
        rank(model, dataset, folder)
    dataset.fails_at = None
    dataset.reads.clear()
    (part,) = folder.iterdir()
    assert sorted(path.name for path in part.iterdir()) == ["0.npy", "2.npy"]
    (part / "2.npy").write_bytes(damage((part / "2.npy").read_bytes()))
    torch.testing.assert_close(rank(model, dataset, folder), expected)
    assert dataset.reads == [2, 3, 4, 5] and len(list(folder.iterdir())) == 1


def test_a_full_disk_is_told_and_the_run_goes_on(model, dataset, folder, monkeypatch):
    expected, save = rank(model, dataset), np.save

    def full(path, rows):
        save(path, rows)
        if len(dataset.reads) > 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", full)
        dataset.reads.clear()
        with pytest.raises(OutputError, match="2.npy: cannot be written .No space left on device"):
            rank(model, dataset, folder)
    dataset.reads.clear()
    torch.testing.assert_close(rank(model, dataset, folder), expected)
    assert dataset.reads == [2, 3, 4, 5]


def test_other_code_is_another_file(model, dataset, folder, tmp_path, monkeypatch):
    """After an edit of `encoded_rows`, say, the old rows may not come back."""
    rank(model, dataset, folder)
    package = tmp_path / "covidmask"
    for part in ("models", "datasets"):
        shutil.copytree(Path(covidmask.__file__).parent / part, package / part)
    monkeypatch.setattr(covidmask, "__file__", str(package / "__init__.py"))
    dataset.reads.clear()
    rank(model, dataset, folder)
    assert dataset.reads == []
    for number, name in enumerate(("models/ranked_boxes.py", "datasets/scans.py"), 2):
        with open(package / name, "a") as file:
            file.write("# edited\n")
        dataset.reads.clear()
        rank(model, dataset, folder)
        assert len(dataset.reads) == 6 and len(list(folder.iterdir())) == number


def test_a_setting_changed_by_hand_is_another_file(dataset, folder):
    """Also one that no configuration knows of."""
    torch.manual_seed(0)
    other = covid_ct_mask_net(lesion_mask_rcnn(TINY_DETECTOR), TINY_CLASSIFIER)
    rank(other, dataset, folder)
    other.detector.rpn.nms_thresh = 0.3
    dataset.reads.clear()
    rank(other, dataset, folder)
    assert len(dataset.reads) == 6 and len(list(folder.iterdir())) == 2
    other.detector.roi_heads.box_coder.weights = (1.0, 1.0, 1.0, 1.0)  # of a helper, no module
    rank(other, dataset, folder)
    assert len(list(folder.iterdir())) == 3


def test_a_forward_pass_changes_no_setting():
    """Of torchvision's own, too."""
    theirs = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=64
    ).eval()
    before = ranked_cache.settings_digest(theirs)
    with torch.no_grad():
        theirs([torch.rand(3, 64, 64)])
    assert ranked_cache.settings_digest(theirs) == before


def test_slices_that_are_no_files(model, dataset, folder):
    slices = dataset.slices
    rows = rank(model, slices, folder)
    assert torch.equal(rank(model, slices, folder), rows) and len(list(folder.iterdir())) == 1
    slices._images[2] = slices._images[2] * 0.5
    rank(model, slices, folder)
    slices._images[2] = slices._images[2].transpose(1, 2).reshape(3, 32, 128)
    rank(model, slices, folder)
    assert len(list(folder.iterdir())) == 3


def test_a_crop_of_the_same_files_is_another_file(model, dataset, folder):
    class Cropped(SliceImages):
        def __init__(self):
            vars(self).update(vars(dataset))

        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image[:, 8:56, 8:56], label

    assert not torch.equal(rank(model, dataset, folder), rank(model, Cropped(), folder))
    assert len(list(folder.iterdir())) == 2


def test_names_are_not_needed(model, folder):
    part = Subset(TinySlices(3), [0, 2])
    assert torch.equal(rank(model, part, folder), rank(model, part, folder))


def test_two_runs_at_once(model, dataset, folder, monkeypatch):
    """One is done in the middle of the other, and takes its folder away."""
    expected, write, others = rank(model, dataset), ranked_cache._write, []

    def interrupted(path, rows):
        if path.name == "2.npy":
            monkeypatch.setattr(ranked_cache, "_write", write)
            others.append(rank(model, dataset, folder, batch_size=3))
        write(path, rows)

    monkeypatch.setattr(ranked_cache, "_write", interrupted)
    torch.testing.assert_close(rank(model, dataset, folder), expected)
    torch.testing.assert_close(others[0], expected)
    assert [path.suffix for path in folder.iterdir()] == [".npy"]


def test_a_finished_file_with_a_gap_is_computed_again(model, dataset, folder):
    rows = rank(model, dataset, folder).clone()
    (path,) = folder.iterdir()
    np.lib.format.open_memmap(path, mode="r+")[3, -1] = np.nan
    assert torch.equal(rank(model, dataset, folder), rows)


def test_boxes_that_are_no_numbers_name_the_slice(model, dataset, folder, monkeypatch):
    ranked = CovidCTMaskNet.ranked_boxes
    monkeypatch.setattr(
        CovidCTMaskNet, "ranked_boxes", lambda *arguments: ranked(*arguments) * torch.nan
    )
    for place in (None, folder):
        with pytest.raises(TrainingError, match="2 .phantom_0.png, phantom_1.png.: .*look at"):
            rank(model, dataset, place)
    assert not list(folder.glob("ranked-*"))


def test_the_first_process_decides_whether_boxes_are_there(model, dataset, folder, monkeypatch):
    rank(model, dataset, folder)
    fabric = make_fabric(device="cpu")
    monkeypatch.setattr(fabric, "broadcast", lambda found: False)  # it looked a moment earlier
    dataset.reads.clear()
    rank(model, dataset, folder, fabric=fabric)
    assert len(dataset.reads) == 6


@pytest.mark.parametrize("damage", [b"", b"no array", None], ids=["empty", "text", "cut"])
def test_a_damaged_file_is_computed_again(model, dataset, folder, damage):
    rows = rank(model, dataset, folder).clone()  # not mapped
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    again = rank(model, dataset, folder)
    assert torch.equal(again, rows) and path.read_bytes() == whole


def test_a_folder_that_cannot_be_written(model, dataset, tmp_path):
    (tmp_path / "file").write_text("in the way")
    dataset.reads.clear()
    with pytest.raises(OutputError, match="file"):
        rank(model, dataset, tmp_path / "file")
    assert dataset.reads == []  # nothing was computed in vain
