"""Every kind of image that data holds opens as RGB with the right pixels, or is refused with a reason."""

import contextlib
import hashlib
import pickle
import struct
import zlib
from io import BytesIO

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from tests.data.image_bytes import encode, gradient, png_header
from vlm.data.example import StoredImage
from vlm.data.images import ImageError, image_sha256, image_size, open_image


def test_path_bytes_and_memory_give_the_same_pixels(tmp_path):
    gradient().save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    for source in (str(tmp_path / "a.png"), data, Image.open(BytesIO(data)), gradient()):
        image = open_image(source)
        assert image.mode == "RGB"
        assert np.array_equal(image, gradient())


@pytest.mark.parametrize(
    "format", ["BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"]
)
def test_formats(format):
    image = open_image(encode(Image.new("RGB", (16, 16), (200, 100, 40)), format))
    assert image.mode == "RGB"
    assert image.size == (16, 16)
    assert np.abs(np.asarray(image).astype(int) - (200, 100, 40)).max() <= 6


def test_postscript_is_refused():
    with pytest.raises(ImageError, match="not an image"):
        open_image(encode(gradient(), "EPS"))


def test_cmyk():
    image = open_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert open_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)).mode == "RGB"


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_range(format):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = open_image(encode(Image.fromarray(values), format))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert image.mode == "RGB"


def test_big_endian_sixteen_bits():
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 257, 65535))
    assert np.asarray(open_image(image))[0, :, 0].tolist() == [1, 255]


def grey(data: bytes) -> list[int]:
    return np.asarray(open_image(data))[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 128, 255], [0, 1, 128, 255]),  # 8 bits that are stored as integers
        ([0, 0, 0, 200], [0, 0, 0, 200]),
        ([0, 257, 32896, 65535], [0, 1, 128, 255]),  # 16 bits: 65535 = 255 * 257
        ([0, 128, 255, 256], [0, 0, 1, 1]),
    ],
)
def test_integers_of_32_bits_are_8_bits_or_16(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.int32))
    assert image.mode == "I"
    assert grey(encode(image, "TIFF")) == expected
    assert np.asarray(open_image(image))[0, :, 0].tolist() == expected


def test_what_says_that_it_has_16_bits_is_dark_where_its_values_are_small():
    values = np.array([[0, 128, 255]], dtype=np.uint16)
    assert grey(encode(Image.fromarray(values), "PNG")) == [0, 0, 1]
    assert grey(b"P5 3 1 65535\n" + values.astype(">u2").tobytes()) == [0, 0, 1]
    assert grey(b"P5 3 1 1023\n" + np.array([0, 512, 1023], dtype=">u2").tobytes()) == [0, 128, 255]


def tiff(bits: int, photometric: int, width: int, pixels: bytes) -> bytes:
    """A TIFF of one row of grey."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    entries = [struct.pack("<HHII", tag, 4 if tag == 273 else 3, 1, value) for tag, value in tags]
    entries.append(struct.pack("<HHII", 279, 4, 1, len(pixels)))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def test_white_of_twelve_bits_is_4095():
    # 0, 2048 and 4095 in 12 bits each, and four more to fill the last byte.
    assert grey(tiff(12, 1, 3, bytes.fromhex("000800fff0"))) == [0, 128, 255]


def test_black_and_white_of_a_tiff_are_what_it_says_they_are():
    pixels = struct.pack("<HHH", 0, 257, 65535)
    assert grey(tiff(16, 1, 3, pixels)) == [0, 1, 255]
    assert grey(tiff(16, 0, 3, pixels)) == [255, 254, 0]
    assert grey(tiff(8, 0, 3, bytes([0, 1, 255]))) == [255, 254, 0]


def test_transparent_level_of_sixteen_bits_is_white():
    image = Image.fromarray(np.array([[514, 0]], dtype=np.uint16))
    data = encode(image)
    trns = b"tRNS" + struct.pack(">H", 514)
    position = data.index(b"IDAT") - 4
    data = data[:position] + struct.pack(">I", 2) + trns + struct.pack(">I", zlib.crc32(trns)) + data[position:]
    assert np.asarray(open_image(data))[0, :, 0].tolist() == [255, 0]


def test_float_images():
    unit = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert np.asarray(open_image(encode(Image.fromarray(unit), "TIFF")))[0, :, 0].tolist() == [0, 128, 255]
    bytewide = np.array([[0.0, 1.0, 16.0]], dtype=np.float32)
    assert np.asarray(open_image(encode(Image.fromarray(bytewide), "TIFF")))[0, :, 0].tolist() == [0, 1, 16]
    for bad in (np.nan, -1.0, 1e9, 1.001, 15.9):
        with pytest.raises(ImageError, match="floating-point"):
            open_image(encode(Image.fromarray(np.array([[0.0, bad]], dtype=np.float32)), "TIFF"))


def test_palette():
    assert np.array_equal(open_image(encode(gradient().quantize(64))), gradient().quantize(64).convert("RGB"))


def test_palette_with_transparency_is_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    opened = open_image(encode(image, transparency=0))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


def test_colour_key_transparency_is_on_white():
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((1, 0), (0, 0, 255))
    opened = open_image(encode(image, transparency=(9, 9, 9)))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


@given(rgba=st.tuples(*[st.integers(0, 255)] * 4))
@settings(max_examples=60, deadline=None)
def test_alpha_is_composited_on_white(rgba):
    image = open_image(encode(Image.new("RGBA", (1, 1), rgba)))
    alpha = rgba[3] / 255
    expected = [round(value * alpha + 255 * (1 - alpha)) for value in rgba[:3]]
    assert np.abs(np.array(image.getpixel((0, 0))) - expected).max() <= 1


def test_grey_with_alpha_and_one_bit():
    assert open_image(encode(Image.new("LA", (1, 1), (0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encode(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == (255, 255, 255)


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def turned(format: str, tag: str, orientation: int) -> bytes:
    """An image that says by `tag` how it is turned. A TIFF has its EXIF tags as tags of its own."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    if tag == "exif":
        return encode(gradient(16, 8), format, exif=exif, **options)
    if format == "PNG":
        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp(orientation).decode())
        return encode(gradient(16, 8), format, pnginfo=text)
    if format == "TIFF":
        return encode(gradient(16, 8), format, tiffinfo={700: xmp(orientation)})
    return encode(gradient(16, 8), format, xmp=xmp(orientation), **options)


def after_its_pixels(png: bytes, kind: bytes) -> bytes:
    """The PNG with its chunk `kind` moved to its end."""
    start = png.index(kind) - 4
    end = start + 12 + int.from_bytes(png[start : start + 4])
    return png[:start] + png[end:-12] + png[start:end] + png[-12:]


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("tag", ["exif", "xmp"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_an_image_is_upright_and_has_the_size_that_it_is_said_to_have(format, tag, orientation):
    data = turned(format, tag, orientation)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    assert expected.size == ((8, 16) if 4 < orientation < 9 else (16, 8))
    for source in (data, Image.open(BytesIO(data))):
        assert image_size(source) == expected.size[::-1]
        assert np.array_equal(open_image(source), expected.convert("RGB"))
        assert image_size(source) == expected.size[::-1], "an image in memory is decoded by now"


@pytest.mark.parametrize(("tag", "kind"), [("exif", b"eXIf"), ("xmp", b"iTXt")])
def test_a_png_may_say_after_its_pixels_how_it_is_turned(tag, kind):
    data = after_its_pixels(turned("PNG", tag, 6), kind)
    assert np.array_equal(open_image(data), ImageOps.exif_transpose(Image.open(BytesIO(data))))
    assert image_size(data) == (16, 8)


def test_the_size_of_a_png_is_known_without_its_pixels():
    data = turned("PNG", "exif", 6)
    assert image_size(data[: data.index(b"IDAT") + 8]) == (16, 8)
    assert image_size(png_header(500, 400)) == (400, 500)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"\x00"])
def test_damaged_exif_leaves_the_image_as_it_is(exif):
    assert open_image(encode(gradient(), "JPEG", exif=exif)).size == (7, 5)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(BytesIO(data)).n_frames == 2
    assert open_image(data).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1)])
def test_one_pixel_wide(size):
    assert open_image(encode(Image.new("RGB", size))).size == size


WIDE = {"I": np.int32, "F": np.float32, "I;16": np.uint16, "I;16B": None}
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", *WIDE]


@pytest.mark.parametrize("mode", MODES)
def test_strips_are_no_other_than_the_whole(mode, monkeypatch):
    levels = np.random.default_rng(0).integers(0, 256, (40, 9, 4), dtype=np.uint8)
    if mode == "I;16B":
        image = Image.frombytes(mode, (9, 40), (levels[..., 0].astype(">u2") * 257).tobytes())
    elif mode in WIDE:
        values = levels[..., 0].astype(WIDE[mode])
        image = Image.fromarray(values if mode == "F" else values * 257)
    else:
        rgba = Image.fromarray(levels, "RGBA")
        image = rgba.convert("RGB").quantize(16) if mode == "P" else rgba.convert("RGB").convert(mode)
        image = rgba.convert(mode) if mode in ("RGBA", "LA", "PA") else image
    if mode == "P":
        image.info["transparency"] = 3
    whole = open_image(image.copy())
    monkeypatch.setattr("vlm.data.rgb.STRIP_PIXELS", 30)
    assert np.array_equal(open_image(image), whole)
    if mode in ("1", "L", "RGB", "CMYK", "YCbCr", "HSV"):
        assert np.array_equal(whole, image.convert("RGB")), "as Pillow converts it"
    if mode in WIDE:
        assert np.array_equal(whole, np.repeat(levels[..., :1], 3, axis=2))


def test_zero_bytes(tmp_path):
    (tmp_path / "a.png").touch()
    for source in (b"", str(tmp_path / "a.png")):
        with pytest.raises(ImageError, match="zero bytes"):
            open_image(source)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, format)
    with pytest.raises(ImageError, match=r"truncated|not an image") as caught:
        open_image(data[: len(data) // 2], where="meta.jsonl:3")
    assert str(caught.value).startswith("meta.jsonl:3: ")


@given(
    data=st.binary(min_size=1, max_size=200),
    header=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"GIF89a"]),
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_an_image_or_an_image_error(data, header):
    with contextlib.suppress(ImageError):
        assert open_image(header + data).mode == "RGB"


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_a_damaged_byte_gives_an_image_or_an_image_error(position, value):
    data = bytearray(encode(gradient(), "PNG"))
    data[position % len(data)] = value
    with contextlib.suppress(ImageError):
        assert open_image(bytes(data)).mode == "RGB"


def test_missing_folder_and_web_address(tmp_path):
    with pytest.raises(ImageError, match=r"no\.png: the file does not exist; check"):
        open_image(str(tmp_path / "no.png"))
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(str(tmp_path))
    with pytest.raises(ImageError, match="download it first"):
        open_image("https://example.org/a.png")


def test_not_an_image_shows_how_it_starts():
    with pytest.raises(ImageError, match=r"starts with b'<html>.*re-save it as PNG or JPEG"):
        open_image(b"<html></html>")


def test_error_survives_the_way_back_from_a_worker():
    error = pickle.loads(pickle.dumps(ImageError("a.jsonl:1", "broken", "save it again")))
    assert str(error) == "a.jsonl:1: broken; save it again"


def test_stored_images():
    features = datasets.Features(
        {"one": datasets.Image(decode=False), "many": datasets.List(datasets.Image(decode=False))}
    )
    cells = [{"bytes": encode(Image.new("RGB", (n, 1))), "path": None} for n in (1, 2, 3)]
    rows = {"one": [cells[0], None], "many": [cells[1:], []]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    assert open_image(StoredImage(dataset, 0, "one")).size == (1, 1)
    assert open_image(StoredImage(dataset, 0, "many", 1)).size == (3, 1)
    with pytest.raises(ImageError, match="row 1, column 'one': no image here"):
        open_image(StoredImage(dataset, 1, "one"))


def test_sha256_is_that_of_the_bytes(tmp_path):
    data = encode(gradient())
    (tmp_path / "a.png").write_bytes(data)
    assert image_sha256(str(tmp_path / "a.png")) == image_sha256(data) == hashlib.sha256(data).hexdigest()
    assert image_sha256(gradient()) == image_sha256(gradient()) != image_sha256(gradient(8))
