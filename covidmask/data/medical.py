"""DICOM and NIfTI to one windowed axial slice. Needs the extra `medical` (pydicom, nibabel)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from covidmask.data.lists import one_line
from covidmask.errors import DataError


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


def read_dicom(path: str | Path, window: tuple[float, float]) -> np.ndarray:
    """Read one single-frame grey DICOM slice through a window.

    Stored values become HU by rescale slope and intercept, 1 and 0 where the tags are absent.
    Padding outside the reconstruction circle (often -2048) falls below any lung window and becomes
    0. MONOCHROME1 (low values bright) is inverted only if neither rescale tag is there: with them
    the values are HU, and the tag speaks of display alone.

    Returns:
        float32 [H, W] in 0..1.

    Raises:
        DataError: pydicom is absent, the file is no DICOM, has no grey single-frame pixels, is
            truncated, or is compressed in a way that needs a plug-in which is not installed.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut
    except ImportError as error:
        raise _missing_package(path, "pydicom") from error
    try:
        dataset = pydicom.dcmread(path)
    except Exception as error:  # broken bytes fail in many ways
        raise DataError(
            f"{path}: this is no DICOM file ({one_line(error)}); export the slice again"
        ) from (error)
    frames, samples = dataset.get("NumberOfFrames"), dataset.get("SamplesPerPixel")
    if int(frames or 1) > 1 or int(samples or 1) > 1:
        raise DataError(
            f"{path}: the file holds {frames or 1} frames of {samples or 1} samples per pixel; "
            "export one grey slice per file"
        )
    try:
        values = apply_modality_lut(dataset.pixel_array, dataset)
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
    image = hounsfield_to_unit(_finite(values, path), window)
    is_hu = "RescaleSlope" in dataset or "RescaleIntercept" in dataset
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1" and not is_hu:
        image = 1 - image
    return image


def read_nifti(path: str | Path, index: int | None, window: tuple[float, float]) -> np.ndarray:
    """Read one axial slice of a NIfTI image that holds HU through a window.

    The volume is turned to the nearest RAS+ axes by its affine, so its last axis runs from feet to
    head. The slice is shown as radiologists see it and DICOM stores it: anterior up, the patient's
    right on the left of the picture.

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
    try:
        import nibabel
    except ImportError as error:
        raise _missing_package(path, "nibabel") from error
    try:
        volume = nibabel.funcs.squeeze_image(nibabel.load(path))  # drops a fourth axis of length 1
        if len(volume.shape) == 2:
            volume = nibabel.Nifti1Image(np.asarray(volume.dataobj)[..., None], volume.affine)
        if len(volume.shape) != 3:
            raise DataError(f"{path}: the image has shape {volume.shape}; save one 3-D volume")
        volume = nibabel.as_closest_canonical(volume)  # axes: to the right, anterior, superior
        count = volume.shape[2]
        index = count // 2 if index is None else index
        if not 0 <= index < count:
            raise DataError(
                f"{path}: there is no slice {index}; choose one of 0..{count - 1}, the axial slices"
            )
        values = np.asarray(volume.dataobj[..., index], dtype=np.float32)
    except DataError:
        raise
    except Exception as error:  # broken bytes fail in many ways
        raise DataError(
            f"{path}: the NIfTI file cannot be read ({one_line(error)}); copy or export it again"
        ) from error
    picture = values[::-1, ::-1].T  # [x, y] -> rows to posterior, columns to the patient's left
    return hounsfield_to_unit(_finite(picture, path), window)


def _finite(values: np.ndarray, path: str | Path) -> np.ndarray:
    if not np.isfinite(values).all():
        raise DataError(f"{path}: the image holds NaN or infinite values; export it again")
    return values


def _missing_package(path: str | Path, package: str) -> DataError:
    return DataError(
        f"{path}: reading it needs {package}, which is not installed; "
        'run `pip install "covidmask[medical]"`'
    )
