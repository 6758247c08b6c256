"""DICOM files to series: which files belong together, and in which order.

Needs the extra `medical`. Identifiers tell series and copies apart here and go no further: what is
kept of a file is in `Slice`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from covidmask.data.lists import one_line
from covidmask.data.medical import frame_value, open_dicom, whole
from covidmask.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

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
