"""DICOM and NIfTI to windowed axial slices in order. Needs the extra `medical` (see `PACKAGES`)."""

from __future__ import annotations

import gzip
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from covidmask.errors import DataError
from covidmask.files import PACKAGES, check_finite, check_size, decoding

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_GZ_BYTES = 2**31  # of a .nii.gz once unpacked: 1,000 slices of 512 x 512 in 64 bits
MM = {1: 1000.0, 3: 0.001}  # by NIfTI's code for a unit of length: metre, micron; others are mm
SAME_PLACE = 0.01  # mm: slices that are nearer to each other have the same position
SAME_WAY = 0.02  # between unit vectors: 1 degree, so that no rounding parts a series
UNEVEN = 1.5  # times the usual distance of neighbours: more is a gap
AXIAL = 0.8  # least cosine between the normal and the patient's long axis (37 degrees)
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # pictures of screens; also the classes below it
BAD_NIFTI = "the NIfTI file cannot be read", "copy or export it again"


@dataclass(frozen=True)
class Slice:
    """Where one slice is, and what outputs may say about it."""

    path: Path
    index: int | None = None  # axial slice of a NIfTI file, from 0; None: the middle one
    instance: int | None = None  # DICOM's instance number
    position: float | None = None  # mm along the normal, rising to the head; None where unknown
    spacing: tuple[float, float] | None = None  # mm between rows and between columns, as read
    turn: tuple[bool, int, int] = (False, 1, 1)  # swap the axes, then steps of rows and columns
    # what sorts DICOM
    series: tuple = ()  # number, identifier (dropped then), columns, rows: equal within a series
    plane: np.ndarray | None = None  # [2, 3], unit vectors along a row, a column; 0 where unknown
    corner: np.ndarray | None = None  # [3], mm, image position; NaN where unknown


def hounsfield_to_unit(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Map Hounsfield units of any shape to float32 in 0..1, by a window of level and width in HU.

    Level - width/2 and below become 0, level + width/2 and above 1. Raises `DataError` unless
    level and width are finite numbers, the width above 0.
    """
    level, width = map(float, window)
    if not (math.isfinite(level) and math.isfinite(width) and width > 0):
        raise DataError(f"window {level:g} {width:g}: give finite numbers, the width above 0")
    # no double is outside 64 bits, but 1e308 is infinite in 32, and 1e-50 is 0
    wide = np.float32 if 1e-30 < width < 1e30 and abs(level) < 1e30 else np.float64
    with np.errstate(over="ignore"):  # far outside the window: clipped
        unit = (np.asarray(hu, dtype=wide) - (level - width / 2)) / width
    return np.clip(unit, 0, 1).astype(np.float32)


def _number(dataset: Dataset, keyword: str, kind: type = int) -> Any:
    # None where the tag is absent or empty; a list of numbers is an error
    value = dataset.get(keyword)
    return None if value in (None, "") else kind(value)


def _numbers(dataset: Dataset, keyword: str, count: int) -> np.ndarray:
    # float [count], NaN where the tag is absent or holds something else
    values = dataset.get(keyword)
    fits = isinstance(values, Sequence) and not isinstance(values, str) and len(values) == count
    numbers = np.array([float(value) for value in values] if fits else [np.nan] * count)
    return numbers if np.isfinite(numbers).all() else np.full(count, np.nan)


def _open_dicom(path: Path, *, pixels: bool) -> Dataset:
    import pydicom

    meta = pydicom.filereader.read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
        # pydicom would unpack all of it, however much it is
        raise DataError(f"{path}: the file is deflated as a whole; export it uncompressed")
    return pydicom.dcmread(path, stop_before_pixels=not pixels)


def _no_ct_slice(header: Dataset) -> str:
    # why a DICOM file is no CT slice in Hounsfield units; empty if it is one
    stored_as = header.file_meta.get("MediaStorageSOPClassUID")
    if "Rows" not in header:
        if not stored_as or stored_as.name.endswith("Image Storage"):
            raise ValueError("it ends before it states rows")
        return "no image"  # DICOMDIR, reports, presentation states
    made = str(header.get("ImageType")).upper()
    # few captures say that there is text in the pixels
    capture = f"{header.get('SOPClassUID') or stored_as}.".startswith(f"{SECONDARY_CAPTURE}.")
    capture = capture and np.isnan(_numbers(header, "ImageOrientationPatient", 6)).any()
    # enhanced CT states slope and place by frame, out of our sight
    several = any(f"{k}FunctionalGroupsSequence" in header for k in ("Shared", "PerFrame"))
    several = several or (_number(header, "NumberOfFrames") or 1) != 1
    shown = str(header.get("PhotometricInterpretation") or "MONO")
    grey = shown.startswith("MONO") and (_number(header, "SamplesPerPixel") or 1) == 1
    slope = _number(header, "RescaleSlope", float)
    unit = str(header.get("RescaleType") or "HU").strip().upper()
    shifted = (_number(header, "HighBit") or 0) >= (_number(header, "BitsStored") or 64)
    reasons = {
        "localizer": "LOCALIZER" in made or "SCOUT" in made,
        "no CT": header.get("Modality") not in (None, "", "CT"),
        "burned-in text, which may name the patient": header.get("BurnedInAnnotation") == "YES",
        "screen capture, which may name the patient": "SCREEN SAVE" in made or capture,
        "several frames in one file": several,
        "no grey values": not grey,
        # US: unspecified, which old scanners wrote
        "a rescale type that is not HU": not unit.startswith(("HU", "HOUNSFIELD", "US")),
        f"a rescale slope of {slope}": slope is not None and not 0 < slope < math.inf,
        "a table that translates its values": header.get("ModalityLUTSequence"),
        "values that do not stand in the lowest bits": shifted,  # pydicom would not shift them
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def read_dicom(path: Path, window: tuple[float, float]) -> np.ndarray:
    """Read one CT slice: float32 [H, W] in 0..1. Raises `DataError`.

    Stored values become HU by rescale slope and intercept, 1 and 0 where a tag is absent or
    empty, and a window (level, width) maps them to 0..1. Padding outside the reconstruction circle
    (often -2048) becomes 0. MONOCHROME1 (low values bright) is inverted only if neither rescale
    tag holds a value: with one the values are HU, and it speaks of display alone.
    """
    remedy = f"export it again, uncompressed, or run `pip install {PACKAGES}`"
    with decoding(path, "the pixels cannot be decoded", remedy):
        from pydicom.pixels import get_decoder, pixel_array

        dataset = _open_dicom(path, pixels=True)
        if reason := _no_ct_slice(dataset):
            raise DataError(f"{path}: is no CT slice in Hounsfield units ({reason}); export one")
        check_size(int(dataset.Columns), int(dataset.Rows), path)
        syntax = dataset.file_meta.TransferSyntaxUID
        # GDCM refuses a truncated slice, of which others may return what there is
        gdcm = syntax.is_compressed and "gdcm" in get_decoder(syntax).available_plugins
        stored = pixel_array(dataset, decoding_plugin="gdcm" if gdcm else "")
        if stored.ndim != 2:  # several frames that no tag states
            raise DataError(f"{path}: the pixels have shape {stored.shape}; export a grey slice")
        slope, intercept = (_number(dataset, f"Rescale{k}", float) for k in ("Slope", "Intercept"))
        values = stored * np.float64(1 if slope is None else slope) + (intercept or 0.0)
    check_finite(values.min(), values.max(), path)
    image = hounsfield_to_unit(values, window)
    inverted = dataset.get("PhotometricInterpretation") == "MONOCHROME1"
    return 1 - image if inverted and slope is None and intercept is None else image


def axial_series(files: Sequence[Path], folder: bool, left_out: Counter) -> list[list[Slice]]:
    """The axial CT series of DICOM files by series number, each in the order of the files.

    A series has one series identifier, size and orientation, that of its first slice: whatever
    hangs on a threshold, such as whether slices are turned, is the same for all. Files that name
    no series belong together only where they lie in one folder and were found there (`folder`).
    `left_out` counts other files (localizers, other planes and modalities, ...), by reasons.
    """
    groups: list[list[Slice]] = []
    problem = "this is no DICOM file, or its header is damaged", "export the slice again"
    for path in tqdm(files, desc="reading headers", disable=len(files) < 2):
        with decoding(path, *problem), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's would quote identifiers
            header = _open_dicom(path, pixels=False)
            if reason := _no_ct_slice(header):
                left_out[reason] += 1
                continue
            plane = _numbers(header, "ImageOrientationPatient", 6).reshape(2, 3)
            lengths = np.linalg.norm(plane, axis=1, keepdims=True)
            if not lengths.all() or abs(np.dot(*(plane := plane / lengths))) > 0.1:
                raise ValueError("its orientation is not that of two directions at right angles")
            name = str(header.get("SeriesInstanceUID") or (path.parent if folder else path))
            number, size = _number(header, "SeriesNumber"), (int(header.Columns), int(header.Rows))
            spacing = _numbers(header, "PixelSpacing", 2)
            each = Slice(
                path,
                instance=_number(header, "InstanceNumber"),
                spacing=tuple(spacing.tolist()) if min(spacing) > 0 else None,
                series=(math.inf if number is None else number, name, *size),
                plane=np.nan_to_num(plane),
                corner=_numbers(header, "ImagePositionPatient", 3),
            )
        for group in groups:
            turned = np.linalg.norm(group[0].plane - each.plane, axis=1)
            if group[0].series[1:] == each.series[1:] and turned.max() < SAME_WAY:
                group.append(each)
                break
        else:
            groups.append([each])
    axial = []
    for group in sorted(groups, key=lambda group: group[0].series[0]):
        plane = group[0].plane
        if not plane.any() or abs(np.cross(*plane)[2]) >= AXIAL:
            axial.append(group)
        else:
            left_out["plane other than axial"] += len(group)
    return axial


def ordered(series: Sequence[Slice], source: str, notes: list[str]) -> tuple[Slice, ...]:
    """Sort one of `axial_series` by position along the normal, else by instance number.

    `notes` takes sentences about copies, gaps and missing positions of what is called `source`.
    """
    plane = series[0].plane
    across, down = plane if plane.any() else np.eye(3)[:2]
    normal = np.cross(across, down)
    normal = normal * (-1 if normal[2] < 0 else 1)  # to the head
    if swap := bool(abs(across[1]) > abs(across[0])):  # rows run to a side
        across, down = down, across
    turn = swap, -1 if down[1] < 0 else 1, -1 if across[0] < 0 else 1
    placed = plane.any() and np.isfinite([each.corner for each in series]).all()
    if not placed and len(series) > 1:
        numbers = {each.instance for each in series}
        if None in numbers or len(numbers) < len(series):
            raise DataError(
                f"{series[0].path}: neither positions nor instance numbers order the slices of its "
                "series; export it again with one of them, each slice once"
            )
        notes.append(
            f"{source}: positions are missing; slices are in the order of their instance numbers, "
            "which may run from head to feet."
        )
    turned = []
    for each in series:
        position = float(normal @ each.corner) if placed else None
        spacing = each.spacing[::-1] if each.spacing and swap else each.spacing
        turned.append(replace(each, position=position, spacing=spacing, turn=turn, series=()))
    place = attrgetter("position" if placed else "instance")
    kept: list[Slice] = []
    for each in sorted(turned, key=place):
        if placed and kept and place(each) - place(kept[-1]) < SAME_PLACE:
            pair = kept.pop(), each
            each = min(pair, key=lambda s: math.inf if s.instance is None else s.instance)
        kept.append(each)
    if len(kept) < len(series):
        notes.append(
            f"{source}: {len(series) - len(kept)} slices left out that lie where another one does "
            "(copies, or a second acquisition?); the lowest instance number stays."
        )
    steps = np.diff([place(each) for each in kept])
    if len(steps) > 1 and steps.max() > UNEVEN * (usual := np.median(steps)):
        widest, unit = steps.argmax(), "mm" if placed else "instance numbers"
        notes.append(
            f"{source}: slices are {usual:.4g} {unit} apart, but up to {steps[widest]:.4g}, from "
            f"slice {widest + 1} to {widest + 2}; some may be missing."
        )
    return tuple(kept)


class NiftiVolume:
    """The axial slices of a 2-D or 3-D NIfTI image (.nii, .nii.gz) that holds HU.

    It is turned to the nearest RAS+ axes by its affine: slice 0 is nearest the feet; anterior is
    up, and the patient's right on the left of the picture. Voxels are read with the first slice and
    stay in memory in the type of the file (uncompressed, on the disk). Raises `DataError`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._packed = path, path.suffix.lower() == ".gz"
        with decoding(path, *BAD_NIFTI):
            import nibabel

            nibabel.imageglobals.logger.setLevel("CRITICAL")  # it would print what it mends
            image = nibabel.load(path)
            self._proxy, shape = image.dataobj, tuple(map(int, image.shape))
            volume = isinstance(image, nibabel.Nifti1Image)  # Nifti2Image is one, too; CIFTI is not
            if not volume or len(shape) < 2 or min(shape) < 1 or math.prod(shape[3:]) > 1:
                what = f"{type(image).__name__} of shape {shape}"
                raise DataError(f"{path}: the file is a {what}; save one 3-D NIfTI volume")
            self._shape = (*shape, 1)[:3]
            most = MAX_GZ_BYTES if self._packed else path.stat().st_size - self._proxy.offset
            if math.prod(shape) * self._proxy.dtype.itemsize > most:  # before memory is taken
                raise DataError(
                    f"{path}: its header claims {shape} voxels, more than the {most:,} bytes that "
                    "it may hold; copy it again, or unpack a .nii.gz to .nii"
                )
            with nibabel.openers.ImageOpener(path) as file:  # as stated: nibabel makes 1 of 0
                stated = type(image.header).from_fileobj(file, check=False)
            sized = stated["sform_code"] or 0 not in stated["pixdim"][1:4][: stated["dim"][0]]
            affine, axes = image.affine, image.affine[:3, :3]
            least = 0.01 * np.prod(np.linalg.norm(axes, axis=0))  # of a box, if axes are at angles
            if not (sized and np.isfinite(affine).all() and abs(np.linalg.det(axes)) > least):
                raise ValueError("its voxels have no size, or two of its axes run the same way")
            self._turn = nibabel.io_orientation(affine)
            affine = affine @ nibabel.orientations.inv_ornt_aff(self._turn, self._shape)
            x, y, self.count = (self._shape[int(i)] for i in np.argsort(self._turn[:, 0]))
        check_size(x, y, path)
        affine = affine * MM.get(int(image.header["xyzt_units"]) % 8, 1.0)
        across, along, up = np.linalg.norm(affine[:3, :3], axis=0)
        self.spacing = (float(along), float(across))
        self.positions: list[float | None] = [None] * self.count
        if image.header["sform_code"] or image.header["qform_code"]:
            start = affine[:3, 2] @ affine[:3, 3] / up
            self.positions = (start + up * np.arange(self.count)).tolist()

    def slices(self, notes: list[str]) -> tuple[Slice, ...]:
        """All axial slices; `notes` takes sentences about what is odd about them."""
        if self.positions[0] is None:  # the axes are taken to be in nibabel's usual order
            problem = "no orientation is stated; slices may be turned, or from head to feet."
            notes.append(f"{self.path}: {problem}")
        if max(self.spacing) > UNEVEN * min(self.spacing):
            size = "{:.3g} x {:.3g} mm".format(*self.spacing)
            notes.append(f"{self.path}: pixels measure {size}; the scan was not axial.")
        positions = enumerate(self.positions)
        return tuple(Slice(self.path, k, None, mm, self.spacing) for k, mm in positions)

    def read(self, index: int | None, window: tuple[float, float]) -> np.ndarray:
        """Slice `index`, from 0 (None: the middle), through a window: float32 [H, W] in 0..1."""
        with decoding(self.path, *BAD_NIFTI):
            slab = self._voxels[..., self.count // 2 if index is None else index]
            values = slab.astype(np.float32) * self._proxy.slope + self._proxy.inter
        check_finite(values.min(), values.max(), self.path)
        # [x, y] -> rows to posterior, columns to patient's left
        return hounsfield_to_unit(values[::-1, ::-1].T, window)

    @cached_property
    def _voxels(self) -> np.ndarray:
        """[to the right, anterior, superior] without slope and intercept: a view of the file."""
        import nibabel

        with (gzip.open if self._packed else open)(self.path, "rb") as file:
            where = self._shape, self._proxy.dtype, file, self._proxy.offset
            voxels = nibabel.volumeutils.array_from_file(*where, mmap=not self._packed)
            file.read(1)  # beyond the end, where a packed file has its checksum
        return nibabel.apply_orientation(voxels, self._turn)
