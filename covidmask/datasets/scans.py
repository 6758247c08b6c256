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
from tqdm import tqdm

from covidmask.datasets import medical
from covidmask.datasets.medical import (
    UNEVEN,
    Frame,
    NiftiVolume,
    Slice,
    dicom_frames,
    ordered,
    read_dicom,
    split_series,
)
from covidmask.errors import DataError
from covidmask.files import MAX_PIXELS, atomic_path, check_size, no_access, one_line, readable

LUNG_WINDOW = (-600.0, 1500.0)  # level, width in HU
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")  # what the public data sets hold, in order of preference
# No others that Pillow knows: for a stranger's EPS, for one, it would start Ghostscript
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "WEBP", "JPEG2000")
FEW_LEVELS = 4096  # of 65536: 12 bits, or Hounsfield units, which would all look alike
LOOKED_AT = 32  # slices of a volume, where nobody chooses
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
RESULT = "_lesions.png"  # how the pictures of `covidmask predict` end: no input, where a folder is


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


@dataclass(frozen=True)
class Scan:
    """A volume, with slice 1 nearest the feet where positions are known, or all pictures.

    Args:
        name: what outputs call it: "pictures", "volume 1", ...
        source: what the reader named, for the screen only.
        slices: in order.
        volume: the slices belong together.
    """

    name: str
    source: str
    slices: tuple[Slice, ...]
    volume: bool


def find_scans(
    paths: Sequence[str | Path], series: int | None = None
) -> tuple[list[Scan], list[str]]:
    """Look through files and folders, without decoding a pixel.

    DICOM files that are named one by one are sorted into their series, and each is a volume. A
    folder, searched with the folders in it, may hold one series, or `series` says which of them.
    A series is the files of one series identifier, size and orientation; a file of many frames is
    one, too. Left out are localizers, planes other than axial, other modalities, colour, burned-in
    text, screen captures, and whatever is no image. See `series.ordered` for the order.

    Args:
        paths: pictures, DICOM files, NIfTI files, and folders of them.
        series: number of the series in a folder that holds several, from 1. Of files that are
            named one by one, every series is taken all the same, and a note says so.

    Returns:
        The scans, pictures first, and sentences about what was left out, copies and gaps.

    Raises:
        DataError: a folder holds nothing to look at or several series, a file is damaged, a file
            or a folder below cannot be opened, or nothing tells the order of a series.
    """
    pictures: list[Path] = []
    volumes: list[tuple[str, Sequence[Slice]]] = []
    notes: list[str] = []
    paths = list(dict.fromkeys(Path(path) for path in paths))  # what is named twice counts once
    folders = [path for path in paths if os.path.isdir(path)]
    named = [readable(path) for path in paths if path not in folders]
    counted = False
    groups = [("the files named", named, False)] if named else []
    for source, files, is_folder in groups + [(str(f), _files(f), True) for f in folders]:
        before = len(pictures) + len(volumes)
        left_out: Counter[str] = Counter()
        dicom: list[Path] = []
        for path in files:
            kind = _kind(path)
            if kind == "NIfTI":
                volumes.append((str(path), _nifti_slices(path, notes)))
            elif kind == "DICOM":
                dicom.append(path)
            elif kind == "picture" or not is_folder:  # `read_image` says what is wrong with it
                pictures.append(path)
            else:
                left_out[kind] += 1
        frames: list[Frame] = []
        for path in tqdm(dicom, desc="reading headers", disable=len(dicom) < 2):
            found = dicom_frames(path, path.parent if is_folder else path)
            if isinstance(found, str):
                left_out[found] += 1
            else:
                frames += found
        every = split_series(frames)
        parts = [part for part in every if part[0].axial]
        other = {frame.slice.path for part in every if not part[0].axial for frame in part}
        left_out.update({"plane other than axial": len(other)} if other else {})
        if parts and series is not None and not is_folder:
            notes.append(f"{source}: --series is for folders; each series of these files is taken.")
        counted |= bool(parts)
        for part in _chosen(parts, series, source) if is_folder else parts:
            slices, remarks = ordered(part, source)
            volumes.append((source, slices))
            notes += remarks
        reasons = ", ".join(f"{reason} ({count})" for reason, count in left_out.items())
        if len(pictures) + len(volumes) == before:
            raise DataError(
                f"{source if is_folder else files[0]}: holds no axial CT slice"
                f"{f'; left out: {reasons}' if reasons else ''}; name DICOM, NIfTI or picture "
                "files, or a folder of them"
            )
        if reasons:
            notes.append(f"{source}: files left out: {reasons}.")
    if series is not None and not counted:
        notes.append("--series counts the DICOM series of a folder; here it changes nothing.")
    scans = [
        Scan(f"volume {number}", source, tuple(slices), True)
        for number, (source, slices) in enumerate(volumes, 1)
    ]
    if pictures:
        slices = tuple(Slice(path) for path in pictures)
        scans.insert(0, Scan("pictures", "PNG, JPEG and TIFF files", slices, False))
    return scans, notes


def choose_slices(
    count: int, slices: str | None = None, every: int | None = None, name: str = "the volume"
) -> list[int]:
    """Which slices of a volume to look at.

    By default 32 (LOOKED_AT), in the middles of as many equal parts of the volume, or all slices
    where there are not more.

    Args:
        count: slices of the volume.
        slices: "all", or numbers and ranges from 1, such as "20-80" or "3,17,40-45".
        every: take the first, and then each `every`-th, of these or of all.
        name: of the volume, for the message.

    Returns:
        Rising positions, from 0.

    Raises:
        DataError: `slices` does not parse, the volume has no such slice, or `every` is below 1.
    """
    if every is not None and every < 1:
        raise DataError(f"every {every}: must be a whole number from 1")
    if slices is None and every is None:
        parts = min(LOOKED_AT, count)
        return [int((part + 0.5) * count / parts) for part in range(parts)]
    chosen = set(range(count)) if slices in (None, "all") else set()
    for part in [] if chosen else slices.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if match is None:
            raise DataError(
                f"slices {slices!r:.60}: does not parse; write all, or numbers and ranges such as "
                "20-80 or 3,17,40-45"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if not 1 <= first <= last <= count:
            raise DataError(
                f"slices {slices!r}: {name} has no slices {part.strip()}; choose from 1 to {count}"
            )
        chosen.update(range(first - 1, last))
    return sorted(chosen)[::every]


def read_slices(
    slices: Iterable[Slice], window: tuple[float, float] = LUNG_WINDOW
) -> Iterator[np.ndarray]:
    """Read slices one by one, as `read_image` does: float32 [H, W] in 0..1.

    Slices of a volume are turned so that anterior is up and the patient's right on the left.

    Args:
        slices: those of one NIfTI file should follow one another, as it is opened once for them.
        window: level and width in HU.

    Raises:
        DataError: as `read_image`.
    """
    nifti: NiftiVolume | None = None
    for each in slices:
        if each.index is None:
            image = read_image(each.path, window)
        elif _is_nifti(each.path):
            if nifti is None or nifti.path != each.path:
                nifti = NiftiVolume(each.path)
            image = nifti.read(each.index, window)
        else:
            image = read_dicom(each.path, window, each.index)
        image = image.T if each.transpose else image
        rows, columns = (-1 if reverse else 1 for reverse in each.reverse)
        yield np.ascontiguousarray(image[::rows, ::columns])


def _files(folder: Path) -> list[Path]:
    """Every file in a folder and below, but hidden ones (macOS writes ._IM0001)."""

    def stop(error: OSError) -> None:
        raise no_access(error.filename, error)

    files: list[Path] = []
    seen: set[str] = set()  # links may lead around in a circle
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [f for f in folders if not f.startswith(".")]
        files += [] if real in seen else [Path(place, n) for n in names if not n.startswith(".")]
        seen.add(real)
    return sorted(files)


def _kind(path: Path) -> str:
    readable(path, empty=True)  # a link to nothing, too, is a slice that would be missing
    if _is_nifti(path):
        return "NIfTI"
    if path.suffix.lower() in (".dcm", ".dicom") or has_dicom_preamble(path):
        return "DICOM"
    if path.suffix.lower() not in PICTURES:
        return "no image"
    return f"named ...{RESULT} as results are" if path.name.endswith(RESULT) else "picture"


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _nifti_slices(path: Path, notes: list[str]) -> list[Slice]:
    volume = NiftiVolume(path)
    if volume.positions is None:
        notes.append(f"{path}: states no orientation; slices may be turned, or from head to feet.")
    if max(volume.spacing) > UNEVEN * min(volume.spacing):
        sides = " x ".join(f"{side:.3g}" for side in volume.spacing)
        notes.append(f"{path}: pixels measure {sides} mm; the scan was not made in axial planes.")
    where = [None] * volume.count if volume.positions is None else volume.positions.tolist()
    return [Slice(path, k, None, where[k], volume.spacing) for k in range(volume.count)]


def _chosen(parts: list[list[Frame]], series: int | None, source: str) -> list[list[Frame]]:
    """The one series of a folder that is wanted, or none where the folder holds none."""
    if not parts or (len(parts) == 1 and series is None):
        return parts
    if series is not None and 1 <= series <= len(parts):
        return [parts[series - 1]]
    each = "; ".join(
        f"{number}: {len(part)} of {part[0].size[1]} x {part[0].size[0]} pixels"
        for number, part in enumerate(parts, 1)
    )
    none = "" if series is None else f", but no series {series}"
    raise DataError(
        f"{source}: holds {len(parts)} axial CT series{none} (number: slices; {each}); "
        "choose one with --series NUMBER"
    )
