import builtins
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from covidmask.data.images import read_image
from covidmask.data.medical import hounsfield_to_unit, read_dicom, read_nifti
from covidmask.errors import DataError

WINDOW = (-600.0, 1500.0)  # -1350..150
HU = np.linspace(-2048, 1500, 16 * 20).reshape(16, 20).astype(np.int16)


def test_window():
    unit = hounsfield_to_unit(np.array([-2048, -1350, -600, 150, 3000]), WINDOW)
    assert unit.dtype == np.float32
    assert unit.tolist() == [0, 0, 0.5, 1, 1]
    with pytest.raises(ValueError, match="width"):
        hounsfield_to_unit(HU, (0, 0))


def write_dicom(path, stored, syntax=None, **tags):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra `medical`")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.Rows, dataset.Columns = stored.shape[:2]
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.PixelRepresentation = int(stored.dtype == np.int16)
    dataset.PixelData = stored.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def test_rescale_defaults_to_stored_values(tmp_path):
    plain = read_dicom(write_dicom(tmp_path / "a.dcm", HU), WINDOW)
    np.testing.assert_allclose(plain, hounsfield_to_unit(HU, WINDOW), atol=1e-6)
    shifted = write_dicom(
        tmp_path / "b.dcm", (HU + 3000).astype(np.uint16), RescaleSlope=0.5, RescaleIntercept=-1500
    )
    np.testing.assert_allclose(
        read_dicom(shifted, WINDOW), hounsfield_to_unit(HU / 2, WINDOW), atol=1e-6
    )


@pytest.mark.parametrize(
    "tags, slope, intercept",
    [
        ({"RescaleSlope": 2}, 2, 0),
        ({"RescaleIntercept": -1000}, 1, -1000),
        ({"RescaleSlope": 2, "RescaleIntercept": None}, 2, 0),
        ({"RescaleSlope": None, "RescaleIntercept": -1000}, 1, -1000),
        ({"RescaleSlope": None, "RescaleIntercept": None}, 1, 0),
    ],
)
def test_a_rescale_tag_that_is_absent_or_empty_has_its_default(tmp_path, tags, slope, intercept):
    path = write_dicom(tmp_path / "a.dcm", HU, **tags)
    expected = hounsfield_to_unit(slope * HU.astype(float) + intercept, WINDOW)
    np.testing.assert_allclose(read_dicom(path, WINDOW), expected, atol=1e-6)


def test_monochrome1_is_inverted_only_without_hounsfield_units(tmp_path):
    tag = {"PhotometricInterpretation": "MONOCHROME1"}
    raw = read_dicom(write_dicom(tmp_path / "raw.dcm", HU, **tag), WINDOW)
    np.testing.assert_allclose(raw, 1 - hounsfield_to_unit(HU, WINDOW), atol=1e-6)
    for rescale in ({"RescaleSlope": 1, "RescaleIntercept": 0}, {"RescaleIntercept": 0}):
        hu = read_dicom(write_dicom(tmp_path / "hu.dcm", HU, **rescale, **tag), WINDOW)
        np.testing.assert_allclose(hu, hounsfield_to_unit(HU, WINDOW), atol=1e-6)
    empty = {"RescaleSlope": None, "RescaleIntercept": None}
    plain = read_dicom(write_dicom(tmp_path / "empty.dcm", HU, **empty, **tag), WINDOW)
    np.testing.assert_array_equal(plain, raw)


def test_run_length_encoding_needs_no_plug_in(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra `medical`")
    dataset = pydicom.dcmread(write_dicom(tmp_path / "a.dcm", HU))
    dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(tmp_path / "rle.dcm")
    np.testing.assert_array_equal(
        read_dicom(tmp_path / "rle.dcm", WINDOW), read_dicom(tmp_path / "a.dcm", WINDOW)
    )


def test_dicom_without_suffix_is_read(tmp_path):
    path = write_dicom(tmp_path / "IM0001", HU)
    np.testing.assert_allclose(read_image(path), hounsfield_to_unit(HU, WINDOW), atol=1e-6)


@pytest.mark.parametrize(
    "tags, problem",
    [
        ({"NumberOfFrames": 2, "PixelData": HU.tobytes() * 2}, "2 frames"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "3 samples"),
        ({"PixelData": HU.tobytes()[:100]}, "cannot be decoded"),
    ],
    ids=["several frames", "colour", "short pixels"],
)
def test_bad_dicom(tmp_path, tags, problem):
    path = write_dicom(tmp_path / "bad.dcm", HU, **tags)
    with pytest.raises(DataError, match=problem) as caught:
        read_dicom(path, WINDOW)
    assert "bad.dcm" in str(caught.value)


@pytest.mark.filterwarnings("ignore:The number of bytes of pixel data")
def test_frames_that_no_tag_states(tmp_path):
    path = write_dicom(tmp_path / "two.dcm", HU, PixelData=HU.tobytes() * 2)
    with pytest.raises(DataError, match=r"two.dcm: the pixels have shape \(2, 16, 20\)"):
        read_dicom(path, WINDOW)


def test_dicom_cut_short(tmp_path):
    path = write_dicom(tmp_path / "cut.dcm", HU)
    whole = path.read_bytes()
    for keep in (100, 140, 300, len(whole) - 10):
        path.write_bytes(whole[:keep])
        with pytest.raises(DataError, match="cut.dcm"):
            read_dicom(path, WINDOW)


@pytest.mark.parametrize(
    "name, package",
    [("MR_small_jp2klossless.dcm", "PIL"), ("MR_small_jpeg_ls_lossless.dcm", "libjpeg")],
)
def test_plug_ins_decompress(name, package):
    """One picture of pydicom's own, plain and compressed without loss."""
    data = pytest.importorskip("pydicom.data", reason="needs the extra `medical`")
    pytest.importorskip(package, reason="needs a plug-in: pip install pylibjpeg pylibjpeg-libjpeg")
    plain, compressed = (data.get_testdata_file(n, download=False) for n in ("MR_small.dcm", name))
    if not (plain and compressed):
        pytest.skip("this release of pydicom comes without its pictures")
    window = (500, 2000)  # its values run from 0 to about 2,000
    np.testing.assert_array_equal(read_dicom(compressed, window), read_dicom(plain, window))
    assert read_dicom(plain, window).std() > 0.1


def test_compressed_dicom_names_the_plug_ins(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra `medical`")
    encapsulated = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    path = write_dicom(
        tmp_path / "jpeg.dcm", HU, syntax=pydicom.uid.JPEGLosslessSV1, PixelData=encapsulated
    )
    with pytest.raises(DataError, match="jpeg.dcm.*pylibjpeg-libjpeg"):
        read_dicom(path, WINDOW)


def write_nifti(path, data, affine):
    nibabel = pytest.importorskip("nibabel", reason="needs the extra `medical`")
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return path


RAS = np.diag([1.0, 1.0, 1.0, 1.0])
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def marked_volume():
    """[x, y, z] in RAS+: air, with one voxel of bone far right, anterior, in slice z = 3."""
    volume = np.full((12, 10, 5), -2000, dtype=np.int16)
    volume[11, 9, 3] = 1000
    return volume


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_shows_anterior_up_and_the_right_side_on_the_left(tmp_path, suffix):
    path = write_nifti(tmp_path / f"ct{suffix}", marked_volume(), RAS)
    picture = read_nifti(path, 3, WINDOW)
    assert picture.shape == (10, 12)
    assert np.argwhere(picture).tolist() == [[0, 0]]
    assert not read_nifti(path, 2, WINDOW).any()


def test_nifti_stored_along_other_axes_reads_the_same(tmp_path):
    volume = np.random.default_rng(0).integers(-1300, 100, (12, 10, 5)).astype(np.int16)
    ras = write_nifti(tmp_path / "ras.nii", volume, RAS)
    lps = write_nifti(tmp_path / "lps.nii", volume[::-1, ::-1], LPS)
    zxy = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    turned = write_nifti(tmp_path / "turned.nii", volume.transpose(2, 0, 1), zxy)
    for path in (lps, turned):
        np.testing.assert_array_equal(read_nifti(path, 1, WINDOW), read_nifti(ras, 1, WINDOW))
    np.testing.assert_array_equal(read_image(ras), read_nifti(ras, 2, WINDOW))  # the middle one


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 1), (12, 10, 1, 1)])
def test_nifti_of_one_slice(tmp_path, shape):
    values = np.random.default_rng(0).integers(-1300, 100, (12, 10)).astype(np.int16)
    path = write_nifti(tmp_path / "one.nii", values.reshape(shape), RAS)
    expected = hounsfield_to_unit(values[::-1, ::-1].T, WINDOW)
    np.testing.assert_allclose(read_nifti(path, None, WINDOW), expected, atol=1e-6)


def test_bad_nifti(tmp_path):
    path = write_nifti(tmp_path / "ct.nii", marked_volume(), RAS)
    for index in (-1, 5):
        with pytest.raises(DataError, match=r"ct.nii: there is no slice -?\d; choose one of 0..4"):
            read_nifti(path, index, WINDOW)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="ct.nii"):
        read_nifti(path, 4, WINDOW)
    for shape in ((12, 10, 5, 2), (12, 10, 0)):
        other = write_nifti(tmp_path / "other.nii", np.zeros(shape, np.int16), RAS)
        with pytest.raises(DataError, match="other.nii.*3-D"):
            read_nifti(other, None, WINDOW)
    nan = write_nifti(tmp_path / "nan.nii", np.full((12, 10, 5), np.nan, np.float32), RAS)
    with pytest.raises(DataError, match="nan.nii.*NaN"):
        read_nifti(nan, None, WINDOW)


@pytest.mark.parametrize("package, name", [("pydicom", "a.dcm"), ("nibabel", "a.nii")])
def test_an_absent_package_is_named_with_the_remedy(tmp_path, monkeypatch, package, name):
    original = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return original(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, package, raising=False)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(DataError, match=rf"{package}.*covidmask\[medical\]"):
        read_image(tmp_path / name)


@pytest.mark.skipif(
    not os.environ.get("COVIDMASK_REAL"), reason="COVIDMASK_REAL (folder of real CT) is not set"
)
@pytest.mark.parametrize("name", ["0.dcm", "1.dcm"])
def test_real_dicom(name):
    pytest.importorskip("pydicom", reason="needs the extra `medical`")
    image = read_image(Path(os.environ["COVIDMASK_REAL"]) / "dicom" / name)
    assert image.shape == (512, 512)
    assert image[0, 0] == 0  # padding of -2048 outside the reconstruction circle
    lung = (image > 0.25) & (image < 0.45)  # about -970..-680 HU
    tissue = image > 0.85
    assert lung.mean() > 0.05 and tissue.mean() > 0.1
