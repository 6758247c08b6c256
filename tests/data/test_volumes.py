"""From files and folders to slices in order, on synthetic scans."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scan_files import CORONAL, SERIES, chest, write_series, write_slice

from covidmask.datasets.medical import hounsfield_to_unit
from covidmask.datasets.scans import LUNG_WINDOW, choose_slices, find_scans, read_slices
from covidmask.errors import DataError


def only(*paths, **options):
    """The one scan there, its notes in one text."""
    (scan,), notes = find_scans(paths, **options)
    return scan, " ".join(notes)


def marks(scan):
    """Which slices of `chest` these are, in order."""
    return [int(image[2].argmax()) - 1 for image in read_slices(scan.slices)]


def expected(k, size=64):
    return hounsfield_to_unit(chest(k, size), LUNG_WINDOW)


# ---- order ----------------------------------------------------------------------------------


def test_a_shuffled_series_is_sorted_by_position(tmp_path):
    scan, notes = only(write_series(tmp_path / "scan", 7))
    assert not notes and scan.name == "volume 1" and scan.volume
    assert marks(scan) == list(range(7))
    assert [each.position for each in scan.slices] == [-100 + 2.5 * k for k in range(7)]
    assert [each.instance for each in scan.slices] == [7, 6, 5, 4, 3, 2, 1]
    assert scan.slices[0].spacing == (0.75, 0.5)
    image = next(read_slices(scan.slices))
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, expected(0), atol=1e-6)
    files = sorted((tmp_path / "scan").iterdir())
    assert marks(only(*files)[0]) == list(range(7))  # the same, with each file named


def test_positions_are_taken_along_the_normal_of_a_tilted_gantry(tmp_path):
    tilt = np.deg2rad(20)
    plane = [1, 0, 0, 0, round(np.cos(tilt), 8), round(-np.sin(tilt), 8)]
    normal = np.array([0, np.sin(tilt), np.cos(tilt)])
    for k, place in enumerate((6.0, 0.0, 3.0)):
        corner = np.round([-100, -50, 20] + place * normal, 8).tolist()
        tags = {"ImageOrientationPatient": plane, "ImagePositionPatient": corner}
        write_slice(tmp_path / f"{k}.dcm", chest(k), **tags)
    scan, _ = only(tmp_path)
    assert marks(scan) == [1, 2, 0]
    np.testing.assert_allclose(np.diff([each.position for each in scan.slices]), 3, atol=1e-4)


@pytest.mark.parametrize("tag", ["ImagePositionPatient", "ImageOrientationPatient"])
def test_without_positions_instance_numbers_tell_the_order(tmp_path, tag):
    scan, notes = only(write_series(tmp_path, 5, drop=[tag]))
    assert marks(scan) == [4, 3, 2, 1, 0] and scan.slices[0].position is None
    assert "positions are missing" in notes and "instance numbers" in notes


def test_without_either_there_is_no_order(tmp_path):
    write_series(tmp_path, 3, drop=["ImagePositionPatient", "InstanceNumber"])
    with pytest.raises(DataError, match="Secret_Person_0000: neither positions nor instance"):
        find_scans([tmp_path])
    (alone,) = list(tmp_path.iterdir())[:1]
    assert len(only(alone)[0].slices) == 1  # one slice needs no order


def test_equal_instance_numbers_are_no_order(tmp_path):
    for k in range(3):
        write_slice(tmp_path / f"{k}.dcm", chest(k), InstanceNumber=1)
    with pytest.raises(DataError, match="neither positions"):
        find_scans([tmp_path])


def test_a_second_acquisition_and_copies_are_left_out(tmp_path):
    write_series(tmp_path, 4)
    for k in range(2):
        tags = {"ImagePositionPatient": [-120, -110, -100 + k * 2.5], "InstanceNumber": 50 + k}
        write_slice(tmp_path / f"second_{k}", chest(20), **tags)
    shutil.copy(tmp_path / "Secret_Person_0000", tmp_path / "copy")
    scan, notes = only(tmp_path)
    assert marks(scan) == [0, 1, 2, 3]
    assert "3 slices left out that lie where" in notes


def test_of_slices_nearly_in_one_place_the_lowest_instance_number_stays(tmp_path):
    for k, (place, instance) in enumerate([(0, 9), (0.005, 1), (5, None), (5.005, 2), (10, 3)]):
        tags = {"ImagePositionPatient": [0, 0, place], "InstanceNumber": instance}
        write_slice(tmp_path / f"{k}.dcm", chest(k), **tags)
    scan, notes = only(tmp_path)
    assert marks(scan) == [1, 3, 4] and [each.instance for each in scan.slices] == [1, 2, 3]
    assert "2 slices left out that lie where" in notes


def test_gaps_are_reported(tmp_path):
    write_series(tmp_path, 7)
    for path in tmp_path.iterdir():
        (each,) = only(path)[0].slices
        if each.instance in (3, 4):  # two neighbours
            path.unlink()
    scan, notes = only(tmp_path)
    assert len(scan.slices) == 5
    assert "slices are 2.5 mm apart, but up to 7.5, from slice 3 to 4; some may" in notes


def test_gaps_in_instance_numbers_are_reported(tmp_path):
    write_series(tmp_path, 7, drop=["ImagePositionPatient"])
    for path in tmp_path.iterdir():
        if only(path)[0].slices[0].instance == 4:
            path.unlink()
    assert "1 instance numbers apart, but up to 2, from slice 3 to 4" in only(tmp_path)[1]


# ---- what belongs together ------------------------------------------------------------------


def test_two_series_in_a_folder_need_a_choice(tmp_path):
    write_series(tmp_path / "a", 3, SeriesNumber=7)
    write_series(tmp_path / "b", 5, SeriesNumber=2, series=SERIES + ".1")
    with pytest.raises(
        DataError, match="2 axial CT series .*1: 5 slices, 2: 3 slices.*--series"
    ) as caught:
        find_scans([tmp_path])
    assert SERIES not in str(caught.value)
    assert len(only(tmp_path, series=1)[0].slices) == 5
    assert len(only(tmp_path, series=2)[0].slices) == 3
    with pytest.raises(DataError, match="2 axial CT series .*with --series"):
        find_scans([tmp_path], series=3)
    assert len(only(tmp_path / "a", series=1)[0].slices) == 3
    with pytest.raises(DataError, match="1 axial CT series .*with --series"):
        find_scans([tmp_path / "a"], series=2)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    scans, notes = find_scans(files)  # files named one by one: all of them
    assert [(scan.name, len(scan.slices)) for scan in scans] == [("volume 1", 5), ("volume 2", 3)]
    assert not notes
    assert len(only(*files, series=2)[0].slices) == 3


def test_sizes_of_one_series_are_parted(tmp_path):
    write_series(tmp_path, 3)
    write_slice(tmp_path / "large", chest(0, 96), ImagePositionPatient=[0, 0, 900])
    with pytest.raises(DataError, match="1: 3 slices, 2: 1 slices|1: 1 slices, 2: 3 slices"):
        find_scans([tmp_path])


def turned(angle, axis):
    """ImageOrientationPatient of an axial plane, turned by degrees around x, y or z."""
    sine, cosine = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    matrix = np.eye(3)
    i, k = [(1, 2), (0, 2), (0, 1)][axis]
    matrix[i, i], matrix[i, k], matrix[k, i], matrix[k, k] = cosine, -sine, sine, cosine
    return np.round(matrix[:, :2].T.ravel(), 8).tolist()


def write_turned(folder, angles, axis):
    for k, angle in enumerate(angles):
        tags = {"ImageOrientationPatient": turned(angle, axis), "InstanceNumber": k + 1}
        write_slice(folder / f"{k}.dcm", chest(k), ImagePositionPatient=[0, 0, 3 * k], **tags)
    return folder


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("angle", [0, 2.866, 14.4775, 36.8699, 45])  # at limits, of old and new
def test_no_rounding_parts_a_series(tmp_path, angle, axis):
    angles = [angle + (0.0001 if k % 2 else -0.0001) for k in range(6)]
    write_turned(tmp_path, angles, axis)
    if angle == 45 and axis != 2:  # no longer axial
        with pytest.raises(DataError, match=r"left out: plane other than axial \(6\)"):
            find_scans([tmp_path])
        return
    try:
        scan, notes = only(tmp_path)
    except DataError as error:  # at the limit of what is axial: all or none
        assert angle == 36.8699 and "plane other than axial (6)" in str(error)
        return
    assert len(scan.slices) == 6 and not notes
    assert len({each.turn for each in scan.slices}) == 1


def test_orientations_that_differ_are_parted(tmp_path):
    write_turned(tmp_path / "a", [10, 10.9, 10, 12, 12.5], 0)
    scans, _ = find_scans(sorted((tmp_path / "a").iterdir()))
    assert [len(scan.slices) for scan in scans] == [3, 2]
    # a chain of small steps is no plane
    write_turned(tmp_path / "b", np.arange(0, 5, 0.5), 1)
    assert len(find_scans(sorted((tmp_path / "b").iterdir()))[0]) > 2


def test_orientations_of_another_length(tmp_path):
    tags = {"ImageOrientationPatient": [2, 0, 0, 0, 2, 0], "ImagePositionPatient": [0, 0, -20]}
    scan, _ = only(write_slice(tmp_path / "a.dcm", chest(0), **tags))
    assert scan.slices[0].position == -20
    for plane in ([0] * 6, [1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0], [1, 0, 0, 0.5, 0.5, 0]):
        write_slice(tmp_path / "a.dcm", chest(0), ImageOrientationPatient=plane)
        with pytest.raises(DataError, match="a.dcm: .*two directions at right angles"):
            find_scans([tmp_path])


@pytest.mark.parametrize("spacing", [[0, 0], [-1, 1], [0.7, 0], [1, 1, 1], 0.7, None])
def test_a_spacing_that_is_none(tmp_path, spacing):
    scan, _ = only(write_slice(tmp_path / "a.dcm", chest(0), PixelSpacing=spacing))
    assert scan.slices[0].spacing is None


def test_files_without_a_series_belong_together_by_folder(tmp_path):
    write_series(tmp_path, 3, drop=["SeriesInstanceUID"])
    assert len(only(tmp_path)[0].slices) == 3
    assert len(find_scans(sorted(tmp_path.iterdir()))[0]) == 3  # named: nothing joins them


def write_report(path):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra `medical`")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = pydicom.uid.BasicTextSRStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    dataset.PatientName = "Secret^Person"
    dataset.save_as(path, enforce_file_format=True)


def test_what_is_no_axial_ct_is_left_out(tmp_path):
    write_series(tmp_path, 3)
    scout = chest(0)
    write_slice(tmp_path / "scout", scout, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_slice(tmp_path / "coronal", scout, ImageOrientationPatient=CORONAL)
    write_slice(tmp_path / "mr", scout, Modality="MR")
    write_slice(tmp_path / "capture", scout, BurnedInAnnotation="YES")
    rgb = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    write_slice(tmp_path / "dose", scout, PixelData=bytes(3 * 2 * scout.size), **rgb)
    write_report(tmp_path / "report.dcm")
    (tmp_path / "readme.txt").write_text("text")
    (tmp_path / "._IM0001.dcm").write_text("of macOS")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "slice_0001_lesions.png")
    scan, notes = only(tmp_path)
    assert len(scan.slices) == 3
    for word in (
        "localizer (1)",
        "plane other than axial (1)",
        "no CT (1)",
        "burned-in text, which may name the patient (1)",
        "no grey values (1)",
        "no image (2)",
        "named ..._lesions.png as results are (1)",
    ):
        assert word in notes
    for name in ("scout", "coronal", "mr"):
        with pytest.raises(DataError, match=f"{name}: holds no axial CT slice; left out: "):
            find_scans([tmp_path / name])


CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


@pytest.mark.parametrize(
    "tags",
    [
        {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]},
        {"SOPClassUID": CAPTURE, "drop": ["ImageOrientationPatient"]},
        {"SOPClassUID": f"{CAPTURE}.3", "ImageOrientationPatient": None, "NumberOfFrames": 1},
    ],
)
def test_screen_captures_are_left_out(tags, tmp_path):
    write_series(tmp_path, 3)
    write_slice(tmp_path / "capture", chest(9), **tags)
    scan, notes = only(tmp_path)
    assert len(scan.slices) == 3
    assert "left out: screen capture, which may name the patient (1)." in notes


@pytest.mark.parametrize("kind", [CAPTURE, f"{CAPTURE}7.1"])
def test_what_is_like_a_screen_capture_is_read(kind, tmp_path):
    drop = ["ImageOrientationPatient"] * (kind != CAPTURE)
    scan, notes = only(write_series(tmp_path, 3, SOPClassUID=kind, drop=drop))
    assert len(scan.slices) == 3 and "left out" not in notes


def test_folder_without_an_image(tmp_path):
    with pytest.raises(DataError, match="holds no axial CT slice; name DICOM, NIfTI or picture"):
        find_scans([tmp_path])
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(DataError, match=r"left out: no image \(1\)"):
        find_scans([tmp_path])
    with pytest.raises(DataError, match="gone.dcm: cannot be opened .No such file"):
        find_scans([tmp_path / "gone.dcm"])


def test_any_mix(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="needs the extra `medical`")
    write_series(tmp_path / "all" / "dicom", 3)
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((16, 16, 4), np.int16), np.eye(4)), tmp_path / "v.nii"
    )
    for name in ("all/b.png", "all/a.JPG", "c.png"):
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / name)
    scans, notes = find_scans([tmp_path / "c.png", tmp_path / "all", tmp_path / "v.nii"])
    assert not notes
    assert [(scan.name, len(scan.slices)) for scan in scans] == [
        ("pictures", 3),
        ("volume 1", 4),
        ("volume 2", 3),
    ]
    assert [each.path.name for each in scans[0].slices] == ["c.png", "a.JPG", "b.png"]


# ---- pixels ---------------------------------------------------------------------------------


def test_run_length_encoded_series(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="needs the extra `medical`")
    scan, _ = only(write_series(tmp_path, 3, syntax=pydicom.uid.RLELossless))
    for k, image in enumerate(read_slices(scan.slices)):
        np.testing.assert_allclose(image, expected(k), atol=1e-6)


def test_rescaling_and_monochrome1_in_a_series(tmp_path):
    tags = {
        "RescaleSlope": 0.5,
        "RescaleIntercept": -1000,
        "PhotometricInterpretation": "MONOCHROME1",
    }
    for k in range(3):
        stored = (2 * (chest(k).astype(int) + 1000)).astype(np.int16)
        place = {"ImagePositionPatient": [0, 0, k], "PixelData": stored.tobytes()}
        write_slice(tmp_path / f"{k}", chest(k), **tags, **place)
    for k, image in enumerate(read_slices(only(tmp_path)[0].slices)):
        np.testing.assert_allclose(image, expected(k), atol=1e-6)


def test_a_prone_patient_is_turned(tmp_path):
    plane = [-1, 0, 0, 0, -1, 0]  # columns to the patient's right, rows to the front
    turned = np.ascontiguousarray(chest(3)[::-1, ::-1])
    write_slice(tmp_path / "a.dcm", turned, ImageOrientationPatient=plane)
    (image,) = read_slices(only(tmp_path)[0].slices)
    np.testing.assert_allclose(image, expected(3), atol=1e-6)


@pytest.mark.parametrize("angle", [0, 30])  # degrees in the plane; both keep the nearest axes
@pytest.mark.parametrize("down", [1, -1])
@pytest.mark.parametrize("across", [1, -1])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_slice_turned_in_its_plane(transposed, across, down, angle, tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="needs the extra `medical`")
    sine, cosine = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    stored = chest(3)[:48][::down, ::across]
    ways = [across * np.array([cosine, sine, 0]), down * np.array([-sine, cosine, 0])]
    if transposed:
        stored, ways = stored.T, ways[::-1]
    stored = np.ascontiguousarray(stored)
    plane = np.round(np.concatenate(ways), 8).tolist()
    path = write_slice(tmp_path / "a.dcm", stored, ImageOrientationPatient=plane)
    scan, _ = only(path)
    (image,) = read_slices(scan.slices)
    np.testing.assert_allclose(image, expected(3)[:48], atol=1e-6)
    assert scan.slices[0].spacing == ((0.5, 0.75) if transposed else (0.75, 0.5))
    affine = np.eye(4)  # in which x and y run the other way
    affine[:2, :2] = -np.stack([0.5 * ways[0], 0.75 * ways[1]], axis=1)[:2]
    nibabel.save(nibabel.Nifti1Image(stored.T[..., None], affine), tmp_path / "a.nii")
    nifti, _ = only(tmp_path / "a.nii")
    np.testing.assert_allclose(next(read_slices(nifti.slices)), image, atol=1e-6)
    assert nifti.slices[0].spacing == pytest.approx(scan.slices[0].spacing, abs=1e-6)


def test_dicom_and_nifti_of_one_scan_give_the_same_slices(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="needs the extra `medical`")
    dicom, _ = only(write_series(tmp_path / "dicom", 4))
    stack = np.stack([chest(k) for k in range(4)]).transpose(2, 1, 0)  # [to left, to back, to head]
    affine = np.diag([-0.5, -0.75, 2.5, 1])
    affine[:3, 3] = 120, 110, -100
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(stack, affine), path)
    nifti, notes = only(path)
    assert not notes
    images = zip(read_slices(dicom.slices), read_slices(nifti.slices), strict=True)
    for one, other in images:
        np.testing.assert_allclose(one, other, atol=1e-6)
    for one, other in zip(dicom.slices, nifti.slices, strict=True):
        assert one.position == pytest.approx(other.position, abs=1e-4)
        assert one.spacing == pytest.approx(other.spacing, abs=1e-6)


# ---- damage ---------------------------------------------------------------------------------


def test_cut_files_are_named(tmp_path):
    write_series(tmp_path, 3)
    path = tmp_path / "Secret_Person_0001"
    whole = path.read_bytes()
    for keep in (150, 300, len(whole) // 20):  # within the header
        path.write_bytes(whole[:keep])
        with pytest.raises(DataError, match="Secret_Person_0001"):
            find_scans([tmp_path])
    path.write_bytes(whole[: len(whole) - 100])
    with pytest.raises(DataError, match="Secret_Person_0001.*cannot be decoded"):
        list(read_slices(only(tmp_path)[0].slices))


def test_damaged_header(tmp_path):
    path = write_slice(tmp_path / "a.dcm", chest(0), InstanceNumber="7")
    path.write_bytes(path.read_bytes().replace(b"IS\x02\x007 ", b"IS\x02\x00x "))
    with pytest.raises(DataError, match="a.dcm: this is no DICOM file, or its header is damaged"):
        find_scans([tmp_path])
    (tmp_path / "a.dcm").write_bytes(b"no DICOM at all")
    with pytest.raises(DataError, match="a.dcm: this is no DICOM file"):
        find_scans([tmp_path])


@pytest.mark.parametrize("values", [[1, 0], 3, None])
def test_a_position_that_is_none(tmp_path, values):
    write_series(tmp_path, 2)
    write_slice(tmp_path / "third", chest(9), ImagePositionPatient=values, InstanceNumber=9)
    assert "positions are missing" in only(tmp_path)[1]


@pytest.mark.parametrize(
    "tags, problem",
    [
        ({"NumberOfFrames": [1, 2]}, "not 'MultiValue'"),
        ({"Rows": [64, 64]}, "not 'list'"),
        ({"Rows": None}, "not 'NoneType'"),
        ({"SeriesNumber": [1, 2]}, "not 'MultiValue'"),
    ],
)
def test_headers_that_hold_something_else(tmp_path, tags, problem):
    write_slice(tmp_path / "a.dcm", chest(0), **tags)
    with pytest.raises(DataError, match=f"a.dcm: .* its header is damaged .*{problem}"):
        find_scans([tmp_path])


def test_files_of_several_frames_are_left_out(tmp_path):
    write_series(tmp_path, 3)
    for tags in ({"NumberOfFrames": -1}, {"NumberOfFrames": 2}, {}):
        group = {} if tags else {"PerFrameFunctionalGroupsSequence": []}
        path = write_slice(tmp_path / "a.dcm", chest(0), **tags, **group)
        scan, notes = only(tmp_path)
        assert len(scan.slices) == 3 and "several frames in one file (1)" in notes
        with pytest.raises(DataError, match="a.dcm: holds no axial CT slice; .*several frames"):
            find_scans([path])


def test_a_file_that_does_not_say_what_it_is(tmp_path):
    path = write_slice(tmp_path / "a.dcm", chest(0), drop=["Rows", "SOPClassUID"])
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x02\x00\x02\x00UI", b"\x02\x00\x04\x00UI"))
    with pytest.raises(DataError, match="a.dcm: .*ends before it states rows"):
        find_scans([path])


def test_nothing_is_left_out_without_a_word(tmp_path, monkeypatch):
    write_series(tmp_path / "study" / "one", 2)
    write_slice(tmp_path / "two" / "a.dcm", chest(5), ImagePositionPatient=[0, 0, -80])
    (tmp_path / "study" / "two").symlink_to(tmp_path / "two")
    (tmp_path / "study" / "empty.txt").touch()
    scan, notes = only(tmp_path / "study")
    assert len(scan.slices) == 3 and "no image (1)" in notes
    scandir = os.scandir

    def locked(path):
        if os.path.basename(path) == "two":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with monkeypatch.context() as patch:  # as root, no folder is locked
        patch.setattr(os, "scandir", locked)
        for name in ("study", "two"):
            with pytest.raises(DataError, match="two: cannot be opened .Permission denied"):
                find_scans([tmp_path / name])
    (tmp_path / "two" / "back").symlink_to(tmp_path / "study")  # round and round
    with pytest.raises(DataError, match="cannot be opened .Too many levels of symbolic links"):
        find_scans([tmp_path / "study"])
    (tmp_path / "two" / "back").unlink()
    (tmp_path / "study" / "gone.dcm").symlink_to(tmp_path / "gone.dcm")
    with pytest.raises(DataError, match="gone.dcm: cannot be opened .No such file"):
        find_scans([tmp_path / "study"])
    (tmp_path / "study" / "gone.dcm").unlink()
    os.mkfifo(tmp_path / "study" / "pipe")
    for path in (tmp_path / "study", tmp_path / "study" / "pipe"):
        with pytest.raises(DataError, match="pipe: this is a folder, pipe"):
            find_scans([path])


def test_a_folder_with_the_name_of_a_file(tmp_path):
    write_series(tmp_path / "scan.dcm", 2)
    assert len(only(tmp_path)[0].slices) == len(only(tmp_path / "scan.dcm")[0].slices) == 2


def test_nifti_notes(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="needs the extra `medical`")
    volume = np.zeros((16, 20, 12), np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([0.7, 3, 0.7, 1])), tmp_path / "cor.nii")
    assert "pixels measure 3 x 0.7 mm" in only(tmp_path / "cor.nii")[1]
    image = nibabel.Nifti1Image(volume, None)
    image.header.set_sform(None, 0)
    image.header.set_qform(None, 0)
    nibabel.save(image, tmp_path / "none.nii")
    scan, notes = only(tmp_path / "none.nii")
    assert "no orientation is stated" in notes and scan.slices[0].position is None
    tiny = nibabel.Nifti1Image(np.zeros((4, 20, 3), np.int16), np.eye(4))
    nibabel.save(tiny, tmp_path / "tiny.nii")
    with pytest.raises(DataError, match="tiny.nii.*4 x 20"):
        list(read_slices(only(tmp_path / "tiny.nii")[0].slices))


# ---- choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, slices, every, chosen",
    [
        (5, None, None, [0, 1, 2, 3, 4]),
        (5, "all", None, [0, 1, 2, 3, 4]),
        (9, None, 4, [0, 4, 8]),
        (9, "2-8", 3, [1, 4, 7]),
        (9, "9, 3,4-5,4", None, [2, 3, 4, 8]),
        (9, "9", None, [8]),
    ],
)
def test_choose_slices(count, slices, every, chosen):
    assert choose_slices(count, slices, every) == chosen


def test_default_choice_is_even_and_symmetric():
    for count in (32, 33, 64, 100, 417):
        chosen = choose_slices(count)
        assert len(set(chosen)) == 32 and chosen == sorted(chosen)
        assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1
        assert abs(chosen[0] - (count - 1 - chosen[-1])) <= 1


BAD = ["", "x", "3-", "-3", "1,,2", "0", "10", "5-4", "1-10", "1:3", "1" * 5000]


@pytest.mark.parametrize("slices", BAD)
def test_bad_choice(slices):
    with pytest.raises(DataError, match="slices"):
        choose_slices(9, slices)


def test_bad_step():
    for every in (0, -1):
        with pytest.raises(DataError, match=f"every {every}: must be"):
            choose_slices(9, None, every)


def test_named_twice_and_named_as_results_are(tmp_path):
    for name in ("a", "b_lesions"):
        Image.new("L", (16, 16)).save(tmp_path / f"{name}.png")
    assert len(only(tmp_path / "a.png", f"{tmp_path}/./a.png")[0].slices) == 1
    assert "named ..._lesions.png as results are (1)" in find_scans([tmp_path])[1][0]


@pytest.mark.skipif(
    not os.environ.get("COVIDMASK_REAL"), reason="COVIDMASK_REAL (folder of real CT) is not set"
)
def test_real_dicom_folder():
    pytest.importorskip("pydicom", reason="needs the extra `medical`")
    scan, notes = only(Path(os.environ["COVIDMASK_REAL"]) / "dicom")
    assert not notes
    assert [each.position for each in scan.slices] == [0, 1]
    assert scan.slices[0].spacing == (0.625, 0.625)
    for image in read_slices(scan.slices):
        assert image.shape == (512, 512) and image[0, 0] == 0
