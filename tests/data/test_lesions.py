import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from covidmask.datasets.lesions import (
    LesionDataset,
    LesionSlices,
    lesion_statistics,
    mask_to_targets,
    open_lesions,
    split_by_patient,
)
from covidmask.errors import DataError

MASKS = arrays(
    np.uint8, st.tuples(st.integers(8, 20), st.integers(8, 20)), elements=st.integers(0, 3)
)
few = settings(max_examples=30, deadline=None)


# --- masks to instances -------------------------------------------------------------------------


@few
@given(mask=MASKS)
def test_instances_rebuild_the_mask(mask):
    target = mask_to_targets(mask)
    rebuilt = np.zeros_like(mask)
    for label, instance in zip(target["labels"], target["masks"].numpy(), strict=True):
        assert not rebuilt[instance == 1].any()  # instances do not overlap
        rebuilt[instance == 1] = label + 1
    np.testing.assert_array_equal(rebuilt, np.where(mask >= 2, mask, 0))


@few
@given(mask=MASKS, lesions=st.sampled_from(["both", "ggo", "merged"]), min_area=st.integers(1, 6))
def test_boxes_are_tight_and_areas_right(mask, lesions, min_area):
    target = mask_to_targets(mask, lesions, min_area)
    k = len(target["labels"])
    expected = {
        "boxes": ((k, 4), torch.float32),
        "labels": ((k,), torch.int64),
        "masks": ((k, *mask.shape), torch.uint8),
        "area": ((k,), torch.float32),
        "iscrowd": ((k,), torch.int64),
    }
    assert {key: (tuple(v.shape), v.dtype) for key, v in target.items()} == expected
    order = []
    for box, label, instance, area in zip(
        *(target[key].numpy() for key in ("boxes", "labels", "masks", "area")), strict=True
    ):
        rows, columns = np.nonzero(instance)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert area == instance.sum() >= min_area
        order.append((label, np.flatnonzero(instance)[0]))
    assert order == sorted(order)


@few
@given(mask=MASKS)
def test_merged_joins_the_classes_before_components_are_sought(mask):
    as_one_class = np.where(mask == 3, 2, mask).astype(np.uint8)
    merged, reference = mask_to_targets(mask, "merged"), mask_to_targets(as_one_class, "ggo")
    assert all(torch.equal(merged[key], reference[key]) for key in reference)


def test_order_is_by_label_then_by_first_pixel_row_by_row():
    mask = np.ones((5, 9), dtype=np.uint8)
    mask[0, 8] = mask[1, 4:6] = mask[4, 0:3] = 2  # the higher it begins, the further to the right
    mask[0, 2] = mask[0, 0] = mask[3, 8] = 3
    target = mask_to_targets(mask)
    assert target["labels"].tolist() == [1, 1, 1, 2, 2, 2]
    assert target["boxes"].tolist() == [
        [8, 0, 9, 1], [4, 1, 6, 2], [0, 4, 3, 5], [0, 0, 1, 1], [2, 0, 3, 1], [8, 3, 9, 4]
    ]  # fmt: skip
    assert target["area"].tolist() == [1, 2, 3, 1, 1, 1]
    assert target["masks"].shape == (6, 5, 9)
    assert target["masks"][2, 4].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_a_consolidation_inside_ggo():
    mask = np.zeros((12, 12), dtype=np.uint8)
    mask[2:10, 2:10] = 2
    mask[4:6, 4:6] = 3
    both = mask_to_targets(mask)
    assert both["labels"].tolist() == [1, 2]
    assert both["boxes"].tolist() == [[2, 2, 10, 10], [4, 4, 6, 6]]
    assert both["area"].tolist() == [60, 4]
    assert mask_to_targets(mask, "ggo")["area"].tolist() == [60]
    assert mask_to_targets(mask, "merged")["area"].tolist() == [64]


def test_pixels_that_touch_at_a_corner_are_one_lesion():
    mask = np.zeros((9, 9), dtype=np.uint8)
    mask[2, 3] = mask[3, 2] = mask[4, 3] = 2
    assert mask_to_targets(mask)["boxes"].tolist() == [[2, 2, 4, 5]]


def test_min_area_is_the_smallest_that_stays():
    mask = np.zeros((30, 30), dtype=np.uint8)
    mask[:10, :10] = 2
    assert len(mask_to_targets(mask, min_area=100)["labels"]) == 1
    assert len(mask_to_targets(mask, min_area=101)["labels"]) == 0


def test_a_healthy_slice_has_no_instances():
    target = mask_to_targets(np.ones((9, 11), dtype=np.uint8))
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 9, 11)


@pytest.mark.parametrize("lesions", ["", "nodule", "merge", "nodule, ,cyst", "cyst,cyst"])
def test_names_of_classes_that_are_none(lesions):
    with pytest.raises(ValueError, match="one of both, ggo, merged, or give your own"):
        mask_to_targets(np.zeros((9, 9), np.uint8), lesions)
    with pytest.raises(ValueError, match="your own names with commas"):
        LesionDataset(lesions)


def test_classes_of_your_own():
    mask = np.ones((9, 9), dtype=np.uint8)
    mask[0, 0:2], mask[3, 3:6], mask[6, 6] = 4, 3, 2
    target = mask_to_targets(mask, "nodule, cyst,scar")
    assert target["labels"].tolist() == [1, 2, 3] and target["area"].tolist() == [1, 3, 2]
    assert mask_to_targets(np.minimum(mask, 2), "nodule,")["labels"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "lesions, code, largest", [("nodule,", 3, 2), ("a,b", 4, 3), ("ggo", 4, 3)]
)
def test_a_code_that_no_class_is_named_for(lesions, code, largest):
    mask = np.zeros((9, 9), dtype=np.uint8)
    mask[4, 4] = code
    with pytest.raises(DataError, match=rf"values \[0, {code}\], expected codes 0..{largest}"):
        mask_to_targets(mask, lesions)


class Cysts(LesionDataset):
    """What a reader writes for a data set of their own."""

    def __init__(self, count):
        super().__init__("nodule,cyst")
        self.names = self.patients = [f"{i}.png" for i in range(count)]

    def read(self, index):
        mask = np.zeros((9, 12), dtype=np.uint8)
        mask[2:4, 3:6], mask[7, index] = 2, index + 2
        return np.full(mask.shape, 0.5, dtype=np.float32), mask


def test_a_data_set_of_your_own():
    image, target = Cysts(2)[1]
    assert image.shape == (3, 9, 12) and target["labels"].tolist() == [1, 2]
    found = lesion_statistics(Cysts(2))
    assert found.classes == ("nodule", "cyst") and found.counts.tolist() == [[2, 0], [1, 1]]
    with pytest.raises(DataError, match="2.png: the mask holds the values.*expected codes 0..3"):
        Cysts(3)[2]


# --- parity with the released code ---------------------------------------------------------------

# His reader names classes by their position among the values that occur in the mask, the lowest
# being taken for background and the next for lung. Ours reads the codes. So we differ on purpose:
DIFFERENT = {
    # no GGO in the slice: consolidation is the first lesion he meets and gets label 1, GGO
    ("c_only", "both"): ([2], [1]),
    # no lung pixels: the first lesion class is taken for lung and lost, the next is called GGO
    ("no_lung_pixels_both", "both"): ([1, 2], [1]),
    ("no_lung_pixels_both", "ggo"): ([1], []),
    ("no_lung_pixels_both", "merge"): ([1, 1], []),
    ("no_lung_pixels_ggo_only", "both"): ([1], []),
    ("no_lung_pixels_ggo_only", "ggo"): ([1], []),
    ("no_lung_pixels_ggo_only", "merge"): ([1], []),
}
CASES = [
    "c_only",
    "diagonal_and_100px",
    "ggo_and_c",
    "ggo_only",
    "healthy",
    "no_lung_pixels_both",
    "no_lung_pixels_ggo_only",
]


@pytest.mark.skipif(
    not os.environ.get("COVIDMASK_GOLDEN"),
    reason="COVIDMASK_GOLDEN (reference numbers from the released code) is not set",
)
@pytest.mark.parametrize("small, min_area", [("all", 1), ("ignore_small", 101)])
@pytest.mark.parametrize("his, ours", [("both", "both"), ("ggo", "ggo"), ("merge", "merged")])
@pytest.mark.parametrize("case", CASES)
def test_targets_equal_those_of_the_released_code(case, his, ours, small, min_area):
    """Case diagonal_and_100px: squares that touch at corners are one region of 310 px for him, too.

    The files do not show what he does at exactly 100 px; the code drops `area <= 100`.
    """
    with np.load(Path(os.environ["COVIDMASK_GOLDEN"]) / "out" / "unit_targets.npz") as golden:
        prefix = f"{case}/{his}/{small}/"
        mask = golden[f"{case}/mask"]
        boxes = golden[prefix + "boxes"].reshape(-1, 4).tolist()
        labels, areas = golden[prefix + "labels"].tolist(), golden[prefix + "mask_areas"].tolist()
    target = mask_to_targets(mask, ours, min_area)
    if (case, his) in DIFFERENT:
        assert (sorted(target["labels"].tolist()), sorted(labels)) == DIFFERENT[case, his]
        return
    mine = [target[key].tolist() for key in ("labels", "boxes", "area")]
    theirs = [labels, boxes, areas]
    assert sorted(zip(*mine, strict=True)) == sorted(zip(*theirs, strict=True))


# --- the folder -----------------------------------------------------------------------------------


def write_slice(root, patient, number, suffix=".png", mask=None, size=(12, 16)):
    image = Image.fromarray(np.full(size, 51, dtype=np.uint8))
    mask = np.zeros(size, dtype=np.uint8) if mask is None else mask
    for folder, picture, ending in (
        ("image", image, suffix),
        ("mask", Image.fromarray(mask), ".png"),
    ):
        (root / folder / patient).mkdir(parents=True, exist_ok=True)
        picture.save(root / folder / patient / f"{number}{ending}")


@pytest.fixture
def folder(tmp_path):
    lesion = np.ones((12, 16), dtype=np.uint8)
    lesion[3:6, 4:9] = 2
    write_slice(tmp_path, "10", "2")
    write_slice(tmp_path, "2", "10", mask=lesion)
    write_slice(tmp_path, "2", "9", suffix=".jpg")
    write_slice(tmp_path, "a_b", "1")
    (tmp_path / "train.txt").write_text("2_10.jpg\n\n10_2.png\n")
    return tmp_path


def test_items(folder):
    dataset = LesionSlices(folder)
    assert dataset.names == ["2_9.jpg", "2_10.png", "10_2.png", "a_b_1.png"]
    assert dataset.patients == ["2", "2", "10", "a_b"]
    assert (dataset.lesions, dataset.min_area) == ("both", 1)
    image, target = dataset[1]
    assert (image.shape, image.dtype) == ((3, 12, 16), torch.float32)
    assert torch.allclose(image, torch.tensor(0.2))
    assert target["boxes"].tolist() == [[4, 3, 9, 6]]
    assert target["image_id"].tolist() == [1]
    assert dataset[-1][1]["image_id"].tolist() == [3]
    assert dataset.patients_known
    assert len(LesionSlices(folder, min_area=16)[1][1]["labels"]) == 0
    assert len([*torch.utils.data.DataLoader(dataset, collate_fn=list)]) == 4


def test_a_list_names_files_whatever_their_suffix(folder):
    dataset = LesionSlices(folder, "train")
    assert dataset.names == ["2_10.png", "10_2.png"]
    own = folder / "mine.txt"
    own.write_text("a_b_1.png")
    assert LesionSlices(folder, own).patients == ["a_b"]


def test_hidden_files_are_no_slices_and_capitals_are(folder):
    image = Image.fromarray(np.zeros((12, 16), np.uint8))
    image.save(folder / "image" / "10" / ".3.png")
    image.save(folder / "image" / "10" / "4.PNG")
    image.save(folder / "mask" / "10" / "4.png")
    (folder / "image" / "10" / "notes.txt").write_text("none")
    assert LesionSlices(folder).names[2:4] == ["10_2.png", "10_4.PNG"]
    assert len(LesionSlices(folder)) == 5


def test_a_folder_with_classes_of_your_own(folder):
    mask = np.arange(192, dtype=np.uint8).reshape(12, 16) // 32  # 0..5
    write_slice(folder, "10", "2", mask=mask)
    _, target = LesionSlices(folder, "train", "nodule,cyst,scar,vessel")[1]
    assert target["labels"].tolist() == [1, 2, 3, 4]
    with pytest.raises(DataError, match=r"2.png: the mask holds .* expected codes 0..4"):
        LesionSlices(folder, "train", "nodule,cyst,scar").read(1)


def test_every_code_up_to_consolidation_is_read(folder):
    mask = np.arange(192, dtype=np.uint8).reshape(12, 16) // 48  # 0..3, three rows each
    write_slice(folder, "10", "2", mask=mask)
    _, target = LesionSlices(folder, "train")[1]
    assert target["labels"].tolist() == [1, 2]
    assert target["boxes"].tolist() == [[0, 6, 16, 9], [0, 9, 16, 12]]


def test_a_slice_with_two_suffixes(folder):
    write_slice(folder, "2", "10", suffix=".jpg")
    with pytest.raises(DataError, match=r"image: slices that .* 1 \(2_10\), or .*two names"):
        LesionSlices(folder)
    assert LesionSlices(folder, "train").names == ["2_10.jpg", "10_2.png"]


@pytest.mark.parametrize(
    "content, problem",
    [
        (None, "cannot be opened"),
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("2_10.png\nnonsense\n", r"not on disk.* 1 \(nonsense\)"),
        ("2_10.png\n2_9.png 1\n", "not on disk.*2_9.png 1"),
        ("../2_10.png\n", "not on disk.*../2_10.png"),
        ("_10.png\n2_10.txt\n", r"not on disk.*: 2 "),
        ("2_10.png\n\n2_10.png\n", "line 3"),
        ("2_10.png\n7_7.png\n7_8.png\n", r"7_7.png, 7_8.png"),
        (b"\xff\xfe\x00", "no text"),
    ],
)
def test_bad_lists(folder, content, problem):
    path = folder / "val.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=problem) as caught:
        LesionSlices(folder, "val")
    assert "val.txt" in str(caught.value)


def test_bad_folders(folder):
    with pytest.raises(DataError, match="absent.image: there is no such data folder"):
        LesionSlices(folder / "absent")
    (folder / "mask" / "2" / "9.png").unlink()
    with pytest.raises(DataError, match=r"without a mask: 1 .*mask.2.9.png\); add"):
        LesionSlices(folder)
    LesionSlices(folder, "train")  # does not use that slice
    empty = folder / "empty"
    for name in ("image", "mask"):
        (empty / name).mkdir(parents=True)
    with pytest.raises(DataError, match="image: no slices found"):
        LesionSlices(empty)


@pytest.mark.parametrize(
    "mask, problem",
    [
        (np.full((12, 16), 4, np.uint8), r"values \[4\], expected codes 0..3"),
        (
            np.arange(192, dtype=np.uint8).reshape(12, 16),
            r"values \[0, 1, 2, 3, 4, 5, 6, 7\], expected codes",
        ),
        (np.zeros((16, 12), np.uint8), "12 x 16 pixels, its image 16 x 12"),
    ],
)
def test_bad_masks_are_found_on_reading(folder, mask, problem):
    write_slice(folder, "10", "2", mask=mask)
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(folder / "image" / "10" / "2.png")
    dataset = LesionSlices(folder, "train")
    with pytest.raises(DataError, match=problem) as caught:
        dataset[1]
    assert os.path.join("mask", "10", "2.png") in str(caught.value)


# --- splits by patient ----------------------------------------------------------------------------


@few
@given(
    patients=st.lists(st.sampled_from("abcdefghij"), max_size=40),
    weights=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    seed=st.integers(0, 1000),
)
def test_no_patient_crosses_and_no_item_is_lost(patients, weights, seed):
    fractions = [weight / sum(weights) for weight in weights]
    parts = split_by_patient(patients, fractions, seed)
    assert len(parts) == len(fractions)
    assert sorted(index for part in parts for index in part) == list(range(len(patients)))
    owners = [{patients[index] for index in part} for part in parts]
    assert sum(map(len, owners)) == len(set(patients))
    assert parts == split_by_patient(patients, fractions, seed)


def test_the_shares_are_of_patients_and_depend_on_the_seed():
    patients = [str(i // 3) for i in range(300)]
    parts = split_by_patient(patients, (0.7, 0.1, 0.2), seed=0)
    assert [len(part) for part in parts] == [210, 30, 60]
    assert parts != split_by_patient(patients, (0.7, 0.1, 0.2), seed=1)


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.5, -0.5)])
def test_bad_fractions(fractions):
    with pytest.raises(ValueError, match="sum to 1"):
        split_by_patient(["a"], fractions, seed=0)


def test_every_lesion_counts_unless_the_reader_says_otherwise(tmp_path):
    point = np.ones((12, 16), dtype=np.uint8)
    point[5, 7] = 2
    write_slice(tmp_path, "1", "1", mask=point)
    found = [len(open_lesions(tmp_path, "all", **o)[0][1]["boxes"]) for o in ({}, {"min_area": 2})]
    assert found == [1, 0]
