"""DICOM and NIfTI to windowed axial slices. Needs the extra `medical` (pydicom, nibabel)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from covidmask.data.lists import one_line
from covidmask.errors import DataError

if TYPE_CHECKING:
    from pydicom import Dataset

# All that is read of a DICOM file besides its meta header: what decoding the pixels needs.
PIXEL_TAGS = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("PlanarConfiguration", "PixelRepresentation", "BitsAllocated", "BitsStored", "HighBit"),
    *("RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData"),
)


def hounsfield_to_unit(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Map Hounsfield units to 0..1: 0 at level - width/2 and below, 1 at level + width/2 and above.

    Args:
        hu: any shape.
        window: level and width in HU; width > 0.

    Returns:
        float32, the shape of `hu`.
    """
    level, width = window
    if not width > 0:
        raise ValueError(f"window width {width}: it must be above 0")
    unit = (np.asarray(hu, dtype=np.float32) - (level - width / 2)) / width
    return np.clip(unit, 0, 1)


def open_dicom(path: str | Path, tags: Sequence[str], *, pixels: bool) -> Dataset:
    """Read the named tags of a DICOM file. No other is decoded, so none can reach an output.

    Args:
        tags: DICOM keywords, such as "Rows".
        pixels: read the pixel data, too.

    Raises:
        DataError: pydicom is absent, or the file is no DICOM.
    """
    try:
        import pydicom
    except ImportError as error:
        raise _missing_package(path, "pydicom") from error
    try:
        return pydicom.dcmread(path, specific_tags=list(tags), stop_before_pixels=not pixels)
    except Exception as error:  # broken bytes fail in many ways
        raise DataError(
            f"{path}: this is no DICOM file ({one_line(error)}); export the slice again"
        ) from error


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
        DataError: pydicom is absent, the file is no DICOM, has no grey pixels, holds several
            frames (stated or not) and none is named, is truncated, or is compressed in a way that
            needs a plug-in which is not installed.
    """
    # of a file with many frames, pydicom reads the one alone
    dataset = open_dicom(path, PIXEL_TAGS, pixels=frame is None)
    frames, samples = dataset.get("NumberOfFrames"), dataset.get("SamplesPerPixel")
    if (frame is None and int(frames or 1) > 1) or int(samples or 1) > 1:
        raise DataError(
            f"{path}: the file holds {frames or 1} frames of {samples or 1} samples per pixel; "
            "export one grey slice per file"
        )
    try:
        from pydicom.pixels import apply_modality_lut, pixel_array

        stored = dataset.pixel_array if frame is None else pixel_array(path, index=frame)
        for keyword in ("RescaleSlope", "RescaleIntercept"):
            value = frame_value(dataset, frame or 0, "PixelValueTransformationSequence", keyword)
            if value not in (None, ""):
                setattr(dataset, keyword, value)
            elif keyword in dataset:
                delattr(dataset, keyword)
        is_hu = "RescaleSlope" in dataset or "RescaleIntercept" in dataset
        if is_hu:  # pydicom rescales only with both
            dataset.RescaleSlope = dataset.get("RescaleSlope", 1)
            dataset.RescaleIntercept = dataset.get("RescaleIntercept", 0)
        values = apply_modality_lut(stored, dataset)
    except Exception as error:
        remedy = "export or copy the slice again"
        syntax = getattr(dataset.file_meta, "TransferSyntaxUID", None)
        if syntax is not None and syntax.is_compressed:
            remedy = (
                f"the pixels are compressed ({syntax.name}): if the file is whole, install the "
                "plug-ins with `pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg`"
            )
        raise DataError(
            f"{path}: the pixels of the DICOM file cannot be decoded ({one_line(error)}); {remedy}"
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
        self.path = path
        try:
            self._image = nibabel.load(path)
            shape, affine = self._image.shape, self._image.affine
            while len(shape) > 3 and shape[-1] == 1:
                shape = shape[:-1]
            if len(shape) not in (2, 3) or 0 in shape:
                raise DataError(f"{path}: the image has shape {shape}; save one 3-D volume")
            self._shape = (*shape, 1)[:3]
            self._turn = nibabel.io_orientation(affine)
            if np.isnan(self._turn).any():
                raise ValueError("its affine has an axis of no length")
            affine = affine @ nibabel.orientations.inv_ornt_aff(self._turn, self._shape)
            x, y, self.count = (self._shape[int(i)] for i in np.argsort(self._turn[:, 0]))
        except DataError:
            raise
        except Exception as error:  # broken bytes fail in many ways
            raise self._unreadable(error) from error
        self.size = (y, x)
        across, along, up = np.linalg.norm(affine[:3, :3], axis=0)
        self.spacing = (float(along), float(across))
        self.positions = None
        if self._image.header["sform_code"] or self._image.header["qform_code"]:
            self.positions = affine[:3, 2] @ affine[:3, 3] / up + up * np.arange(self.count)

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

        stored = self._image.dataobj.get_unscaled().reshape(self._shape, order="F")
        if stored.dtype.kind not in "iuf":
            raise ValueError(f"its voxels are of type {stored.dtype}, not real numbers")
        return apply_orientation(stored, self._turn)

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
        f"{path}: reading it needs {package}, which is not installed; "
        'run `pip install "covidmask[medical]"`'
    )
