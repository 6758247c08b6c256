"""Scans that a reader names: folders, DICOM series, NIfTI volumes and pictures, slice by slice.

DICOM and NIfTI need the extra `medical`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from covidmask.data.images import LUNG_WINDOW, has_dicom_preamble, read_image
from covidmask.data.lists import no_access, readable
from covidmask.data.medical import NiftiVolume, read_dicom
from covidmask.data.series import UNEVEN, Frame, Slice, dicom_frames, ordered, split_series
from covidmask.errors import DataError

LOOKED_AT = 32  # slices of a volume, where nobody chooses
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
RESULT = "_lesions.png"  # how the pictures of `covidmask predict` end: no input, where a folder is


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
