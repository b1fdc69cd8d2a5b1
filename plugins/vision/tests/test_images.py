"""One decoder: upright 8-bit RGB of every source of images, or one sentence that names the image."""

import contextlib
import io
import struct
import tarfile
import zipfile
import zlib

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from plait_vision.images import as_cell, decode, encode_png, is_image_name, size


def pixels(height=4, width=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def colour_png_of_16_bits():
    """One pixel, colour type 2, bit depth 16, put together by hand."""
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + struct.pack(">HHH", 0x1234, 0xABCD, 0xFFFF))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")


def test_every_source_gives_the_same_pixels(tmp_path):
    array = pixels()
    content = encoded(array)
    (tmp_path / "a.png").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/a.png", content)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a.png", "a.png")
    cell = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).cast_column("image", datasets.Image())
    undecoded = cell.cast_column("image", datasets.Image(decode=False))[0]["image"]
    with (
        zipfile.ZipFile(tmp_path / "a.zip") as zipped,
        zipped.open("x/a.png") as in_zip,
        tarfile.open(tmp_path / "a.tar") as tarred,
        (tmp_path / "a.png").open("rb") as file,
    ):
        sources = [
            str(tmp_path / "a.png"), tmp_path / "a.png", content, file, in_zip, tarred.extractfile("a.png"), array,
            Image.fromarray(array), cell[0]["image"], undecoded, {"bytes": content, "path": None},
        ]  # fmt: skip
        for source in sources:
            picture = decode(source)
            assert picture.mode == "RGB"
            assert np.array_equal(np.array(picture), array)


def test_messages_name_the_image_as_its_source_does(tmp_path):
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"a\.png is not an image of a known kind"):
        decode(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"cat/b\.png is not an image"):
        decode({"bytes": b"text", "path": "cat/b.png"})
    with pytest.raises(ValueError, match=r"^row 3 is not an image"):
        decode(b"text", "row 3")
    with pytest.raises(ValueError, match=r"none\.png cannot be read: No such file"):
        decode(tmp_path / "none.png")
    for nothing in (None, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="row 3 is missing"):
            decode(nothing, "row 3")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright_as_their_exif_says(orientation):
    array = pixels()
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(array, exif=exif)
    turned = {
        1: array, 2: array[:, ::-1], 3: np.rot90(array, 2), 4: array[::-1], 5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1), 7: np.rot90(array, 2).transpose(1, 0, 2), 8: np.rot90(array),
    }  # fmt: skip
    assert np.array_equal(np.array(decode(content)), turned[orientation])
    assert size(content) == turned[orientation].shape[:2]
    cell, picture = as_cell(content)
    assert np.array_equal(np.array(Image.open(io.BytesIO(cell["bytes"]))), turned[orientation])
    assert np.array_equal(np.array(picture), turned[orientation])
    # What was turned once stays as it is.
    assert np.array_equal(np.array(decode(decode(content))), turned[orientation])


def test_grey_palette_and_two_levels_are_exact():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(np.array(decode(encoded(grey))), np.repeat(grey[..., None], 3, 2))
    palette = Image.fromarray(pixels()).quantize(16)
    assert np.array_equal(np.array(decode(encoded(palette))), np.array(palette.convert("RGB")))
    dots = Image.fromarray(np.array([[True, False]]))
    assert np.array(decode(encoded(dots))).tolist() == [[[255] * 3, [0] * 3]]
    with pytest.raises(ValueError, match=r"a\.png is a greyscale image; .*greyscale: repeat"):
        decode(encoded(grey), "a.png", greyscale="refuse")


def test_cmyk_is_1_minus_c_times_1_minus_k():
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [51, 102, 204, 51]]], dtype=np.uint8)
    content = encoded(Image.fromarray(ink, "CMYK"), "TIFF")
    assert np.array(decode(content)).tolist() == [[[255] * 3, [0, 255, 255], [0, 0, 0], [163, 122, 41]]]


def test_16_bits_are_refused_or_scaled():
    content = encoded(Image.fromarray(np.array([[0, 128, 129, 257, 65535]], dtype=np.uint16)))
    with pytest.raises(ValueError, match=r"a\.png is a 16-bit image .* sixteen_bit: scale"):
        decode(content, "a.png")
    assert np.array(decode(content, sixteen_bit="scale"))[0, :, 0].tolist() == [0, 0, 1, 1, 255]
    colour = colour_png_of_16_bits()
    with pytest.raises(ValueError, match="16-bit"):  # Pillow reduces it silently
        decode(colour)
    assert np.array(decode(colour, sixteen_bit="scale")).tolist() == [[[0x12, 0xAB, 0xFF]]]
    with pytest.raises(ValueError, match="16-bit"):
        decode(b"P6 1 1 65535\n" + bytes(6))
    assert decode(b"P6 1 1 255\n" + bytes(3)).mode == "RGB"


def test_bitmaps_of_16_bits_for_all_channels_are_no_16_bit_images():
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    header = struct.pack("<IiiHHIIiiII", 40, 1, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    content = struct.pack("<2sIHHI", b"BM", 14 + 40 + 12 + 4, 0, 0, 14 + 40 + 12) + header + masks
    assert np.array(decode(content + struct.pack("<HH", 0xF800, 0))).tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize("kind", ["TIFF"])
def test_floats_and_lab_are_refused(kind):
    with pytest.raises(ValueError, match="is a floating-point image"):
        decode(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), kind))
    with pytest.raises(ValueError, match="mode LAB, for which there is no one way"):
        decode(Image.new("LAB", (2, 2)))
    with pytest.raises(ValueError, match=r"pixels of type float64 and shape \[2, 2\]"):
        decode(np.zeros((2, 2)))


def test_transparency_is_refused_dropped_composited_or_irrelevant():
    array = np.full((1, 2, 4), 200, dtype=np.uint8)
    array[0, 1, 3] = 0
    content = encoded(array)
    with pytest.raises(ValueError, match=r"a\.png is partly transparent"):
        decode(content, "a.png")
    assert np.array(decode(content, transparency="drop")).tolist() == [[[200] * 3, [200] * 3]]
    over = np.array(decode(content, transparency=(0, 0, 255)))
    assert over[0, 1].tolist() == [0, 0, 255]
    assert over[0, 0].tolist() == [round(200 * 200 / 255), round(200 * 200 / 255), round((200 * 200 + 255 * 55) / 255)]
    array[..., 3] = 255
    assert np.array_equal(np.array(decode(encoded(array))), array[..., :3])
    palette = Image.fromarray(pixels()).quantize(4)
    with pytest.raises(ValueError, match="partly transparent"):
        decode(encoded(palette, transparency=0))


def test_edits_of_a_picture_that_was_opened_from_a_file_count(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(pixels()))
    with Image.open(tmp_path / "a.png") as picture:
        picture.putpixel((0, 0), (1, 2, 3))
        assert decode(picture).getpixel((0, 0)) == (1, 2, 3)
        cell, _ = as_cell(picture)
        assert decode(cell).getpixel((0, 0)) == (1, 2, 3)


def test_cells_keep_the_file_where_all_decoders_agree():
    plain = encoded(pixels(), "JPEG")
    assert as_cell(plain)[0] == {"bytes": plain, "path": None}
    grey = encoded(pixels()[..., 0])
    cell, _ = as_cell(grey)
    assert np.array_equal(np.array(Image.open(io.BytesIO(cell["bytes"]))), np.repeat(pixels()[..., :1], 3, 2))
    assert np.array_equal(np.array(decode(encode_png(pixels()))), pixels())


def test_damaged_files_and_programs():
    whole = encoded(pixels(40, 40))
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded .*damaged or cut off"):
        decode(whole[: len(whole) // 2], "a.png")
    with pytest.raises(ValueError, match="is empty"):
        decode(b"", "a.png")
    with pytest.raises(ValueError, match="is a Git LFS pointer"):
        decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a.png")
    with pytest.raises(ValueError, match="not an image of a known kind"):  # PostScript would start another program
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n%%EndComments\n")


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("a.png", True), ("cat/b.JPG", True), ("train/cat/c.jpeg", True), ("__MACOSX/._a.png", False),
        ("cat/._a.png", False), (".hidden/a.png", False), ("Thumbs.db", False), ("a.txt", False), ("png", False),
    ],
)  # fmt: skip
def test_names_of_images(name, counts):
    assert is_image_name(name) == counts


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_damage_ends_in_a_sentence_or_an_image(data):
    whole = encoded(pixels(12, 12), data.draw(st.sampled_from(["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])))
    mutated = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if mutated:
            mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        assert decode(bytes(mutated), "x").mode == "RGB"
    with contextlib.suppress(ValueError):
        size(bytes(mutated), "x")
