"""Reading and writing single slices, with every defect of a file reported as a `DataError`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from covidmask.data import medical
from covidmask.data.lists import one_line, readable
from covidmask.data.medical import MAX_PIXELS, check_size
from covidmask.errors import DataError
from covidmask.files import atomic_path

LUNG_WINDOW = (-600.0, 1500.0)  # level, width in HU
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")  # what the public data sets hold, in order of preference
# No others that Pillow knows: for a stranger's EPS, for one, it would start Ghostscript
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "JPEG2000")
FEW_LEVELS = 4096  # of 65536: 12 bits, or Hounsfield units, which would all look alike


def read_image(path: str | Path, window: tuple[float, float] = LUNG_WINDOW) -> np.ndarray:
    """Read one CT slice as grey values.

    Pictures (PNG, JPEG, TIFF) of 8 or 16 bits are divided by 255 or 65535, and inverted where a
    TIFF says that 0 is white; float pictures must lie in 0..1 already. They are turned as their
    orientation tag says, and 16 bits must not lie within 4096 levels. Colour becomes grey
    (luminance) and an alpha channel is dropped. DICOM (.dcm, .dicom, or the letters DICM at byte
    128) and NIfTI (.nii, .nii.gz; the middle axial slice) hold Hounsfield units, which the window
    maps to 0..1.

    Args:
        path: the file.
        window: level and width in HU, used by DICOM and NIfTI only. The default shows the lung.

    Returns:
        float32 [H, W] in 0..1.

    Raises:
        DataError: the file is missing, locked, truncated, no image, smaller than 8x8, larger than
            67 megapixels, or holds NaN or infinite values, or no grey values as above.
    """
    path = readable(path)
    if path.name.lower().endswith((".nii", ".nii.gz")):
        return medical.read_nifti(path, None, window)
    if path.suffix.lower() in (".dcm", ".dicom") or has_dicom_preamble(path):
        return medical.read_dicom(path, window)
    return _to_unit(_open(path), path)


def read_mask(path: str | Path) -> np.ndarray:
    """Read one mask as its stored codes.

    The codes of a palette picture (mode P) are its indices. `convert("L")` would replace them by
    the brightness of their colours, e.g. 0, 1, 2 by 0, 38, 75, so it is never called here. An
    orientation tag turns a mask as it turns an image.

    Returns:
        uint8 [H, W]; what the codes mean is up to the data set.

    Raises:
        DataError: as `read_image`, and for colour pictures, which hold no codes.
    """
    path = readable(path)
    picture = _open(path)
    if picture.mode not in ("P", "L", "1") and not picture.mode.startswith("I"):
        raise DataError(
            f"{path}: the mask is a picture of mode {picture.mode}, which holds colours, not class "
            "codes; save it as a palette or 8-bit grey PNG"
        )
    mask = np.asarray(picture)
    if mask.max() > 255 or mask.min() < 0:
        raise DataError(
            f"{path}: the mask holds codes outside 0..255; save the class codes as an 8-bit PNG"
        )
    return mask.astype(np.uint8)


def write_image(path: str | Path, array: np.ndarray) -> None:
    """Write an 8-bit PNG atomically.

    Args:
        path: a name that ends in .png.
        array: [H, W] grey or [H, W, 3] RGB; floats in 0..1, or uint8, which is stored as it is.

    Raises:
        DataError: the name, shape, type or range is another.
        OutputError: the file cannot be written.
    """
    path, array = Path(path), np.asarray(array)
    if path.suffix.lower() != ".png":
        raise DataError(f"{path}: images are written as PNG; let the name end in .png")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise DataError(f"{path}: cannot write shape {array.shape}; pass [H, W] or [H, W, 3]")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating) or not _within_unit(array):
            raise DataError(
                f"{path}: cannot write {array.dtype} values outside 0..1; "
                "pass floats in 0..1 or uint8"
            )
        array = np.rint(array * 255).astype(np.uint8)
    with atomic_path(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")


def has_dicom_preamble(path: Path) -> bool:
    """Whether the letters DICM stand at byte 128."""
    with open(path, "rb") as file:
        file.seek(128)
        return file.read(4) == b"DICM"


def _open(path: Path) -> Image.Image:
    """Decode and turn a picture completely; Pillow alone would leave the pixels for later."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            check_size(*picture.size, path)  # before any pixel is decoded
            picture.verify()  # PNG: the checksums, and that the end of the file is there
        # again, because `verify` uses the file up; open, because by its name Pillow would map a
        # plain TIFF into memory with the sides that it has after turning
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                raise DataError(
                    f"{path}: the file holds {picture.n_frames} pictures; save the slice you want "
                    "as a file of its own"
                )
            picture.load()  # turns a TIFF as its tag says
            if picture.format != "TIFF":
                ImageOps.exif_transpose(picture, in_place=True)
            return picture
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{path}: the image has more than {MAX_PIXELS:,} pixels; reduce it or check that this "
            "is a CT slice"
        ) from error
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"{path}: this is no image that can be read; expected PNG, JPEG, TIFF, DICOM or NIfTI"
        ) from error
    except Exception as error:  # each Pillow decoder has its own ways to fail on broken bytes
        raise DataError(
            f"{path}: the image cannot be decoded ({one_line(error)}); the file is damaged or "
            "truncated, copy or download it again"
        ) from error


def _to_unit(picture: Image.Image, path: Path) -> np.ndarray:
    stored = np.asarray(picture)
    if picture.mode.startswith("I"):  # I;16 and its kin, or I: 16 bits held in 32
        values = stored.astype(np.float32) / 65535
        # a TIFF in which 0 is white: Pillow inverts 8 bits, but not 16
        if picture.mode.startswith("I;16") and getattr(picture, "tag_v2", {}).get(262) == 0:
            values = 1 - values
    elif picture.mode == "F":
        values = stored
    else:
        if picture.mode not in ("1", "L", "LA"):
            picture = picture.convert("RGB")  # resolves palettes, drops alpha
        values = np.asarray(picture.convert("L"), dtype=np.float32) / 255
    if not np.isfinite(values).all():
        raise DataError(
            f"{path}: the image holds NaN or infinite values; replace them and save it again"
        )
    if not _within_unit(values):
        raise DataError(
            f"{path}: the values run from {stored.min():g} to {stored.max():g}, expected 0..1 "
            "(float) or 0..65535 (integer); rescale the image, or pass Hounsfield units as DICOM "
            "or NIfTI"
        )
    low, high = int(stored.min()), int(stored.max())
    if picture.mode.startswith("I") and 0 < high - low <= FEW_LEVELS:
        raise DataError(
            f"{path}: the values run from {low} to {high}, only {high - low + 1} of the 65536 "
            "levels of 16 bits, so the image would look flat (12 bits, or shifted Hounsfield "
            "units?); rescale it to 0..65535, or pass Hounsfield units as DICOM or NIfTI"
        )
    return values.astype(np.float32)


def _within_unit(values: np.ndarray) -> bool:
    return bool(((values >= 0) & (values <= 1)).all())  # False for NaN, too
