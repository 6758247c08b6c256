from dataclasses import replace

import numpy as np
import pytest
import torch

from covidmask.config import AugmentConfig
from covidmask.datasets.augmentation import Augmented, crop_to_lungs, paste, shade, warp
from covidmask.datasets.lesions import LesionDataset
from covidmask.datasets.patients import make_slice

CONFIG = AugmentConfig(size=48, copies=3, min_area=4)


class Phantoms(LesionDataset):
    """Two phantoms of 64 pixels; counts how often they are read."""

    def __init__(self):
        super().__init__()
        self.names, self.patients, self.reads = ["a.png", "b.png"], ["a", "b"], 0

    def read(self, index):
        self.reads += 1
        return make_slice(index, 2, 64)


def same(first, second):
    return torch.equal(first[0], second[0]) and all(
        torch.equal(first[1][key], second[1][key]) for key in first[1]
    )


def test_copies_differ_and_are_the_same_every_time():
    one, two = Augmented(Phantoms(), CONFIG, seed=1), Augmented(Phantoms(), CONFIG, seed=1)
    assert len(one) == 6 and one.names == ["a.png", "b.png"] * 3
    assert same(one[4], two[4]) and same(one[11], two[11])
    assert not same(one[0], one[2]) and not same(one[0], one[6])  # both are copies of a.png
    assert not same(one[0], Augmented(Phantoms(), CONFIG, seed=2)[0])
    assert one.dataset.reads == 2  # kept, not read again


def test_items_are_those_of_a_lesion_data_set():
    for index in range(12):
        image, target = Augmented(Phantoms(), CONFIG)[index]
        assert image.shape == (3, 48, 48) and image.dtype == torch.float32
        assert image.min() >= 0 and image.max() <= 1
        assert target["image_id"].item() == index % 6
        for box, mask, area in zip(target["boxes"], target["masks"], target["area"], strict=True):
            rows, columns = torch.where(mask)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == [float(edge) for edge in edges]
            assert area == mask.sum() >= CONFIG.min_area


def test_mask_moves_with_the_image():
    image = np.zeros((60, 90), dtype=np.float32)
    image[20:40, 30:60] = 1
    mask = (image * 2).astype(np.uint8)
    places = set()
    for seed in range(20):
        moved, moved_mask = warp(image, mask, 64, np.random.default_rng(seed))
        assert moved.shape == moved_mask.shape == (64, 64)
        assert ((moved > 0.5) != (moved_mask == 2)).mean() < 0.02  # but for the interpolated edge
        assert set(np.unique(moved_mask)) <= {0, 2}
        places.add(tuple(np.argwhere(moved_mask)[0]))
    assert len(places) > 10


def test_pasted_lesions_are_those_of_the_other_slice():
    image, other = np.full((20, 30), 0.2, np.float32), np.full((20, 30), 0.8, np.float32)
    mask, other_mask = np.ones((20, 30), np.uint8), np.ones((20, 30), np.uint8)
    mask[2:12, 3:13] = 2
    other_mask[6:16, 8:20] = 3
    pasted, pasted_mask = paste(image, mask, other, other_mask)
    assert pasted.shape == (20, 30) and pasted.dtype == np.float32
    assert pasted_mask.dtype == np.uint8 and (pasted_mask == 3).sum() == 120
    assert (pasted_mask == 2).sum() == 100 - 6 * 5  # covered in part
    lesion = pasted_mask == 3
    assert pasted[lesion].min() > 0.6 and np.allclose(pasted[8:14, 11:17], 0.8, atol=1e-3)
    assert np.allclose(pasted[:, 25:], 0.2, atol=1e-4)
    nothing = np.zeros_like(mask)
    same_image, same_mask = paste(image, mask, other, nothing)
    assert np.array_equal(same_image, image) and np.array_equal(same_mask, mask)


def test_a_share_of_the_copies_has_more_lesions():
    never, always = (
        Augmented(Phantoms(), replace(CONFIG, copies=20, paste=share)) for share in (0, 1)
    )
    areas = [sum(int(target["masks"].sum()) for _, target in data) for data in (never, always)]
    assert areas[1] > 1.2 * areas[0]


def test_crop_keeps_the_lungs_and_their_lesions():
    image, mask = make_slice(0, 2, 128)
    cut_image, cut_mask = crop_to_lungs(image, mask, np.random.default_rng(0))
    assert cut_image.shape == cut_mask.shape and cut_mask.size < 0.8 * mask.size
    for code in (1, 2, 3):
        assert (cut_mask == code).sum() == (mask == code).sum()
    no_lung = np.where(mask == 1, 0, mask)
    assert crop_to_lungs(image, no_lung, np.random.default_rng(0))[1] is no_lung


@pytest.mark.parametrize("seed", range(5))
def test_shades_stay_in_range(seed):
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    shaded = shade(image, np.random.default_rng(seed))
    assert shaded.dtype == np.float32 and shaded.min() >= 0 and shaded.max() <= 1
    assert not np.array_equal(shaded, image)
