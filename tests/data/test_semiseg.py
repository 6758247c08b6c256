import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from covidmask.datasets.lesions import SemiSeg, split_by_patient
from covidmask.datasets.patients import draw_positions, make_patient, render
from covidmask.datasets.phantom_sets import _patient_seed, write_semiseg_phantoms
from covidmask.errors import DataError, OutputError


def write_pair(root, name, indices, size=None):
    """Store a pair as COVID-SemiSeg does: palette mask, image of the same size."""
    folder = root / "TrainingSet" / "MultiClassInfection-Train"
    for part in ("Imgs", "GT"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    grey = np.uint8(indices * 100) if size is None else np.zeros(size, np.uint8)
    Image.fromarray(grey).save(folder / "Imgs" / f"{name}.jpg", quality=100)
    mask = Image.fromarray(indices)
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    mask.save(folder / "GT" / f"{name}.png")
    return folder


@pytest.fixture
def stored():
    """Palette indices as stored, 10 x 16: GGO in columns 2..4 and consolidation at the end."""
    indices = np.zeros((10, 16), dtype=np.uint8)
    indices[1:3, 2:5] = 1
    indices[8:, 14:] = 2
    return indices


def test_codes_and_transpose(tmp_path, stored):
    write_pair(tmp_path, "0", stored)
    image, mask = SemiSeg(tmp_path, "train").read(0)
    assert set(np.unique(mask)) == {0, 2, 3}
    np.testing.assert_array_equal(mask, np.uint8([0, 2, 3])[stored].T)
    np.testing.assert_allclose(image, stored.T * 100 / 255, atol=0.1)  # JPEG is not exact
    image, target = SemiSeg(tmp_path, "train")[0]
    assert (image.shape, image.dtype) == ((3, 16, 10), torch.float32)
    assert target["labels"].tolist() == [1, 2]
    assert target["boxes"].tolist() == [[1, 2, 3, 5], [8, 14, 10, 16]]  # 3 rows now, 2 columns


def test_numeric_order_and_the_dataset_folder(tmp_path, stored):
    for name in ("10", "9", "100"):
        write_pair(tmp_path / "Dataset", name, stored)
    dataset = SemiSeg(tmp_path, "train", "merged", 5)
    assert dataset.names == ["9.jpg", "10.jpg", "100.jpg"]
    assert dataset.patients == ["9", "10", "100"]
    assert dataset[2][1]["area"].tolist() == [6]


def test_bad_folders(tmp_path, stored):
    with pytest.raises(DataError, match="no split 'val'; choose train or test"):
        SemiSeg(tmp_path, "val")
    with pytest.raises(DataError, match="no split 'train'.* where Imgs holds .jpg slices"):
        SemiSeg(tmp_path, "train")
    folder = write_pair(tmp_path, "0", stored)
    (folder / "GT" / "0.png").unlink()
    with pytest.raises(DataError, match=r"Train: slices without a mask: 1 .*GT.0.png\); add"):
        SemiSeg(tmp_path, "train")


@pytest.mark.parametrize(
    "value, size, problem", [(3, None, r"expected codes 0..2"), (0, (16, 10), "its image 10 x 16")]
)
def test_bad_masks(tmp_path, stored, value, size, problem):
    write_pair(tmp_path, "7", stored + np.uint8(value), size)
    with pytest.raises(DataError, match=problem) as caught:
        SemiSeg(tmp_path, "train")[0]
    assert "7.png" in str(caught.value)


def test_phantoms_in_this_layout(tmp_path):
    root = write_semiseg_phantoms(tmp_path / "one", 128, (6, 3), seed=4)
    train, test = (SemiSeg(root, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (6, 3)
    assert not set(train.names) & set(test.names)
    shapes = set()
    for dataset in (train, test):
        for index in range(len(dataset)):
            image, mask = dataset.read(index)
            shapes.add(image.shape)
            assert image.shape[1] > image.shape[0]  # a chest is wider than deep: axial again
            assert max(image.shape) < 128  # cropped
            assert set(np.unique(mask)) <= {0, 2, 3} and (mask > 0).any()
            both = [np.asarray(picture) for picture in stored_pair(dataset, index)]
            assert both[0].shape == both[1].shape == image.shape[::-1]
            assert stored_pair(dataset, index)[1].mode == "P"
    assert len(shapes) > 1
    patient = make_patient(_patient_seed(4, 1_000_000), 2, severe=True)
    image, mask = render(patient, draw_positions(patient, 1)[0], 128)
    rows, columns = (slice(at.min() - 4, at.max() + 5) for at in np.nonzero(mask))
    read = train.read(0)
    np.testing.assert_array_equal(read[1], np.uint8([0, 0, 2, 3])[mask[rows, columns]])
    np.testing.assert_allclose(read[0], image[rows, columns], atol=0.1)  # JPEG is not exact


def stored_pair(dataset, index):
    name = dataset.patients[index]
    return (
        Image.open(dataset.folder / "Imgs" / f"{name}.jpg"),
        Image.open(dataset.folder / "GT" / f"{name}.png"),
    )


def test_phantoms_in_this_layout_are_found_again_and_the_same(tmp_path):
    root = write_semiseg_phantoms(tmp_path / "one", 64, (1, 1))
    files = {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*g")}
    assert len(files) == 4
    time = (root / "phantoms.json").stat().st_mtime_ns
    assert write_semiseg_phantoms(root, 64, (1, 1)) == root
    assert (root / "phantoms.json").stat().st_mtime_ns == time
    other = write_semiseg_phantoms(tmp_path / "two", 64, (1, 1))
    assert {path.relative_to(other): path.read_bytes() for path in other.rglob("*.*g")} == files
    with pytest.raises(DataError, match="other settings"):
        write_semiseg_phantoms(root, 64, (1, 1), seed=1)
    with pytest.raises(DataError, match="size must be"):
        write_semiseg_phantoms(tmp_path / "three", 32)
    (tmp_path / "file").write_text("x")
    with pytest.raises((DataError, OutputError)):
        write_semiseg_phantoms(tmp_path / "file" / "below", 64, (1, 1))
    assert not list(tmp_path.glob(".*tmp"))


@pytest.mark.skipif(
    not os.environ.get("COVIDMASK_REAL"), reason="COVIDMASK_REAL (folder of real CT) is not set"
)
def test_the_real_training_slices():
    dataset = SemiSeg(Path(os.environ["COVIDMASK_REAL"]) / "covid-semiseg", "train")
    assert len(dataset) == 50
    assert dataset.names[:3] + dataset.names[-1:] == ["0.jpg", "1.jpg", "2.jpg", "67.jpg"]
    assert [len(part) for part in split_by_patient(dataset.patients, (0.8, 0.2), 0)] == [40, 10]
    instances, wide = 0, 0
    for index in range(len(dataset)):
        image, target = dataset[index]
        assert image.min() >= 0 and image.max() <= 1
        assert target["masks"].shape[1:] == image.shape[1:]
        assert set(target["labels"].tolist()) <= {1, 2}
        instances += len(target["labels"])
        wide += image.shape[2] > image.shape[1]
    assert instances > 100
    assert wide >= 40  # a chest is wider than deep; as stored, it would be 8
