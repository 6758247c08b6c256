"""Random copies of slices with masks: turned, stretched, mirrored, brighter or darker.

For small sets, such as the 50 slices of COVID-SemiSeg. Every copy depends on the seed and its
number alone, in whichever process it is made, so that a run that was killed goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from covidmask.config import AugmentConfig
from covidmask.datasets.lesions import LesionDataset, SliceAndMask


class Augmented(LesionDataset):
    """Random copies of each slice of `dataset`, all of one size, with their targets.

    A copy is the slice cropped to the lungs, where the mask marks them, squeezed to a square,
    turned by at most 20 degrees, scaled by 0.75 to 1.3, stretched by at most 16 % along one side,
    moved by at most 12 %, mirrored every other time, and in half of the cases gently bent; gamma
    (0.7 to 1.4), contrast, brightness and, in three cases of ten, noise change its grey values. A
    share, `config.paste`, also gets the lesions of another slice (Copy-Paste, Ghiasi et al. 2021).
    Instances are sought anew in the mask. Slices are read once and kept, 5 bytes a pixel.
    """

    endless = True  # any index of 0 or more is an item, so training takes new ones in every epoch

    def __init__(self, dataset: LesionDataset, config: AugmentConfig, seed: int = 0) -> None:
        super().__init__(dataset.lesions, config.min_area)
        self.dataset, self.config, self.seed = dataset, config, seed
        self.names = dataset.names * config.copies
        self.patients = dataset.patients * config.copies
        self._slices: dict[int, SliceAndMask] = {}

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return (self[index] for index in range(len(self)))  # of one epoch; Python's would not end

    def read(self, index: int) -> SliceAndMask:
        """A copy of slice `index % len(dataset)`: float32 [size, size] in 0..1; mask, uint8."""
        rng = np.random.default_rng((self.seed, index))
        image, mask = self._moved(index % len(self.dataset), rng)
        if rng.random() < self.config.paste:
            other = int(rng.integers(len(self.dataset)))
            image, mask = paste(image, mask, *self._moved(other, rng))
        return shade(image, rng), mask

    def _moved(self, which: int, rng: np.random.Generator) -> SliceAndMask:
        if which not in self._slices:
            self._slices[which] = self.dataset.read(which)
        return warp(*crop_to_lungs(*self._slices[which], rng), self.config.size, rng)


def crop_to_lungs(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> SliceAndMask:
    """Cut off what lies around the lungs; both [H, W] as they are where the mask marks no lung."""
    if not (mask == 1).any():
        return image, mask
    top, bottom, left, right = rng.uniform(0, 0.06, 4) * max(mask.shape)
    rows, columns = ndimage.find_objects(np.uint8(mask > 0))[0]
    window = (
        slice(max(0, int(rows.start - top)), int(rows.stop + bottom)),
        slice(max(0, int(columns.start - left)), int(columns.stop + right)),
    )
    return image[window], mask[window]


def warp(
    image: np.ndarray, mask: np.ndarray, size: int, rng: np.random.Generator, strength: float = 1.0
) -> SliceAndMask:
    """Turn, scale, stretch, move, mirror and bend both alike, to [size, size]. Outside is black.

    `strength` multiplies how far it turns, scales and moves.
    """
    angle = strength * math.radians(rng.uniform(-20, 20))
    scale = math.exp(strength * rng.uniform(-0.29, 0.26))
    stretch = math.exp(rng.uniform(-0.15, 0.15))
    mirror = -1 if rng.random() < 0.5 else 1
    sine, cosine = math.sin(angle) / scale, math.cos(angle) / scale
    x, y = strength * rng.uniform(-0.12, 0.12, 2)
    matrix = [[cosine / stretch * mirror, -sine, x], [sine * mirror, cosine * stretch, y]]
    grid = F.affine_grid(torch.tensor([matrix], dtype=torch.float32), [1, 1, size, size], False)
    if rng.random() < 0.5:
        bend = torch.from_numpy(rng.normal(0, 0.03, (1, 2, 5, 5)).astype(np.float32))
        bend = F.interpolate(bend, size=(size, size), mode="bicubic", align_corners=False)
        grid = grid + bend.permute(0, 2, 3, 1)  # [1, size, size, 2]
    moved = [
        F.grid_sample(torch.from_numpy(np.float32(part))[None, None], grid, mode, "zeros", False)
        for part, mode in ((image, "bilinear"), (mask, "nearest"))
    ]
    return moved[0][0, 0].numpy(), moved[1][0, 0].numpy().astype(np.uint8)


def paste(
    image: np.ndarray, mask: np.ndarray, other: np.ndarray, other_mask: np.ndarray
) -> SliceAndMask:
    """Lay the lesions of another slice over this one, the edge blended over about two pixels."""
    lesion = other_mask > 1
    share = ndimage.gaussian_filter(np.float32(ndimage.binary_dilation(lesion)), 1)
    return image + share * (other - image), np.where(lesion, other_mask, mask)


def shade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other gamma, contrast and brightness, sometimes noise: float32 [H, W], still in 0..1."""
    image = np.clip(image, 0, 1) ** math.exp(rng.uniform(-0.35, 0.35))
    image = image * rng.uniform(0.8, 1.2) + rng.uniform(-0.08, 0.08)
    if rng.random() < 0.3:
        image = image + rng.normal(0, rng.uniform(0, 0.05), image.shape)
    return np.clip(image, 0, 1).astype(np.float32)
