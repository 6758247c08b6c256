"""DICOM and NIfTI to windowed axial slices. Needs the extra `medical` (see `PACKAGES`)."""

from __future__ import annotations

import gzip
import math
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from covidmask.errors import DataError
from covidmask.files import check_size, one_line, readable

if TYPE_CHECKING:
    from pydicom import Dataset

PACKAGES = "pydicom nibabel python-gdcm"  # the extra `medical`, by the names that pip knows
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
SAME_PLACE = 0.01  # mm: slices that are nearer to each other have the same position
SAME_WAY = 0.02  # between unit vectors: 1 degree, so that no rounding parts a series
UNEVEN = 1.5  # times the usual distance of neighbours: more is a gap
AXIAL = 0.8  # least cosine between the normal and the patient's long axis (37 degrees)
MAX_FRAMES = 2**16  # in one file
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # pictures of screens; also the classes below it
HEADER_TAGS = (
    "SOPClassUID",
    *("SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber", "ImageType"),
    *("Modality", "BurnedInAnnotation", "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "BitsAllocated"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
)
# the functional groups in which enhanced CT states them, and the tags
POSITION = "PlanePositionSequence", "ImagePositionPatient"
ORIENTATION = "PlaneOrientationSequence", "ImageOrientationPatient"


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


@dataclass(frozen=True)
class Slice:
    """Where one slice is, and what outputs may say about it.

    Args:
        path: its file.
        index: frame (DICOM) or axial slice (NIfTI) in that file, from 0; None if it holds one.
        instance: DICOM's instance number, or the number of the frame.
        position: mm along the normal of the slices, rising to the head; None where unknown.
        spacing: mm between rows and between columns, as read; None where unknown.
        reverse: rows run to the front, columns to the patient's right: reading reverses them.
        transpose: in the file, rows run to a side: reading swaps the axes, and then reverses.
    """

    path: Path
    index: int | None = None
    instance: int | None = None
    position: float | None = None
    spacing: tuple[float, float] | None = None
    reverse: tuple[bool, bool] = (False, False)
    transpose: bool = False


@dataclass(frozen=True)
class Frame:
    """A slice while its series is sorted."""

    slice: Slice
    series: tuple  # equal within a series, in which orientations are the same, too
    series_number: float
    identity: tuple  # equal for copies of one slice
    size: tuple[int, int]  # rows, columns
    plane: np.ndarray | None  # [2, 3], unit vectors along a row and along a column
    corner: np.ndarray | None  # [3], mm, image position

    @property
    def axial(self) -> bool:
        """Whether the slice is axial, or does not say."""
        return self.plane is None or abs(np.cross(*self.plane)[2]) >= AXIAL


def dicom_frames(path: Path, without_series: Path) -> list[Frame] | str:
    """The frames of a DICOM file, or why it is left out, in a few words.

    Args:
        path: the file.
        without_series: files that name no series belong together if this is the same.

    Raises:
        DataError: pydicom is absent, the file is no DICOM or its header is damaged.
    """
    header = open_dicom(path, HEADER_TAGS, pixels=False)
    try:
        with warnings.catch_warnings():  # pydicom's would quote identifiers
            warnings.simplefilter("ignore")
            reason = _reason_to_leave_out(header)
            if reason:
                return reason
            count = whole(header, "NumberOfFrames", 0) or 1
            _check_count(path, header, count)
            return [_frame(path, header, k, count, without_series) for k in range(count)]
    except Exception as error:  # values that do not parse
        raise DataError(
            f"{path}: the header of the DICOM file is damaged ({one_line(error)}); export or copy "
            "the slice again, or take the file away"
        ) from error


def split_series(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Frames of one series identifier, size and orientation together, by series number.

    The first frame of a series states its orientation: whatever hangs on a threshold, such as
    whether a slice is turned, is the same for all of its slices.
    """
    groups: dict[tuple, list[list[Frame]]] = {}
    for frame in frames:
        alike = groups.setdefault(frame.series, [])
        group = next((group for group in alike if _same_way(group[0], frame)), None)
        if group is None:
            alike.append([frame])
        else:
            group.append(replace(frame, plane=group[0].plane))
    return sorted(
        (group for alike in groups.values() for group in alike), key=lambda g: g[0].series_number
    )


def _same_way(one: Frame, other: Frame) -> bool:
    if one.plane is None or other.plane is None:
        return one.plane is other.plane
    return bool((np.linalg.norm(one.plane - other.plane, axis=1) < SAME_WAY).all())


def ordered(frames: Sequence[Frame], source: str) -> tuple[list[Slice], list[str]]:
    """Sort a series by position along the normal, or by instance number where one has none.

    Args:
        frames: of one series.
        source: what the reader named, for the messages.

    Returns:
        The slices, and sentences about copies, gaps and missing positions.

    Raises:
        DataError: neither tells the order.
    """
    notes = []
    single = list({frame.identity: frame for frame in reversed(frames)}.values())[::-1]
    if len(single) < len(frames):
        notes.append(f"{source}: {len(frames) - len(single)} copies of other slices left out.")
    plane = single[0].plane
    placed = plane is not None and all(frame.corner is not None for frame in single)
    if placed:
        normal = np.cross(*plane)
        normal = normal * (-1 if normal[2] < 0 else 1)  # to the head
        places = [float(normal @ frame.corner) for frame in single]
    else:
        places = [frame.slice.instance for frame in single]
        if len(single) > 1 and (None in places or len(set(places)) < len(places)):
            raise DataError(
                f"{single[0].slice.path}: neither positions nor instance numbers tell the order "
                "of the slices of its series; export the series again with one of them"
            )
        if len(single) > 1:
            notes.append(
                f"{source}: positions are missing; slices are in the order of their instance "
                "numbers, which may run from head to feet."
            )
    groups: list[list[int]] = []  # of slices in one place
    for i in sorted(range(len(single)), key=places.__getitem__):
        if placed and groups and places[i] - places[groups[-1][0]] < SAME_PLACE:
            groups[-1].append(i)
        else:
            groups.append([i])
    kept = [min(group, key=lambda i: _instance(single[i])) for group in groups]
    if len(kept) < len(single):
        notes.append(
            f"{source}: {len(single) - len(kept)} slices left out that lie where another one does "
            "(a second acquisition?); the one with the lowest instance number stays."
        )
    notes += _gaps([places[i] for i in kept], "mm" if placed else "instance numbers", source)
    return [_turned(single[i], places[i] if placed else None) for i in kept], notes


def _turned(frame: Frame, position: float | None) -> Slice:
    """The slice at its position, with the way to turn it that its plane asks for."""
    across, down = np.eye(3)[:2] if frame.plane is None else frame.plane
    spacing = frame.slice.spacing
    transpose = bool(abs(across[1]) > abs(across[0]))
    if transpose:
        across, down = down, across
        spacing = None if spacing is None else spacing[::-1]
    reverse = bool(down[1] < 0), bool(across[0] < 0)
    return replace(
        frame.slice, position=position, spacing=spacing, reverse=reverse, transpose=transpose
    )


def _instance(frame: Frame) -> float:
    return float("inf") if frame.slice.instance is None else frame.slice.instance


def _gaps(places: Sequence[float], unit: str, source: str) -> list[str]:
    if len(places) < 3:
        return []
    steps = np.diff(places)
    usual, widest = float(np.median(steps)), int(steps.argmax())
    gaps = int((steps > UNEVEN * usual).sum())
    if not gaps:
        return []
    return [
        f"{source}: {gaps} {'gap' if gaps == 1 else 'gaps'}: slices are {usual:.4g} {unit} apart, "
        f"but {steps[widest]:.4g} from slice {widest + 1} to {widest + 2}; some may be missing."
    ]


def _reason_to_leave_out(header: Dataset) -> str:
    if "Rows" not in header:
        kind = getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID")
        if not kind or kind.name.endswith("Image Storage"):
            raise ValueError("it ends before it states rows, or does not say what it holds")
        return "no image"  # DICOMDIR, reports, presentation states
    image_type = header.get("ImageType") or []
    image_type = image_type if isinstance(image_type, str) else " ".join(map(str, image_type))
    if "LOCALIZER" in image_type.upper() or "SCOUT" in image_type.upper():
        return "localizer"
    if header.get("Modality", "CT") not in ("CT", "", None):
        return "no CT"
    if (whole(header, "SamplesPerPixel") or 1) != 1:
        return "colour"
    if header.get("BurnedInAnnotation") == "YES":
        return "burned-in text, which may name the patient"
    # few of these say that there is text in the pixels
    meta = getattr(header, "file_meta", {})
    kind = str(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")
    captured = kind == SECONDARY_CAPTURE or kind.startswith(f"{SECONDARY_CAPTURE}.")
    oriented = _numbers(frame_value(header, 0, *ORIENTATION), 6) is not None
    if "SCREEN SAVE" in image_type.upper() or (captured and not oriented):
        return "screen capture, which may name the patient"
    return ""


def _check_count(path: Path, header: Dataset, count: int) -> None:
    """Whether the file has room for its frames, before one `Frame` is made for each of them."""
    sides = [whole(header, keyword, 1) or 0 for keyword in ("Rows", "Columns", "BitsAllocated")]
    if 0 in sides[:2]:
        raise ValueError("it states no number of rows or of columns")
    syntax = getattr(header, "file_meta", {}).get("TransferSyntaxUID")
    packed = syntax is not None and (syntax.is_compressed or syntax.is_deflated)
    room = path.stat().st_size // (8 if packed else math.prod(sides) // 8 or 1)  # 8 bytes: a mark
    if count > 1 and count > min(room, MAX_FRAMES):
        raise ValueError(f"it states {count:,} frames, and has room for {min(room, MAX_FRAMES):,}")


def _frame(path: Path, header: Dataset, k: int, count: int, without_series: Path) -> Frame:
    # one position for all frames would make them acquisitions of one slice
    position = frame_value(header, k, *POSITION, plain=count == 1)
    spacing = _numbers(frame_value(header, k, "PixelMeasuresSequence", "PixelSpacing"), 2)
    if spacing is not None and not (spacing > 0).all():
        spacing = None
    plane = _numbers(frame_value(header, k, *ORIENTATION), 6)
    if plane is not None:
        plane = plane.reshape(2, 3)
        lengths = np.linalg.norm(plane, axis=1, keepdims=True)
        if not lengths.all() or abs(np.dot(*(plane := plane / lengths))) > 0.1:
            raise ValueError("its orientation is not that of two directions at right angles")
    size = whole(header, "Rows"), whole(header, "Columns")
    index = k if count > 1 else None
    number = whole(header, "SeriesNumber")
    return Frame(
        slice=Slice(
            path,
            index,
            k + 1 if count > 1 else whole(header, "InstanceNumber"),
            spacing=None if spacing is None else tuple(spacing.tolist()),
        ),
        series=(
            str(header.get("SeriesInstanceUID") or without_series),
            path if count > 1 else None,  # a file of many frames is a series of its own
            size,
        ),
        series_number=float("inf") if number is None else number,
        identity=(str(header.get("SOPInstanceUID") or path), k),
        size=size,
        plane=plane,
        corner=_numbers(position, 3),
    )


def _numbers(values: Any, count: int) -> np.ndarray | None:
    """float [count], or None where a tag is absent or holds something else."""
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        return None
    numbers = np.array([float(value) for value in values])
    return numbers if np.isfinite(numbers).all() else None
