"""Where the lungs are in a slice: no network, but thresholds and connected parts."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from covidmask.errors import DataError

AIR = -320.0  # HU: below it is air, lung or gas
TRACHEA = 0.0025  # of the slice: smaller dark parts are airways, gut or noise
CLOSE = 1 / 24  # of the slice's side: vessels and lesions narrower than it are lung, too


def find_lungs(hu: np.ndarray) -> np.ndarray:
    """Both lungs, with the vessels and most lesions in them.

    Of the dark parts inside the body the large ones are lung. A consolidation that is open to the
    chest wall and wider than `CLOSE` stays outside, and gas of the gut may be taken for lung.

    Args:
        hu: [H, W], Hounsfield units.

    Returns:
        bool [H, W]; nothing is set where a slice shows no lung.
    """
    if hu.ndim != 2:
        raise DataError(f"lungs are sought in one slice [H, W], not in {list(hu.shape)}")
    side = max(hu.shape)
    step = max(1, side // 256)  # a quarter of the pixels is enough for a coarse outline
    small = ndimage.median_filter(hu[::step, ::step], 3)
    dense, count = ndimage.label(small >= AIR)
    if not count:
        return np.zeros(hu.shape, bool)
    body = dense == 1 + np.bincount(dense.ravel())[1:].argmax()  # and not the table
    dark = ndimage.binary_opening((small < AIR) & ndimage.binary_fill_holes(body))
    parts, count = ndimage.label(dark)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    large = sizes >= TRACHEA * dark.size
    large[0] = False
    lungs = large[parts]
    if not lungs.any():
        return np.zeros(hu.shape, bool)
    radius = max(1, round(CLOSE * max(small.shape) / 2))
    disc = np.hypot(*np.ogrid[-radius : radius + 1, -radius : radius + 1]) <= radius
    margin = radius + 1
    closed, columns = np.zeros_like(lungs), np.flatnonzero(lungs.any(0))
    right = np.arange(lungs.shape[1]) > (columns[0] + columns[-1]) // 2
    # one lung at a time, or the mediastinum would be closed over
    for side in (lungs & right, lungs & ~right):
        wide = np.pad(side, margin)
        filled = ndimage.binary_fill_holes(ndimage.binary_closing(wide, disc))
        closed |= filled[margin:-margin, margin:-margin]
    return closed.repeat(step, 0).repeat(step, 1)[: hu.shape[0], : hu.shape[1]]


def crop_box(lungs: np.ndarray, margin: float = 0.03) -> tuple[slice, slice]:
    """Rows and columns that hold the lungs and a margin (of the longer side); all where none is."""
    if not lungs.any():
        return slice(0, lungs.shape[0]), slice(0, lungs.shape[1])
    extra, (there,) = round(margin * max(lungs.shape)), ndimage.find_objects(np.uint8(lungs))
    return tuple(
        slice(max(at.start - extra, 0), min(at.stop + extra, length))
        for at, length in zip(there, lungs.shape, strict=True)
    )
