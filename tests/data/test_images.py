import io
import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from covidmask.datasets import scans as images
from covidmask.datasets.scans import read_image, read_mask
from covidmask.errors import DataError

GREY = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30)


def encoded(array, fmt="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, fmt)
    return buffer.getvalue()


def png_header_only(width, height):
    """A PNG that promises width x height pixels and holds none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    end = b"IEND"
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + struct.pack(">I", 0)
        + end
        + struct.pack(">I", zlib.crc32(end))
    )


def two_pages():
    buffer = io.BytesIO()
    page = Image.fromarray(GREY.astype(np.uint8))
    page.save(buffer, "TIFF", save_all=True, append_images=[page])
    return buffer.getvalue()


@pytest.mark.parametrize(
    "array, divisor",
    [(GREY.astype(np.uint8), 255), (GREY * 100, 65535), ((GREY * 100).astype(np.int32), 65535)],
    ids=["8 bit", "16 bit", "32 bit integer holding 16"],
)
def test_integers_are_scaled_by_their_depth(tmp_path, array, divisor):
    path = tmp_path / "slice.tif"
    Image.fromarray(array).save(path)
    image = read_image(path)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, array / divisor, atol=1e-7)


def test_a_tiff_in_which_0_is_white(tmp_path):
    path = tmp_path / "slice.tif"
    Image.fromarray(GREY * 100).save(path, tiffinfo={262: 0})
    np.testing.assert_allclose(read_image(path), 1 - GREY * 100 / 65535, atol=1e-7)
    Image.fromarray(GREY.astype(np.uint8)).save(path, tiffinfo={262: 0})
    with Image.open(path) as picture:  # of 8 bits, Pillow inverts what it writes and reads
        assert picture.tag_v2[262] == 0
    np.testing.assert_allclose(read_image(path), GREY.astype(np.uint8) / 255, atol=1e-7)


def test_16_bit_png(tmp_path):
    path = tmp_path / "slice.png"
    Image.fromarray(GREY * 100).save(path)
    np.testing.assert_allclose(read_image(path), GREY * 100 / 65535, atol=1e-7)


def test_float_tiff_is_kept(tmp_path):
    array = np.linspace(0, 1, 200, dtype=np.float32).reshape(10, 20)
    Image.fromarray(array).save(tmp_path / "slice.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "slice.tif"), array)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colour_becomes_grey_and_alpha_is_dropped(tmp_path, mode):
    grey = GREY.astype(np.uint8)
    alpha = np.zeros_like(grey)  # transparent: the grey values must show all the same
    planes = {"RGB": [grey] * 3, "RGBA": [grey] * 3 + [alpha], "LA": [grey, alpha]}[mode]
    Image.merge(mode, [Image.fromarray(plane) for plane in planes]).save(tmp_path / "slice.png")
    np.testing.assert_allclose(read_image(tmp_path / "slice.png"), grey / 255, atol=1e-7)


@pytest.mark.parametrize("offset", [0, 1024, 32768])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bits_that_hold_12_or_hounsfield_units_are_refused(tmp_path, offset, dtype):
    path = tmp_path / "slice.tif"
    values = (offset + np.linspace(0, 4096, 200)).astype(dtype).reshape(10, 20)
    Image.fromarray(values).save(path)
    with pytest.raises(DataError, match=f"from {offset} to {offset + 4096}, not .* 4096 levels"):
        read_image(path)
    values[5, 5] = offset + 4097
    Image.fromarray(values).save(path)
    assert read_image(path)[5, 5] == pytest.approx((offset + 4097) / 65535)
    Image.fromarray(np.full_like(values, offset)).save(path)  # constant, such as black
    assert read_image(path)[0, 0] == pytest.approx(offset / 65535)


TURNED = {  # how a viewer shows the array for each orientation tag
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].T,
    8: np.rot90,
}


@pytest.mark.parametrize("tag", TURNED)
@pytest.mark.parametrize(
    "name, options", [("a.png", {}), ("a.tif", {}), ("a.tif", {"compression": "tiff_lzw"})]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_and_masks_are_turned_by_their_orientation_tag(
    tmp_path, tag, name, options, dtype
):
    exif = Image.Exif()
    exif[274] = tag
    codes = np.random.default_rng(0).integers(0, 4, (12, 20))
    Image.fromarray(codes.astype(dtype)).save(tmp_path / name, exif=exif, **options)
    np.testing.assert_array_equal(read_mask(tmp_path / name), TURNED[tag](codes))
    stored = (codes * (np.iinfo(dtype).max // 3)).astype(dtype)
    Image.fromarray(stored).save(tmp_path / name, exif=exif, **options)
    np.testing.assert_allclose(read_image(tmp_path / name), TURNED[tag](codes) / 3, atol=1e-6)


def test_a_photo_is_turned_and_so_is_a_tiff_in_which_0_is_white(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    grey = np.zeros((24, 40), np.uint8)
    grey[:8, :16] = 255
    Image.fromarray(grey).save(tmp_path / "a.jpg", exif=exif, quality=95)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg"), TURNED[6](grey) / 255, atol=0.1)
    Image.fromarray(GREY * 100).save(tmp_path / "a.tif", tiffinfo={262: 0, 274: 6})
    expected = 1 - TURNED[6](GREY) * 100 / 65535
    np.testing.assert_allclose(read_image(tmp_path / "a.tif"), expected, atol=1e-7)


def test_an_image_through_its_palette(tmp_path):
    picture = Image.fromarray(np.repeat(np.uint8([[0], [1]]), 8, axis=0).repeat(8, axis=1))
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save(tmp_path / "slice.png")
    assert read_image(tmp_path / "slice.png")[[0, -1], 0].tolist() == [0.0, 1.0]


def test_mask_codes_are_palette_indices(tmp_path):
    codes = np.zeros((10, 12), dtype=np.uint8)
    codes[2:4, 3:6], codes[6:8, 7:9] = 1, 2
    picture = Image.fromarray(codes)
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    picture.save(tmp_path / "mask.png")
    assert set(np.unique(np.asarray(picture.convert("L")))) == {0, 38, 75}  # the trap
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), codes)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_masks_are_their_values(tmp_path, dtype):
    codes = np.arange(100, dtype=dtype).reshape(10, 10) % 4
    Image.fromarray(codes).save(tmp_path / "mask.png")
    mask = read_mask(tmp_path / "mask.png")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, codes)


GOOD = encoded(GREY.astype(np.uint8))
NOISE = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
NAN = np.full((10, 10), np.nan, dtype=np.float32)
BAD = {
    "text.png": (b"not an image\n", "no image"),
    "empty.png": (b"", "this is no image, or a damaged"),
    "empty.dcm": (b"", "the pixels cannot be decoded"),
    "empty.nii.gz": (b"", "the NIfTI file cannot be read"),
    "half.png": (GOOD[: len(GOOD) // 2], "truncated"),
    "tail.png": (GOOD[:-5], "truncated"),
    "flipped.png": (GOOD[:60] + bytes([GOOD[60] ^ 4]) + GOOD[61:], "damaged"),
    "half.jpg": (encoded(NOISE, "JPEG")[:700], "truncated"),
    "pixel.png": (encoded(np.zeros((1, 1), np.uint8)), "1 x 1"),
    "strip.png": (encoded(np.zeros((7, 90), np.uint8)), "90 x 7"),
    "bomb.png": (png_header_only(60_000, 60_000), "pixels"),
    "large.png": (png_header_only(9_000, 9_000), "pixels"),
    "nan.tif": (encoded(NAN, "TIFF"), "NaN"),
    "inf.tif": (encoded(np.full_like(NAN, np.inf), "TIFF"), "NaN"),
    "hounsfield.tif": (encoded(np.full((10, 10), -600, np.float32), "TIFF"), "0..1"),
    "negative.tif": (encoded(np.full((10, 10), -600, np.int32), "TIFF"), "from -600 to -600"),
    "far.tif": (encoded(np.full((10, 10), 70_000, np.int32), "TIFF"), "from 70000 to 70000"),
    "pages.tif": (two_pages(), "2 pictures"),
    "broken.dcm": (b"not DICOM", "DICOM"),
    "broken.nii": (b"not NIfTI", "NIfTI"),
    "broken.nii.gz": (b"not gzip", "NIfTI"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_name_the_file_and_the_problem(tmp_path, name):
    content, problem = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        read_image(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_missing_files_and_folders(tmp_path, read):
    with pytest.raises(DataError, match="absent.png: cannot be opened .No such file"):
        read(tmp_path / "absent.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "absent.png")
    with pytest.raises(DataError, match="link.png: cannot be opened .No such file"):
        read(tmp_path / "link.png")
    with pytest.raises(DataError, match="folder.png/a.png: cannot be opened .Not a directory"):
        (tmp_path / "file").write_text("text")
        read(tmp_path / "file" / "folder.png" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match="folder.png: this is a folder"):
        read(tmp_path / "folder.png")


@pytest.mark.parametrize("name", ["a.png", "a.dcm", "a.nii", "a"])
def test_pipes_and_locked_files_are_named(tmp_path, name, monkeypatch):
    os.mkfifo(tmp_path / name)  # opening it would wait for ever
    with pytest.raises(DataError, match=f"{name}: this is a folder, pipe or device"):
        read_image(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(GOOD)

    def refuse(path, *args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)  # as root, no file is locked
    with pytest.raises(DataError, match=f"{name}: cannot be opened .Permission denied.; check"):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    "name, array, problem",
    [
        ("colour.png", np.zeros((10, 10, 3), np.uint8), "RGB"),
        ("float.tif", np.zeros((10, 10), np.float32), "mode F"),
        ("codes.png", np.full((10, 10), 300, np.uint16), "0..255"),
    ],
)
def test_bad_masks(tmp_path, name, array, problem):
    Image.fromarray(array).save(tmp_path / name)
    with pytest.raises(DataError, match=problem) as caught:
        read_mask(tmp_path / name)
    assert name in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, len(GOOD) - 5))  # the last 4 bytes repeat what is known
def test_no_truncated_png_is_read(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "cut.png"
    path.write_bytes(GOOD[:cut])
    with pytest.raises(DataError, match="cut.png"):
        read_image(path)


def test_dicom_is_known_without_suffix(tmp_path, monkeypatch):
    (tmp_path / "IM0001").write_bytes(bytes(128) + b"DICM")
    monkeypatch.setattr(images.medical, "read_dicom", lambda *_: np.ones((9, 9)))
    assert read_image(tmp_path / "IM0001").sum() == 81


def test_a_format_for_which_pillow_would_start_another_program(tmp_path):
    Image.new("L", (16, 16)).save(tmp_path / "a.eps")
    path = (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(DataError, match="a.png: this is no image, or a damaged"):
        read_image(path)
