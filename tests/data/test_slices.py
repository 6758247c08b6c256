import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from covidmask.config import IMAGE_CLASSES
from covidmask.datasets.classes import (
    SliceEntry,
    SliceImages,
    SliceName,
    balanced_sample,
    class_names,
    class_statistics,
    parse_name,
    read_split,
    write_split,
)
from covidmask.errors import DataError
from covidmask.files import read_lines

# --- names and lists ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [
        ("Normal_3855_5367_0207.png", SliceName(0, "3855", "5367", "0207")),
        ("CP_1_2_3.png", SliceName(1, "1", "2", "3")),
        ("NCP_96_1328_0032.jpg", SliceName(2, "96", "1328", "0032")),
        ("2_91_1318_0062.png", SliceName(2, "91", "1318", "0062")),
    ],
)
def test_names(name, expected):
    assert parse_name(name) == expected


@pytest.mark.parametrize(
    "name", ["", "x.png", "3_1_2_3.png", "COVID_1_2_3.png", "NCP_1_2.png", "NCP_1_2_3_4.png",
             "NCP_1_2_3", "../NCP_1_2_3.png", "NCP_a/b_2_3.png"]
)  # fmt: skip
def test_bad_names(name):
    with pytest.raises(DataError, match="no slice name"):
        parse_name(name)


def test_both_kinds_of_lines(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("NCP_1_2_0003.png 2 9 94 512 405\n\n0_7_8_0001.png\n")
    entries = [
        SliceEntry("NCP_1_2_0003.png", 2, (9, 94, 512, 405)),
        SliceEntry("0_7_8_0001.png", 0, None),
    ]
    assert read_split(path) == entries
    write_split(path, entries)
    assert read_split(path) == entries


def test_a_list_with_a_byte_order_mark(tmp_path):
    (tmp_path / "list.txt").write_text("NCP_1_2_0003.png 2 9 94 512 405\n", encoding="utf-8-sig")
    entry = SliceEntry("NCP_1_2_0003.png", 2, (9, 94, 512, 405))
    assert read_split(tmp_path / "list.txt") == [entry]


@pytest.mark.parametrize(
    "content, problem",
    [
        ("", "is empty"),
        ("NCP_1_2_3.png\nhello.png\n", "line 2: hello.png: this is no slice name"),
        ("NCP_1_2_3.png 2 0 0 9\n", "line 1.*expected `name"),
        ("NCP_1_2_3.png 2 0 0 9 x\n", "line 1.*'x'; expected `name"),
        ("NCP_1_2_3.png 2 0 0 9 9.5\n", "line 1.*'9.5'; expected `name"),
        ("NCP_1_2_3.png 1 0 0 9 9\n", "line 1.*label 1 contradicts"),
        ("NCP_1_2_3.png 7 0 0 9 9\n", "line 1.*label 7 contradicts"),
        ("NCP_1_2_3.png 2 9 0 9 9\n", "line 1.*box"),
        ("NCP_1_2_3.png\nCP_1_2_3.png\nNCP_1_2_3.png\n", "line 3.*line 1"),
    ],
)
def test_bad_lists(tmp_path, content, problem):
    (tmp_path / "bad.txt").write_text(content)
    with pytest.raises(DataError, match=problem) as caught:
        read_split(tmp_path / "bad.txt")
    assert "bad.txt" in str(caught.value)


def test_a_missing_list(tmp_path):
    with pytest.raises(DataError, match="absent.txt: cannot be opened"):
        read_split(tmp_path / "absent.txt")


# --- the folder -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for value, name in enumerate(("Normal_1_1_0001.png", "CP_2_1_0001.jpg", "NCP_3_1_0001.png")):
        Image.fromarray(np.full((10, 12), value * 50, np.uint8)).save(tmp_path / name)
    (tmp_path / "train.txt").write_text(
        "NCP_3_1_0001.png 2 0 0 12 10\nNormal_1_1_0001.png 0 0 0 12 10\nCP_2_1_0001.jpg\n"
    )
    return tmp_path


def test_items(folder):
    dataset = SliceImages(folder, "train", require_classes=True)
    assert dataset.labels == [2, 0, 1]
    assert dataset.patients == ["3", "1", "2"]
    image, label = dataset[0]
    assert (image.shape, image.dtype, label) == ((3, 10, 12), torch.float32, 2)
    assert torch.allclose(image, torch.tensor(100 / 255))
    images, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=3)))
    assert images.shape == (3, 3, 10, 12) and labels.tolist() == [2, 0, 1]


def test_the_author_s_names_find_the_files_of_covidx(folder):
    own = folder / "author.txt"
    own.write_text("2_3_1_0001.png\n1_2_1_0001.png\n")
    dataset = SliceImages(folder, own)
    assert dataset.names == ["NCP_3_1_0001.png", "CP_2_1_0001.jpg"]
    assert dataset.labels == [2, 1]
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(folder / "1_2_1_0001.jpg")
    with pytest.raises(DataError, match=r"author.txt.*1_2_1_0001.png"):  # which of the two?
        SliceImages(folder, own)


def test_bad_folders_and_lists(folder):
    with pytest.raises(DataError, match="absent: there is no such data folder"):
        SliceImages(folder / "absent", "train")
    with pytest.raises(DataError, match="val.txt"):
        SliceImages(folder, "val")
    (folder / "val.txt").write_text("".join(f"CP_{i}_1_1.png\n" for i in range(5)))
    with pytest.raises(DataError, match=r"val.txt.*: 5 \(CP_0_1_1.png, CP_1_1_1.png, .*\.\.\.\)"):
        SliceImages(folder, "val")
    (folder / "test.txt").write_text("CP_2_1_0001.jpg\n")
    assert len(SliceImages(folder, "test")) == 1
    with pytest.raises(DataError, match="test.txt.*class Control, COVID-19"):
        SliceImages(folder, "test", require_classes=True)


def test_damaged_files_are_found_on_reading(folder):
    (folder / "NCP_3_1_0001.png").write_bytes(b"text")
    with pytest.raises(DataError, match="NCP_3_1_0001.png"):
        SliceImages(folder, "train")[0]


# --- classes of your own --------------------------------------------------------------------------

TWO = ("healthy", "ill")


@pytest.fixture
def two_classes(tmp_path):
    """A folder that says itself what its classes are; one name has a form of its own."""
    for name in ("0_1_1_0001.png", "ill_2_1_0001.png", "scan 7.png", "scan8.png"):
        Image.fromarray(np.full((10, 12), 50, np.uint8)).save(tmp_path / name)
    (tmp_path / "classes.txt").write_text("healthy\n\n ill \n", encoding="utf-8-sig")
    (tmp_path / "train.txt").write_text("0_1_1_0001.png 0\n1_2_1_0001.png\nscan8.jpg 1\n")
    return tmp_path


def test_a_folder_brings_its_classes(two_classes):
    dataset = SliceImages(two_classes, "train", require_classes=True)
    assert dataset.classes == TWO and dataset.labels == [0, 1, 1]
    assert dataset.names == ["0_1_1_0001.png", "ill_2_1_0001.png", "scan8.png"]
    assert dataset.patients == ["1", "2", "scan8"]
    assert dataset[2][1] == 1
    found = class_statistics(dataset)
    assert found.classes == TWO
    assert found.slices.tolist() == found.patients.tolist() == [1, 2]
    (two_classes / "val.txt").write_text("scan8.png 1\n")
    with pytest.raises(DataError, match="no slices of class healthy;"):
        SliceImages(two_classes, "val", require_classes=True)
    (two_classes / "classes.txt").write_text("no\nill\nvery ill")
    assert SliceImages(two_classes, "train").labels == [0, 1, 1]
    with pytest.raises(DataError, match="no slices of class very ill;"):
        SliceImages(two_classes, "train", True)
    assert class_names(two_classes.parent) == IMAGE_CLASSES


@pytest.mark.parametrize(
    "content, problem",
    [
        ("2_1_1_0001.png\n", "line 1: 2_1_1_0001.png.*with class healthy, ill, 0, 1;"),
        ("NCP_1_1_0001.png 1\n", "line 1: NCP_1_1_0001.png.*with class healthy"),
        ("scan8.png 2\n", r"line 1: label 2 .*is not one of 0 to 1 \(healthy, ill\)"),
        ("scan8.png 2 0 0 9 9\n", "line 1: label 2"),
        ("scan8.png -1\n", "line 1: label -1"),
        ("scan8.png\n", "line 1: scan8.png: this is no slice name"),
        ("../scan8.png 1\n", "line 1: ../scan8.png: this is no slice name"),
        ("ill_2_1_0001.png 0\n", "line 1: label 0 contradicts"),
    ],
)
def test_labels_outside_the_classes(two_classes, content, problem):
    (two_classes / "val.txt").write_text(content)
    with pytest.raises(DataError, match=problem):
        SliceImages(two_classes, "val")


@pytest.mark.parametrize("content", [b"", b"one\n", b"one\ntwo\none\n", b"\xff\xfe\x00"])
def test_no_list_of_classes(two_classes, content):
    (two_classes / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match="classes.txt: no list of classes.*two or more different"):
        SliceImages(two_classes, "train")


def test_lists_and_samples_of_own_classes(two_classes):
    pool = read_split(two_classes / "train.txt", TWO)
    sample = balanced_sample(pool, 1, 0, classes=TWO)
    assert [entry.label for entry in sample] == [0, 1]
    with pytest.raises(DataError, match="1 slices of class healthy, 2 are asked for"):
        balanced_sample(pool, 2, 0, classes=TWO)
    pool.append(SliceEntry("scan9.png", 0, (1, 2, 3, 4)))
    write_split(two_classes / "out.txt", pool)
    assert read_split(two_classes / "out.txt", TWO) == pool


# --- the sampler ----------------------------------------------------------------------------------


def entries(slices_of):
    """One class word per class; patient p of each class has slices_of[p] slices."""
    return [
        SliceEntry(f"{word}_{word}{p}_1_{i:04}.png", label, None)
        for label, word in enumerate(("Normal", "CP", "NCP"))
        for p, count in enumerate(slices_of)
        for i in range(count)
    ]


@settings(max_examples=20, deadline=None)
@given(
    slices_of=st.lists(st.integers(1, 6), min_size=3, max_size=6),
    per_class=st.integers(1, 3),
    seed=st.integers(0, 99),
    by_patient=st.booleans(),
)
def test_sample(slices_of, per_class, seed, by_patient):
    pool = entries(slices_of)
    sample = balanced_sample(pool, per_class, seed, by_patient)
    assert [e.label for e in sample] == [0] * per_class + [1] * per_class + [2] * per_class
    assert len(set(sample)) == len(sample) and set(sample) <= set(pool)
    assert sample == balanced_sample(pool[::-1], per_class, seed, by_patient)
    if by_patient:  # at least as many patients per class as slices are drawn
        assert len({parse_name(e.name).patient for e in sample}) == 3 * per_class


def test_sample_by_patient_covers_small_patients():
    pool = entries([200, 1, 1, 1])
    for seed in range(5):
        sample = balanced_sample(pool, 6, seed, by_patient=True)
        assert len({parse_name(e.name).patient for e in sample}) == 12
    plain = balanced_sample(pool, 6, 0)
    assert len({parse_name(e.name).patient for e in plain}) < 12
    assert plain != balanced_sample(pool, 6, 1)


def test_sample_of_too_few():
    with pytest.raises(DataError, match="4 slices of class Control, 5 are asked for"):
        balanced_sample(entries([4]), 5, 0)


# --- the public lists -----------------------------------------------------------------------------

needs_lists = pytest.mark.skipif(
    not os.environ.get("COVIDMASK_SPLITS"),
    reason="COVIDMASK_SPLITS (folder of the public split lists) is not set",
)


@pytest.fixture(scope="module")
def covidx():
    folder = Path(os.environ["COVIDMASK_SPLITS"])
    return {s: read_split(folder / f"{s}_COVIDx_CT-1.txt") for s in ("train", "val", "test")}


@needs_lists
def test_covidx_ct_1_counts_and_patients(covidx):
    counts = {s: np.bincount([e.label for e in covidx[s]]).tolist() for s in covidx}
    assert counts == {
        "train": [27201, 22061, 12520],
        "val": [9107, 7400, 4529],
        "test": [9450, 7395, 4346],
    }
    patients = {s: {parse_name(e.name).patient for e in covidx[s]} for s in covidx}
    assert {s: len(p) for s, p in patients.items()} == {"train": 864, "val": 332, "test": 293}
    assert len(set.union(*patients.values())) == 864 + 332 + 293  # nobody is in two splits


@needs_lists
def test_the_author_s_3000_slices_are_training_slices(covidx):
    sample = read_split(Path(os.environ["COVIDMASK_SPLITS"]) / "train_split_classification.txt")
    assert np.bincount([e.label for e in sample]).tolist() == [1000, 1000, 1000]
    assert len({parse_name(e.name).patient for e in sample}) == 608
    assert {parse_name(e.name) for e in sample} <= {parse_name(e.name) for e in covidx["train"]}


@needs_lists
def test_our_sampler_draws_as_many(covidx):
    sample = balanced_sample(covidx["train"], 1000, seed=0)
    assert len({e.name for e in sample}) == 3000
    by_patient = balanced_sample(covidx["train"], 1000, seed=0, by_patient=True)
    assert len({parse_name(e.name).patient for e in by_patient}) == 864


@needs_lists
def test_the_released_lesion_lists():
    folder = Path(os.environ["COVIDMASK_SPLITS"])
    names = {
        s: [words[0] for _, words in read_lines(folder / f"{s}_split_segmentation.txt")]
        for s in ("train", "test")
    }
    patients = {s: {name.rpartition("_")[0] for name in names[s]} for s in names}
    assert {s: (len(names[s]), len(patients[s])) for s in names} == {
        "train": (650, 130),
        "test": (100, 20),
    }
    assert not patients["train"] & patients["test"]


def test_a_number_with_thousands_of_digits(tmp_path):
    (tmp_path / "list.txt").write_text(f"NCP_1_1_1.png 2 0 0 {'9' * 5000} 5")
    with pytest.raises(DataError, match="line 1: .*expected `name"):
        read_split(tmp_path / "list.txt")
