"""Synthetic DICOM files and series, full of tags that must not leave the tool."""

import numpy as np
import pytest
from PIL import Image

SECRETS = {  # what each tag of every file holds; nothing of it may be in an output
    "PatientName": "Secret^Person^Q",
    "PatientID": "SECRETID4711",
    "PatientBirthDate": "19530307",
    "PatientAddress": "17 Secret Lane",
    "PatientComments": "secret comment",
    "OtherPatientIDs": "OTHERSECRET12",
    "InstitutionName": "Secret Hospital",
    "ReferringPhysicianName": "Secret^Doctor",
    "OperatorsName": "Secret^Operator",
    "StudyDate": "20200401",
    "SeriesDate": "20200402",
    "AcquisitionDate": "20200403",
    "ContentDate": "20200404",
    "StudyTime": "112233",
    "AccessionNumber": "SECRETACC99",
    "StudyID": "SECRETST1",
    "StudyDescription": "secret study",
    "SeriesDescription": "secret series",
    "ImageComments": "secret image",
    "DeviceSerialNumber": "SECRETDEV5",
    "StationName": "SECRETSTATION",
    "ProtocolName": "secret protocol",
    "StudyInstanceUID": "1.2.826.0.1.3680043.8.498.777001",
    "FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.777002",
}
SERIES = "1.2.826.0.1.3680043.8.498.777003"
AXIAL = [1, 0, 0, 0, 1, 0]
CORONAL = [1, 0, 0, 0, 0, -1]


def chest(index, size=64):
    """int16 [H, W] in HU: air, a body, two lungs; each index has a bright mark of its own."""
    y, x = np.mgrid[:size, :size] / size
    hu = np.full((size, size), -1000, np.int16)
    hu[(x - 0.5) ** 2 / 0.2 + (y - 0.5) ** 2 / 0.12 < 1] = 40
    for centre in (0.3, 0.7):
        hu[(x - centre) ** 2 / 0.02 + (y - 0.5) ** 2 / 0.06 < 1] = -850
    hu[2, 1 + index] = 1000
    return hu


def write_slice(path, hu, *, drop=(), series=SERIES, syntax=None, **tags):
    """One CT slice with every tag that a scanner writes; `drop` names tags to leave out."""
    pydicom = pytest.importorskip("pydicom", reason="needs the extra `medical`")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = tags.get("SOPClassUID", CTImageStorage)
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    values = {
        **SECRETS,
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": generate_uid(),
        "SeriesInstanceUID": series,
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "ImageOrientationPatient": AXIAL,
        "PixelSpacing": [0.75, 0.5],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": hu.shape[-2],
        "Columns": hu.shape[-1],
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 1,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "PixelData": (hu + 1024).astype(np.int16).tobytes(),
        **tags,
    }
    meta.MediaStorageSOPInstanceUID = values["SOPInstanceUID"]
    for name, value in values.items():
        if name not in drop:
            setattr(dataset, name, value)
    if syntax is not None:
        dataset.compress(syntax)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_series(folder, count=5, *, distance=2.5, size=64, **options):
    """A series whose file names, instance numbers and positions each run another way.

    The slice of `chest(k)` lies at -100 + k * distance mm; its instance number is count - k.
    """
    for k in range(count):
        # 11 has no divisor in common with fewer slices, so the names are shuffled
        path = folder / f"Secret_Person_{(11 * k + 2) % count:04d}"
        write_slice(
            path,
            chest(k, size),
            InstanceNumber=count - k,
            ImagePositionPatient=[-120, -110, -100 + k * distance],
            **options,
        )
    return folder


def write_image(path, array):
    """Write [H, W], uint8 or floats in 0..1, as an 8-bit picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = array if array.dtype == np.uint8 else np.rint(255 * array).astype(np.uint8)
    Image.fromarray(grey).save(path)
