import gzip
import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from covidmask.datasets import medical
from covidmask.datasets.medical import hounsfield_to_unit, read_dicom
from covidmask.datasets.scans import read_image
from covidmask.errors import DataError
from covidmask.files import one_line

ROOT = Path(__file__).resolve().parents[2]
WINDOW = (-600.0, 1500.0)  # -1350..150
HU = np.linspace(-2048, 1500, 16 * 20).reshape(16, 20).astype(np.int16)


def read_nifti(path, index, window):
    return medical.NiftiVolume(path).read(index, window)


def test_window():
    unit = hounsfield_to_unit(np.array([-2048, -1350, -600, 150, 3000]), WINDOW)
    assert unit.dtype == np.float32
    assert unit.tolist() == [0, 0, 0.5, 1, 1]
    for bad in ((0, 0), (0, -1), (0, np.nan), (np.nan, 1), (0, np.inf), (-np.inf, 1)):
        with pytest.raises(ValueError, match="width"):
            hounsfield_to_unit(HU, bad)


@pytest.mark.parametrize(
    "window, expected",
    [
        ((1e308, 1e308), [0, 0]),
        ((0, 1e308), [0.5, 0.5]),
        ((-1e308, 1.5e308), [1, 1]),
        ((0, 1e-300), [0.5, 1]),
        ((1, 5e-324), [0, 0]),
    ],
)
def test_windows_at_the_ends_of_what_a_number_can_be(window, expected):
    unit = hounsfield_to_unit(np.array([0, 0.5]), window)
    assert unit.dtype == np.float32 and unit.tolist() == expected


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
        ({"NumberOfFrames": 2, "PixelData": HU.tobytes() * 2}, "several frames in one file"),
        ({"SharedFunctionalGroupsSequence": []}, "several frames in one file"),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "no grey values"),
        ({"PixelData": HU.tobytes()[:100]}, "cannot be decoded"),
    ],
    ids=["several frames", "enhanced", "colour", "short pixels"],
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
    "name", ["MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm"]
)
def test_compressed_slices_of_others(tmp_path, name):
    """One picture of pydicom's own, plain and compressed without loss."""
    pydicom = pytest.importorskip("pydicom", reason="needs the extra `medical`")
    pytest.importorskip("gdcm", reason="needs the extra `medical`")
    images = []
    for file in (name, "MR_small.dcm"):
        found = pydicom.data.get_testdata_file(file, download=False)
        if not found:
            pytest.skip("this release of pydicom comes without its pictures")
        dataset = pydicom.dcmread(found)
        dataset.Modality = "CT"
        dataset.save_as(tmp_path / file)
        images.append(read_dicom(tmp_path / file, (500, 2000)))  # it runs from 0 to about 2,000
    np.testing.assert_array_equal(*images)
    assert images[0].std() > 0.1


def jpeg(path, kind, **tags):
    """HU as 12 bits from -1024, compressed by GDCM: JPEG Lossless, JPEG-LS or JPEG 2000."""
    gdcm = pytest.importorskip("gdcm", reason="needs the extra `medical`")
    stored = np.clip(HU + 1024, 0, 4095).astype(np.uint16)
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024, "BitsStored": 12, "HighBit": 11}
    write_dicom(path, stored, **rescale, **tags)
    reader, change, writer = (
        gdcm.ImageReader(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.ImageWriter(),
    )
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()
    return path, stored.astype(int) - 1024


KINDS = ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"]


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_slices(tmp_path, kind):
    path, hu = jpeg(tmp_path / "a.dcm", kind)
    np.testing.assert_allclose(read_dicom(path, WINDOW), hounsfield_to_unit(hu, WINDOW), atol=1e-6)
    whole = path.read_bytes()
    for keep in (0.6, 0.9, 0.98):  # what is there of a slice is no slice
        path.write_bytes(whole[: int(keep * len(whole))])
        with pytest.raises(DataError, match="a.dcm"):
            read_dicom(path, WINDOW)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compressed_slice_that_ends_early(tmp_path, kind):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra `medical`")
    path, _hu = jpeg(tmp_path / "a.dcm", kind)
    dataset = pydicom.dcmread(path)
    (frame,) = pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=1)
    dataset.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 4 * 2]])
    dataset.save_as(path)
    with pytest.raises(DataError, match="a.dcm: the pixels cannot be decoded"):
        read_dicom(path, WINDOW)


def test_compressed_dicom_names_the_package(tmp_path, monkeypatch):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra `medical`")
    encapsulated = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    path = write_dicom(
        tmp_path / "jpeg.dcm", HU, syntax=pydicom.uid.JPEGLosslessSV1, PixelData=encapsulated
    )
    decoder = type(pydicom.pixels.get_decoder(pydicom.uid.JPEGLosslessSV1))
    monkeypatch.setattr(decoder, "available_plugins", ())
    with pytest.raises(DataError, match="jpeg.dcm: .*pip install .*python-gdcm"):
        read_dicom(path, WINDOW)


@pytest.mark.parametrize(
    "tags, problem",
    [
        ({"Modality": "PT", "RescaleSlope": 2, "RescaleIntercept": 0}, "no CT"),
        ({"RescaleSlope": 1, "RescaleIntercept": 0, "RescaleType": "MGML"}, "type that is not HU"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "slope of 0"),
        ({"RescaleSlope": -1}, "slope of -1"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "no grey values"),
        ({"BitsStored": 12, "HighBit": 15}, "not stand in the lowest bits"),
    ],
)
def test_what_is_no_hounsfield_units_is_refused(tmp_path, tags, problem):
    with pytest.raises(DataError, match=f"a.dcm: is no CT slice in Hounsf.*{problem}"):
        read_dicom(write_dicom(tmp_path / "a.dcm", HU, **tags), WINDOW)
    for kind in ("HU", "US", "", None):
        read_dicom(write_dicom(tmp_path / "b.dcm", HU, RescaleType=kind, Modality="CT"), WINDOW)


def test_a_table_in_place_of_a_slope_is_refused(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra `medical`")
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [4096, 0, 16])
    table.ModalityLUTType = "HU"
    table.add_new("LUTData", "OW", np.arange(4096, dtype=np.uint16).tobytes())
    path = write_dicom(tmp_path / "a.dcm", np.abs(HU), ModalityLUTSequence=[table])
    with pytest.raises(DataError, match="a.dcm: is no CT slice in Hounsfield units .a table"):
        read_dicom(path, WINDOW)


def test_a_deflated_file_is_not_unpacked(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra `medical`")
    path = write_dicom(tmp_path / "a.dcm", HU)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    with pytest.raises(DataError, match="a.dcm: the file is deflated as a whole"):
        read_dicom(path, WINDOW)


@pytest.mark.parametrize(
    "tags, problem",
    [
        ({"NumberOfFrames": -1}, "several frames"),
        ({"Rows": 0}, "20 x 0 pixels"),
        ({"Rows": 65535, "Columns": 65535}, "65535 x 65535 pixels, not from"),
        ({"Rows": [16, 16]}, "not 'list'"),
        ({"RescaleSlope": [1, 1]}, "cannot be decoded"),
    ],
)
def test_tags_that_hold_something_else(tmp_path, tags, problem):
    with pytest.raises(DataError, match=f"a.dcm: .*{problem}"):
        read_dicom(write_dicom(tmp_path / "a.dcm", HU, **tags), WINDOW)


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


def test_a_packed_nifti_file_whose_checksum_is_wrong(tmp_path):
    path = write_nifti(tmp_path / "ct.nii.gz", marked_volume(), RAS)
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    with pytest.raises(DataError, match="ct.nii.gz: .*CRC"):
        read_nifti(path, None, WINDOW)


def test_what_nibabel_mends_is_not_printed(tmp_path, caplog):
    path = claiming(tmp_path / "ct.nii", marked_volume().shape, _80=struct.pack("<f", -1.0))
    read_nifti(path, None, WINDOW)
    assert not caplog.records


def claiming(path, shape, **fields):
    """A small NIfTI file whose header says something else; .gz by its name."""
    write_nifti(path, marked_volume(), RAS)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        content = bytearray(file.read())
    content[40:56] = struct.pack("<8h", 3, *shape, 1, 1, 1, 1)
    for place, value in fields.items():
        content[int(place[1:]) : int(place[1:]) + len(value)] = value
    with opened(path, "wb") as file:
        file.write(content)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("shape", [(32767, 32767, 32767), (2000, 2000, 500)])
def test_a_nifti_file_that_claims_more_than_it_holds(tmp_path, suffix, shape):
    path = claiming(tmp_path / f"a{suffix}", shape)
    with pytest.raises(DataError, match=rf"claims \({shape[0]}, .*more than .* bytes"):
        read_nifti(path, 0, WINDOW)


def test_a_large_nifti_file_is_refused_only_when_packed(tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "a.nii.gz", marked_volume(), RAS)
    monkeypatch.setattr(medical, "MAX_GZ_BYTES", 2 * 12 * 10 * 5)
    read_nifti(path, 0, WINDOW)
    monkeypatch.setattr(medical, "MAX_GZ_BYTES", 2 * 12 * 10 * 5 - 1)
    with pytest.raises(DataError, match="a.nii.gz: .* unpack a .nii.gz to .nii"):
        read_nifti(path, 0, WINDOW)
    read_nifti(write_nifti(tmp_path / "a.nii", marked_volume(), RAS), 0, WINDOW)


@pytest.mark.parametrize("unit, factor", [(0, 1), (1, 1000), (2, 1), (3, 0.001), (5, 1)])
def test_nifti_lengths_are_in_millimetres(tmp_path, unit, factor):
    affine = np.diag([0.5 / factor, 0.75 / factor, 2.5 / factor, 1])
    affine[2, 3] = 10 / factor
    path = write_nifti(tmp_path / "a.nii", marked_volume(), affine)
    content = bytearray(path.read_bytes())
    content[123] = unit + 8  # seconds, which are a matter of other axes
    path.write_bytes(content)
    volume = medical.NiftiVolume(path)
    assert volume.spacing == pytest.approx((0.75, 0.5))
    np.testing.assert_allclose(volume.positions, 10 + 2.5 * np.arange(5), rtol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        # where sform_code, and one of pixdim, or a row of the sform, stand in the file
        {"_254": bytes(2), "_80": struct.pack("<f", 0)},
        {"_254": bytes(2), "_80": struct.pack("<f", np.nan)},
        {"_280": struct.pack("<4f", 0, 0, 0, 0)},
        {"_280": struct.pack("<4f", np.nan, 0, 0, 0)},
        {"_280": struct.pack("<4f", 0, 1, 0, 0)},
    ],
)
def test_nifti_voxels_without_a_size(tmp_path, fields):
    path = claiming(tmp_path / "a.nii", (12, 10, 5), **fields)
    with pytest.raises(DataError, match="a.nii: .*voxels have no size, or two of its axes"):
        medical.NiftiVolume(path)


def test_an_error_without_words_has_the_name_of_its_type():
    assert one_line(MemoryError()) == "MemoryError"
    assert one_line(ValueError("two\n lines")) == "two lines"


def test_cifti_is_no_volume():
    nibabel = pytest.importorskip("nibabel", reason="needs the extra `medical`")
    path = Path(nibabel.__file__).parent / "tests" / "data" / "row_major.dconn.nii"
    if not path.exists():
        pytest.skip("this release of nibabel comes without its test data")
    with pytest.raises(DataError, match="row_major.dconn.nii: the file is a Cifti2Image"):
        read_image(path)


@pytest.mark.parametrize("package, name", [("pydicom", "a.dcm"), ("nibabel", "a.nii")])
def test_an_absent_package_is_named_with_the_remedy(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(DataError, match=f"needs {package}.*pip install pydicom nibabel"):
        read_image(tmp_path / name)


def test_the_packages_named_are_those_of_the_extra():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = re.findall(r"^medical = (\[.*\])", text, re.MULTILINE)
    assert re.findall(r'"([\w-]+)', line) == medical.PACKAGES.split()


def test_no_text_names_a_package_that_anyone_could_register():
    """The project is not on PyPI: whoever takes the name there would be installed."""
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "covidmask").rglob("*.py")]
    texts += [*(ROOT / "book").glob("*.md"), *(ROOT / "book" / "py").rglob("*.py")]
    named = re.compile(r"pip install [\"']?covidmask|covidmask\[\w+\]")
    assert not [str(text) for text in texts if named.search(text.read_text(encoding="utf-8"))]


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
