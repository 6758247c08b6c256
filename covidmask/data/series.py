"""DICOM files to series: which files belong together, and in which order.

Needs the extra `medical`. Identifiers tell series and copies apart here and go no further: what is
kept of a file is in `Slice`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from covidmask.data.lists import one_line
from covidmask.data.medical import frame_value, open_dicom
from covidmask.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

SAME_PLACE = 0.01  # mm: slices that are nearer to each other have the same position
UNEVEN = 1.5  # times the usual distance of neighbours: more is a gap
AXIAL = 0.8  # least cosine between the normal and the patient's long axis (37 degrees)
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # pictures of screens; also the classes below it
HEADER_TAGS = (
    "SOPClassUID",
    *("SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber", "ImageType"),
    *("Modality", "BurnedInAnnotation", "Rows", "Columns", "SamplesPerPixel", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"),
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
    series: tuple  # equal within a series
    series_number: float
    identity: tuple  # equal for copies of one slice
    size: tuple[int, int]  # rows, columns
    normal: np.ndarray | None  # [3], to the head
    corner: np.ndarray | None  # [3], mm, image position


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
            count = int(header.get("NumberOfFrames") or 1)
            frames = [_frame(path, header, k, count, without_series) for k in range(count)]
    except Exception as error:  # values that do not parse
        raise DataError(
            f"{path}: the header of the DICOM file is damaged ({one_line(error)}); export or copy "
            "the slice again, or take the file away"
        ) from error
    if all(frame.normal is not None and frame.normal[2] < AXIAL for frame in frames):
        return "plane other than axial"
    return frames


def split_series(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Frames of one series identifier, size and orientation together, by series number."""
    groups: dict[tuple, list[Frame]] = {}
    for frame in frames:
        groups.setdefault(frame.series, []).append(frame)
    return sorted(groups.values(), key=lambda group: group[0].series_number)


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
    placed = all(frame.normal is not None and frame.corner is not None for frame in single)
    if placed:
        places = [float(single[0].normal @ frame.corner) for frame in single]
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
    return [replace(single[i].slice, position=places[i] if placed else None) for i in kept], notes


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
        if kind is None or kind.name.endswith("Image Storage"):
            raise ValueError("the file ends before it states a size")
        return "no image"  # DICOMDIR, reports, presentation states
    image_type = header.get("ImageType") or []
    image_type = image_type if isinstance(image_type, str) else " ".join(image_type)
    if "LOCALIZER" in image_type.upper() or "SCOUT" in image_type.upper():
        return "localizer"
    if header.get("Modality", "CT") not in ("CT", "", None):
        return "no CT"
    if int(header.get("SamplesPerPixel") or 1) != 1:
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


def _frame(path: Path, header: Dataset, k: int, count: int, without_series: Path) -> Frame:
    # one position for all frames would make them acquisitions of one slice
    position = frame_value(header, k, *POSITION, plain=count == 1)
    spacing = _numbers(frame_value(header, k, "PixelMeasuresSequence", "PixelSpacing"), 2)
    plane = _numbers(frame_value(header, k, *ORIENTATION), 6)
    normal, reverse, transpose = None, (False, False), False
    if plane is not None:
        normal = np.cross(plane[:3], plane[3:])
        normal = normal * (-1 if normal[2] < 0 else 1)
        across, down = plane[:3], plane[3:]  # the ways along a row and along a column
        transpose = bool(abs(across[1]) > abs(across[0]))
        if transpose:
            across, down = down, across
            spacing = None if spacing is None else spacing[::-1]
        reverse = bool(down[1] < 0), bool(across[0] < 0)
    size = int(header.Rows), int(header.Columns)
    index = k if count > 1 else None
    instance = k + 1 if count > 1 else header.get("InstanceNumber")
    number = header.get("SeriesNumber")
    return Frame(
        slice=Slice(
            path,
            index,
            None if instance is None else int(instance),
            spacing=None if spacing is None else tuple(spacing.tolist()),
            reverse=reverse,
            transpose=transpose,
        ),
        series=(
            str(header.get("SeriesInstanceUID") or without_series),
            path if count > 1 else None,  # a file of many frames is a series of its own
            size,
            None if plane is None else tuple(np.round(plane, 1) + 0.0),  # + 0.0: no -0.0
        ),
        series_number=float("inf") if number is None else int(number),
        identity=(str(header.get("SOPInstanceUID") or path), k),
        size=size,
        normal=normal,
        corner=_numbers(position, 3),
    )


def _numbers(values: Any, count: int) -> np.ndarray | None:
    """float [count], or None where a tag is absent or holds something else."""
    if values is None or isinstance(values, (str, float)) or len(values) != count:
        return None
    numbers = np.array([float(value) for value in values])
    return numbers if np.isfinite(numbers).all() else None
