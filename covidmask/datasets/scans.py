"""Pictures, DICOM and NIfTI, single or whole scans, as grey slices in 0..1."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from covidmask.datasets import medical
from covidmask.datasets.medical import Slice
from covidmask.errors import DataError
from covidmask.files import LOCKED, check_finite, check_size, decoding, readable

LUNG_WINDOW = (-600.0, 1500.0)  # level, width in HU
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")  # what the public data sets hold, in order of preference
PICTURES = (*IMAGE_SUFFIXES, ".tif", ".tiff")
# No others that Pillow knows: for a stranger's EPS, for one, it would start Ghostscript
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "JPEG2000")
FEW_LEVELS = 4096  # of 65536: 12 bits, or Hounsfield units, which would all look alike
LOOKED_AT = 32  # slices of a volume, where nobody chooses
RESULT = "_lesions.png"  # how the pictures of `covidmask predict` end: no input, where a folder is


def read_image(path: str | Path, window: tuple[float, float] = LUNG_WINDOW) -> np.ndarray:
    """Read one CT slice as grey values, float32 [H, W] in 0..1.

    Pictures (PNG, JPEG, TIFF) of 8 or 16 bits are divided by 255 or 65535; float pictures lie in
    0..1 already. They are turned as their orientation tag says; colour becomes grey (luminance),
    and an alpha channel is dropped. DICOM (.dcm, .dicom, or the letters DICM at byte 128) and NIfTI
    (.nii, .nii.gz; the middle axial slice) hold HU, which the window (level, width) maps to 0..1.

    Raises `DataError`: the file is missing, locked, damaged, no image, smaller than 8x8 or larger
    than 67 megapixels; it holds NaN, infinite or other values than above, or 16 bits that all lie
    within 4096 levels.
    """
    return next(read_slices([Slice(Path(path))], window))


def read_slices(
    slices: Iterable[Slice], window: tuple[float, float] = LUNG_WINDOW
) -> Iterator[np.ndarray]:
    """Read slices one by one, as `read_image` does: float32 [H, W] in 0..1.

    Slices of a volume are turned so that anterior is up and the patient's right on the left. A
    NIfTI file is opened once for its slices where they follow one another.
    """
    nifti = None
    for each in slices:
        kind = _kind(each.path)
        if kind == "NIfTI":
            if nifti is None or nifti.path != each.path:
                nifti = medical.NiftiVolume(each.path)
            image = nifti.read(each.index, window)
        elif kind == "DICOM":
            image = medical.read_dicom(each.path, window)
        else:  # whatever it is called
            image = _to_unit(_open(each.path), each.path)
        swap, rows, columns = each.turn
        yield np.ascontiguousarray((image.T if swap else image)[::rows, ::columns])


def read_mask(path: str | Path) -> np.ndarray:
    """Read one mask as its stored codes, uint8 [H, W], turned as images are.

    The codes of a palette picture (mode P) are its indices. `convert("L")` would replace them by
    the brightness of their colours, e.g. 0, 1, 2 by 0, 38, 75, so it is never called here.

    Raises `DataError` as `read_image`, and for colour pictures, which hold no codes.
    """
    picture = _open(readable(path))
    mask = np.asarray(picture)
    coded = picture.mode in ("P", "L", "1") or picture.mode.startswith("I")
    if not coded or mask.max() > 255 or mask.min() < 0:
        problem = f"is of mode {picture.mode}, colours, or holds codes outside 0..255"
        raise DataError(f"{path}: the mask {problem}; save it as a palette or 8-bit grey PNG")
    return mask.astype(np.uint8)


def _open(path: Path) -> Image.Image:
    # decoded and turned completely; Pillow alone would leave the pixels for later
    problem = "this is no image, or a damaged or truncated one"
    with decoding(path, problem, "expected PNG, JPEG, TIFF, DICOM or NIfTI"):
        with Image.open(path, formats=FORMATS) as picture:
            check_size(*picture.size, path)  # before any pixel is decoded
            picture.verify()  # PNG: the checksums, and that the end of the file is there
        # again, because `verify` uses the file up; open, because by its name Pillow would map a
        # plain TIFF into memory with the sides that it has after turning
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as picture:
            if (pages := getattr(picture, "n_frames", 1)) > 1:
                raise DataError(f"{path}: the file holds {pages} pictures; save one slice alone")
            picture.load()  # turns a TIFF as its tag says
            if picture.format != "TIFF":
                ImageOps.exif_transpose(picture, in_place=True)
            return picture


def _to_unit(picture: Image.Image, path: Path) -> np.ndarray:
    deep = picture.mode.startswith("I")  # I;16 and its kin, or I: 16 bits held in 32
    if not deep and picture.mode != "F":
        if picture.mode not in ("1", "L", "LA"):
            picture = picture.convert("RGB")  # resolves palettes, drops alpha
        return np.asarray(picture.convert("L"), dtype=np.float32) / 255
    values = np.array(picture, dtype=np.float32)
    low, high = float(values.min()), float(values.max())
    check_finite(low, high, path)
    if low < 0 or high > (65535 if deep else 1) or (deep and 0 < high - low <= FEW_LEVELS):
        raise DataError(
            f"{path}: the values run from {low:g} to {high:g}, not over 0..1 (float), or more than "
            f"{FEW_LEVELS} levels of 0..65535 (integers; are they 12 bits, or Hounsfield units?); "
            "rescale the image, or pass Hounsfield units as DICOM or NIfTI"
        )
    values = values / 65535 if deep else values
    # a TIFF in which 0 is white: Pillow inverts 8 bits, but not 16
    white = picture.mode.startswith("I;16") and getattr(picture, "tag_v2", {}).get(262) == 0
    return 1 - values if white else values


@dataclass(frozen=True)
class Scan:
    """A volume, with slice 1 nearest the feet where positions are known, or all pictures."""

    name: str  # what outputs call it: "pictures", "volume 1", ...
    source: str  # what the reader named, for the screen only
    slices: tuple[Slice, ...]  # in order
    volume: bool  # the slices belong together


def find_scans(
    paths: Sequence[str | Path], series: int | None = None
) -> tuple[list[Scan], list[str]]:
    """Look through files and folders, without decoding a pixel.

    Files that are named one by one may hold several DICOM series, and each becomes a volume. A
    folder, searched with the folders in it, may hold one, or `series` (from 1) says which. See
    `medical.axial_series` for what a series is, and `medical.ordered` for the order.

    Returns the scans, pictures first, and sentences about what was left out, copies and gaps.
    Raises `DataError` where there is nothing to look at, no such series, no order or a bad file.
    """
    pictures, volumes, notes = [], [], []  # volumes: source, slices
    paths = list(dict.fromkeys(map(Path, paths)))  # what is named twice counts once
    folders = [path for path in paths if os.path.isdir(path)]
    named = [path for path in paths if path not in folders]
    groups = [(None, named)] * bool(named) + [(folder, _files(folder)) for folder in folders]
    for folder, files in groups:
        source, before = str(folder or "the files named"), len(pictures) + len(volumes)
        left_out, dicom = Counter(), []
        for path in files:
            kind = _kind(path)
            if kind == "NIfTI":
                volumes.append((str(path), medical.NiftiVolume(path).slices(notes)))
            elif kind == "DICOM":
                dicom.append(path)
            elif kind == "picture" or folder is None:  # reading says what is wrong with it
                pictures.append(Slice(path))
            else:
                left_out[kind] += 1
        parts = medical.axial_series(dicom, folder is not None, left_out) if dicom else []
        if parts and (series is not None or (folder and len(parts) > 1)):
            if series not in range(1, len(parts) + 1):
                listed = ", ".join(f"{n}: {len(part)} slices" for n, part in enumerate(parts, 1))
                what = f"holds {len(parts)} axial CT series ({listed})"
                raise DataError(f"{source}: {what}; choose one of these with --series")
            parts = [parts[series - 1]]
        volumes += [(source, medical.ordered(part, source, notes)) for part in parts]
        reasons = ", ".join(f"{reason} ({count})" for reason, count in left_out.items())
        if len(pictures) + len(volumes) == before:
            what = f"holds no axial CT slice{reasons and '; left out: '}{reasons}"
            raise DataError(f"{folder or files[0]}: {what}; name DICOM, NIfTI or picture files")
        if reasons:
            notes.append(f"{source}: files left out: {reasons}.")
    scans = [Scan(f"volume {n}", *volume, True) for n, volume in enumerate(volumes, 1)]
    if pictures:
        scans.insert(0, Scan("pictures", "PNG, JPEG and TIFF files", tuple(pictures), False))
    return scans, notes


def _files(folder: Path) -> list[Path]:
    # every file in it and below, but hidden ones (macOS writes ._IM0001)
    def stop(error: OSError) -> None:
        with decoding(error.filename, *LOCKED):
            raise error

    files: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _kind(path: Path) -> str:
    # NIfTI, DICOM, picture, or in a few words why a file of a folder is none of them
    name = readable(path).name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return "NIfTI"
    with open(path, "rb") as file:
        file.seek(128)
        if name.endswith((".dcm", ".dicom")) or file.read(4) == b"DICM":
            return "DICOM"
    if not name.endswith(PICTURES):
        return "no image"
    return f"named ...{RESULT} as results are" if path.name.endswith(RESULT) else "picture"


def choose_slices(
    count: int, slices: str | None = None, every: int | None = None, name: str = "the volume"
) -> list[int]:
    """Which slices of a volume to look at: rising positions, from 0.

    By default 32 (LOOKED_AT), in the middles of as many equal parts of the volume, or all if fewer.

    Args:
        count, name: how many slices the volume has, and what messages call it.
        slices: "all", or numbers and ranges from 1, such as "20-80" or "3,17,40-45".
        every: take the first, and then each `every`-th, of these or of all.

    Raises `DataError` where the volume has no such slices, or `every` is below 1.
    """
    if every is not None and every < 1:
        raise DataError(f"every {every}: must be a whole number from 1")
    if slices is None and every is None:
        parts = min(LOOKED_AT, count)
        return [int((part + 0.5) * count / parts) for part in range(parts)]
    chosen = set(range(count)) if slices in (None, "all") else set()
    for part in [] if chosen else slices.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last <= count:
            raise DataError(
                f"slices {slices!r:.60}: {name} has no slices {part.strip()!r:.20}; write all, or "
                f"numbers and ranges from 1 to {count}, such as 20-80 or 3,17,40-45"
            )
        chosen.update(range(first - 1, last))
    return sorted(chosen)[::every]
