"""DICOM and NIfTI to windowed axial slices. Needs the extra `medical` (see `PACKAGES`)."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from covidmask.data.lists import one_line, readable
from covidmask.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

PACKAGES = "pydicom nibabel python-gdcm"  # the extra `medical`, by the names that pip knows
MIN_SIDE = 8  # a slice with a shorter side is a broken file
MAX_PIXELS = 2**26  # 8192 x 8192: beyond it a file is no CT slice, perhaps a decompression bomb
MAX_GZ_BYTES = 2**31  # of a .nii.gz once unpacked: 1,000 slices of 512 x 512 in 64 bits
MAX_DEFLATED_BYTES = 2**29  # of a DICOM file once inflated
PREAMBLE = 144  # bytes of a DICOM file before what its meta header counts
PIECE = 2**20  # bytes that are unpacked at a time
DEFLATE = 1032  # times a file's size is the most that it can unpack to
MM = {1: 1000.0, 3: 0.001}  # by NIfTI's code for a unit of length: metre, micron; others are mm

# All that is read of a DICOM file besides its meta header: what decoding the pixels needs.
PIXEL_TAGS = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("PlanarConfiguration", "PixelRepresentation", "BitsAllocated", "BitsStored", "HighBit"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "Modality"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData"),
)


def hounsfield_to_unit(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Map Hounsfield units to 0..1: 0 at level - width/2 and below, 1 at level + width/2 and above.

    Args:
        hu: any shape.
        window: level and width in HU, finite; width > 0.

    Returns:
        float32, the shape of `hu`.

    Raises:
        ValueError: the window is another.
    """
    level, width = map(float, window)
    if not (math.isfinite(level) and math.isfinite(width) and width > 0):
        raise ValueError(f"window {level:g} {width:g}: give finite numbers and a width above 0")
    # no double is outside 64 bits, but 1e308 is infinite in 32, and 1e-50 is 0
    wide = np.float32 if 1e-30 < width < 1e30 and abs(level) < 1e30 else np.float64
    with np.errstate(over="ignore"):  # far outside the window: clipped
        unit = (np.asarray(hu, dtype=wide) - (level - width / 2)) / width
    return np.clip(unit, 0, 1).astype(np.float32)


def check_size(width: int, height: int, path: str | Path) -> None:
    """Raise `DataError` where an image is too small, or too large, to be a slice."""
    if min(width, height) < MIN_SIDE:
        raise DataError(
            f"{path}: the image has {width} x {height} pixels, at least {MIN_SIDE} x {MIN_SIDE} "
            "are needed; check that this is a CT slice"
        )
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: the image has {width} x {height} pixels, more than {MAX_PIXELS:,}; reduce "
            "it or check that this is a CT slice"
        )


def open_dicom(path: str | Path, tags: Sequence[str], *, pixels: bool) -> Dataset:
    """Read the named tags of a DICOM file. No other is decoded, so none can reach an output.

    Args:
        tags: DICOM keywords, such as "Rows".
        pixels: read the pixel data, too.

    Raises:
        DataError: pydicom is absent, or the file cannot be opened or is no DICOM.
    """
    readable(path)
    try:
        import pydicom
    except ImportError as error:
        raise _missing_package(path, "pydicom") from error
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
            _check_deflated(path, PREAMBLE + meta.FileMetaInformationGroupLength)
        return pydicom.dcmread(path, specific_tags=list(tags), stop_before_pixels=not pixels)
    except DataError:
        raise
    except Exception as error:  # broken bytes fail in many ways
        reason = one_line(error).partition(" Use force=True")[0]  # advice to programmers
        raise DataError(
            f"{path}: this is no DICOM file ({reason}); export the slice again"
        ) from error


def _check_deflated(path: str | Path, start: int) -> None:
    """Raise `DataError` where a deflated file, which pydicom unpacks in memory, would fill it."""
    unpack, total = zlib.decompressobj(wbits=-zlib.MAX_WBITS), 0
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(PIECE)
        while data:
            total += len(unpack.decompress(data, PIECE))
            if total > MAX_DEFLATED_BYTES:
                raise DataError(
                    f"{path}: the file unpacks to more than {MAX_DEFLATED_BYTES:,} bytes; export "
                    "the slice uncompressed"
                )
            data = unpack.unconsumed_tail or file.read(PIECE)


def whole(dataset: Dataset, keyword: str, least: float = -math.inf) -> int | None:
    """The whole number in a tag, None where it is absent or empty, else ValueError."""
    value = dataset.get(keyword)
    if value in (None, ""):
        return None
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{keyword} is not one whole number from {least}")
    return int(value)


def frame_value(
    dataset: Dataset, frame: int, sequence: str, keyword: str, *, plain: bool = True
) -> Any:
    """A value that enhanced CT may state for each frame, for all frames, or, as others, plainly.

    Args:
        frame: from 0.
        sequence: the functional group that holds it, such as "PixelMeasuresSequence".
        keyword: the tag, such as "PixelSpacing".
        plain: take the plain tag where no functional group holds one.

    Returns:
        The value, or None.
    """
    each = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for group in [*each[frame : frame + 1], *shared[:1]]:
        for item in group.get(sequence) or []:
            if keyword in item:
                return item[keyword].value
    return dataset.get(keyword) if plain else None


def read_dicom(
    path: str | Path, window: tuple[float, float], frame: int | None = None
) -> np.ndarray:
    """Read one grey DICOM slice through a window.

    Stored values become HU by rescale slope and intercept, 1 and 0 where a tag is absent or
    empty. Padding outside the reconstruction circle (often -2048) falls below any lung window and
    becomes 0. MONOCHROME1 (low values bright) is inverted only if neither rescale tag holds a
    value: with one the values are HU, and MONOCHROME1 speaks of display alone.

    Args:
        path: the file.
        window: level and width in HU.
        frame: which frame, from 0; None where the file holds one.

    Returns:
        float32 [H, W] in 0..1.

    Raises:
        DataError: pydicom is absent, the file is no DICOM, has no grey pixels, states that they
            are no HU (modality, rescale type or slope), holds several frames (stated or not) and
            none is named, is smaller than 8x8 or larger than 67 megapixels, is truncated, or is
            compressed in a way that needs a package which is not installed.
    """
    # of a file with many frames, pydicom reads the one alone
    dataset = open_dicom(path, PIXEL_TAGS, pixels=frame is None)
    try:
        from pydicom.pixels import apply_modality_lut

        frames = whole(dataset, "NumberOfFrames", 0) or 1
        samples = whole(dataset, "SamplesPerPixel", 0) or 1
        if (frame is None and frames > 1) or samples > 1:
            raise DataError(
                f"{path}: the file holds {frames} frames of {samples} samples per pixel; "
                "export one grey slice per file"
            )
        check_size(whole(dataset, "Columns") or 0, whole(dataset, "Rows") or 0, path)
        slope, intercept, unit = (
            frame_value(dataset, frame or 0, "PixelValueTransformationSequence", keyword)
            for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType")
        )
        slope, intercept = (None if value == "" else value for value in (slope, intercept))
        lut = dataset.get("ModalityLUTSequence") or []
        _check_hounsfield(path, dataset, slope, lut[0].get("ModalityLUTType") if lut else unit)
        stored = _stored(path, dataset, frame)
        is_hu = bool(lut) or slope is not None or intercept is not None
        # both, because pydicom rescales with both only
        dataset.RescaleSlope = 1 if slope is None else slope
        dataset.RescaleIntercept = 0 if intercept is None else intercept
        values = apply_modality_lut(stored, dataset)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{path}: the pixels of the DICOM file cannot be decoded ({one_line(error)}); export "
            "or copy the slice again"
        ) from error
    if values.ndim != 2:  # pydicom returns what is there, whatever the number of frames
        raise DataError(
            f"{path}: the pixels have shape {values.shape}, not rows and columns; "
            "export one grey slice per file"
        )
    image = hounsfield_to_unit(_finite(values, path), window)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1" and not is_hu:
        image = 1 - image
    return image


def _check_hounsfield(path: str | Path, dataset: Dataset, slope: Any, unit: Any) -> None:
    """Raise `DataError` where the values of a slice are no HU."""
    if dataset.get("Modality") not in (None, "", "CT"):
        reason = "its modality is not CT"
    elif not str(unit or "HU").strip().upper().startswith(("HU", "HOUNSFIELD", "US")):
        reason = "its rescale type is not HU"  # US: unspecified, which old scanners wrote
    elif slope is not None and not 0 < slope < math.inf:
        reason = f"its rescale slope is {slope:g}"
    elif not str(dataset.get("PhotometricInterpretation") or "MONO").startswith("MONO"):
        reason = "its pixels are no grey values"
    elif (whole(dataset, "HighBit") or 0) >= (whole(dataset, "BitsStored") or 64):
        reason = "its values do not stand in the lowest bits"  # pydicom would not shift them
    else:
        return
    raise DataError(
        f"{path}: the slice does not hold Hounsfield units ({reason}); export the CT slice itself"
    )


def _stored(path: str | Path, dataset: Dataset, frame: int | None) -> np.ndarray:
    from pydicom.pixels import get_decoder, pixel_array

    source = dataset if frame is None else path
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None or not syntax.is_compressed:
        return pixel_array(source, index=frame)
    plugins = get_decoder(syntax).available_plugins
    if not plugins:
        raise DataError(
            f"{path}: the pixels are compressed ({syntax.name}), which needs a package that is not "
            f"installed; run `pip install {PACKAGES}`, or export the slice uncompressed"
        )
    try:  # where others may return what there is of a truncated slice, GDCM refuses it
        return pixel_array(source, index=frame, decoding_plugin="gdcm" if "gdcm" in plugins else "")
    except Exception as error:  # of GDCM, with no cause in words
        raise DataError(
            f"{path}: the compressed pixels ({syntax.name}) cannot be decoded; copy the slice "
            "again if it is damaged or truncated, else export it uncompressed"
        ) from error


class NiftiVolume:
    """The axial slices of a NIfTI image that holds HU; slice 0 is nearest the feet.

    The volume is turned to the nearest RAS+ axes by its affine, so its last axis runs from feet to
    head. A slice is shown as radiologists see it and DICOM stores it: anterior up, the patient's
    right on the left of the picture. Voxels are read with the first slice and stay in memory in
    the type of the file (an uncompressed file stays on the disk).

    Args:
        path: .nii or .nii.gz, 2-D or 3-D.

    Attributes:
        count: how many axial slices there are.
        size: rows and columns of each.
        positions: float [count], mm along the normal of the slices, rising to the head; None where
            the file states no orientation, and the axes are taken to be in nibabel's usual order.
        spacing: mm between rows and between columns.

    Raises:
        DataError: nibabel is absent, or the file is no NIfTI, is empty, or is not 2-D or 3-D.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            import nibabel
        except ImportError as error:
            raise _missing_package(path, "nibabel") from error
        self.path = readable(path)
        try:
            nibabel.imageglobals.logger.setLevel("CRITICAL")  # it would print what it mends
            self._image = nibabel.load(path)
            if not isinstance(self._image, nibabel.Nifti1Image):  # Nifti2Image is one, too
                raise DataError(f"{path}: the file is CIFTI, no volume; save one 3-D NIfTI volume")
            shape, affine = self._image.shape, self._image.affine
            while len(shape) > 3 and shape[-1] == 1:
                shape = shape[:-1]
            if len(shape) not in (2, 3) or min(shape) < 1:
                raise DataError(f"{path}: the image has shape {shape}; save one 3-D volume")
            self._shape = (*shape, 1)[:3]
            self._check_bytes()
            self._check_affine()
            self._turn = nibabel.io_orientation(affine)
            affine = affine @ nibabel.orientations.inv_ornt_aff(self._turn, self._shape)
            x, y, self.count = (self._shape[int(i)] for i in np.argsort(self._turn[:, 0]))
        except DataError:
            raise
        except Exception as error:  # broken bytes fail in many ways
            raise self._unreadable(error) from error
        self.size = (y, x)
        header = self._image.header
        affine = affine * MM.get(int(header["xyzt_units"]) % 8, 1.0)
        across, along, up = np.linalg.norm(affine[:3, :3], axis=0)
        self.spacing = (float(along), float(across))
        self.positions = None
        if header["sform_code"] or header["qform_code"]:
            self.positions = affine[:3, 2] @ affine[:3, 3] / up + up * np.arange(self.count)

    def _check_bytes(self) -> None:
        """What the header claims, before memory is taken for it."""
        proxy, held = self._image.dataobj, self.path.stat().st_size
        claimed = math.prod(map(int, self._shape)) * proxy.dtype.itemsize
        packed = self.path.suffix.lower() == ".gz"
        if proxy.offset + claimed > held * (DEFLATE if packed else 1):
            raise ValueError(
                f"its header claims {self._shape} voxels, to byte {proxy.offset + claimed:,}, more "
                f"than {held:,} bytes of the file can hold"
            )
        if packed and claimed > MAX_GZ_BYTES:
            raise DataError(
                f"{self.path}: the volume of {self._shape} voxels has {claimed:,} bytes, and of a "
                f"compressed file at most {MAX_GZ_BYTES:,} are read; unpack it to .nii"
            )

    def _check_affine(self) -> None:
        from nibabel.openers import ImageOpener

        image = self._image
        with ImageOpener(self.path) as file:  # as stated: of a length of 0, nibabel makes 1
            header = type(image.header).from_fileobj(file, check=False)
        stated = header["sform_code"] or 0 not in header["pixdim"][1:4][: header["dim"][0]]
        axes = image.affine[:3, :3]
        volume = 0.01 * np.prod(np.linalg.norm(axes, axis=0))  # of a box, if axes are at angles
        if not (stated and np.isfinite(image.affine).all() and abs(np.linalg.det(axes)) > volume):
            raise ValueError("its voxels have no size, or two of its axes run the same way")

    def read(self, index: int, window: tuple[float, float]) -> np.ndarray:
        """float32 [H, W] in 0..1: slice `index`, from 0, through a window in HU.

        Raises:
            DataError: there is no such slice, the file is truncated, or holds NaN or other values
                than real numbers.
        """
        if not 0 <= index < self.count:
            raise DataError(
                f"{self.path}: there is no slice {index}; "
                f"choose one of 0..{self.count - 1}, the axial slices"
            )
        check_size(*self.size[::-1], self.path)
        try:
            proxy = self._image.dataobj
            values = self._stored[..., index].astype(np.float32) * proxy.slope + proxy.inter
        except Exception as error:
            raise self._unreadable(error) from error
        picture = values[::-1, ::-1].T  # [x, y] -> rows to posterior, columns to patient's left
        return hounsfield_to_unit(_finite(picture, self.path), window)

    @cached_property
    def _stored(self) -> np.ndarray:
        """[to the right, anterior, superior] without slope and intercept: a view of the file."""
        from nibabel.orientations import apply_orientation

        proxy = self._image.dataobj
        packed = self.path.suffix.lower() == ".gz"
        stored = self._unpacked() if packed else proxy.get_unscaled()
        stored = stored.reshape(self._shape, order="F")
        if stored.dtype.kind not in "iuf":
            raise ValueError(f"its voxels are of type {stored.dtype}, not real numbers")
        return apply_orientation(stored, self._turn)

    def _unpacked(self) -> np.ndarray:
        """Every voxel of a .nii.gz, which is read to its end: its checksum stands there."""
        proxy = self._image.dataobj
        stored = np.empty(math.prod(self._shape), proxy.dtype)
        left = stored.view(np.uint8)
        with gzip.open(self.path) as file:
            file.seek(proxy.offset)
            while len(left):
                count = file.readinto(left[:PIECE])
                if not count:
                    raise EOFError("it ends before its last voxel")
                left = left[count:]
            for _ in range(MAX_GZ_BYTES // PIECE):
                if not file.read(PIECE):
                    break
        return stored

    def _unreadable(self, error: Exception) -> DataError:
        return DataError(
            f"{self.path}: the NIfTI file cannot be read ({one_line(error)}); "
            "copy or export it again"
        )


def read_nifti(path: str | Path, index: int | None, window: tuple[float, float]) -> np.ndarray:
    """Read one axial slice of a NIfTI image; see `NiftiVolume`.

    Args:
        path: .nii or .nii.gz, 2-D or 3-D.
        index: slice along the last axis after turning, 0 is nearest the feet; None is the middle.
        window: level and width in HU.

    Returns:
        float32 [H, W] in 0..1.

    Raises:
        DataError: nibabel is absent, the file is no NIfTI or is truncated, is not 2-D or 3-D, or
            has no slice `index`.
    """
    volume = NiftiVolume(path)
    return volume.read(volume.count // 2 if index is None else index, window)


def _finite(values: np.ndarray, path: str | Path) -> np.ndarray:
    if not np.isfinite(values).all():
        raise DataError(f"{path}: the image holds NaN or infinite values; export it again")
    return values


def _missing_package(path: str | Path, package: str) -> DataError:
    return DataError(
        f"{path}: reading it needs {package}, which is not installed; run `pip install {PACKAGES}`"
    )
