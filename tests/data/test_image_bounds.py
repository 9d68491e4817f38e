"""Bounds on images: pixels, sides, bytes, scans, and the memory that opening one takes."""

import struct
import subprocess
import sys
import zlib

import pytest
from PIL import Image

from tests.data.image_bytes import encode, gradient, png_header
from vlm.data.images import ImageError, chunks, image_size, open_image


@pytest.mark.parametrize("size", [(1, 201), (30_000_000, 1)])
def test_what_is_thinner_is_refused_by_its_header(size):
    for source in (png_header(*size), Image.new("L", size)):
        for opened in (open_image, image_size):
            with pytest.raises(ImageError, match="thinner than the 200:1 allowed; crop it"):
                opened(source)


def test_tiles_of_a_tiff_are_bounded_too():
    data = encode(Image.new("L", (16, 16)), "TIFF", tiffinfo={65_000: 30_000, 65_001: 30_000})
    for other, tag in ((65_000, 322), (65_001, 323)):  # Pillow writes no tiles
        data = data.replace(struct.pack("<HHI", other, 3, 1), struct.pack("<HHI", tag, 3, 1))
    for opened in (open_image, image_size):
        with pytest.raises(ImageError, match="its tiles have 900,000,000 pixels"):
            opened(data)


_PEAK = """
import io, resource, sys
from PIL import Image
from vlm.data.images import open_image
buffer = io.BytesIO()
Image.new("L", (1, 1)).save(buffer, "PNG")
open_image(buffer.getvalue())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert open_image(sys.argv[1]).mode == "RGB"
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "I;16", "I", "F", "CMYK", "1"])
def test_no_mode_takes_much_more_memory_than_its_pixels(mode, tmp_path):
    side = 6000
    image = Image.new(mode, (side, side))
    if mode == "P":
        image.info["transparency"] = 0
    path = tmp_path / ("a.tif" if mode in ("F", "CMYK", "I") else "a.png")
    image.save(path, compression="tiff_deflate") if path.suffix == ".tif" else image.save(path)
    done = subprocess.run([sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True)
    decoded = {"1": 1, "P": 1, "LA": 4, "I;16": 2, "RGB": 4}.get(mode, 4)  # bytes of a pixel; Pillow pads RGB to 4
    result = 0 if mode == "RGB" else 4
    assert int(done.stdout) < 1.15 * (decoded + result) * side**2 + 30e6


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_bomb_is_refused_before_decoding(width, height):
    with pytest.raises(ImageError, match=r"too many pixels|more than the .* allowed"):
        open_image(png_header(width, height))


def test_an_icon_is_as_large_as_what_is_in_it():
    """Its list of images says 16 x 16, the PNG in it another size; and the same with a bitmap."""
    bitmap = struct.pack("<IiiHHIIiiII", 40, 9459, -20000, 1, 32, 0, 0, 0, 0, 0, 0)
    for inside in (png_header(9459, 9460), bitmap):
        icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inside), 22) + inside
        for read in (open_image, image_size):
            with pytest.raises(ImageError, match=r"an icon of .* pixels, more than the 89,478,485 allowed"):
                read(icon)


def test_scans_of_a_jpeg_are_bounded():
    """Each scan of a few bytes passes over all of the image."""
    whole = encode(Image.new("L", (64, 64)), "JPEG", progressive=True)
    assert open_image(whole).size == (64, 64)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    assert open_image(whole[:-2] + 50 * last + whole[-2:]).size == (64, 64)
    with pytest.raises(ImageError, match=r"a JPEG file of .* scans, more than the 100 allowed"):
        open_image(whole[:-2] + 100 * last + whole[-2:])


def compressed(kind: bytes, start: bytes) -> bytes:
    """A PNG with a chunk of 300 MB of zeros, compressed to 0.3 MB."""
    squeeze = zlib.compressobj(9)
    content = kind + start + b"".join(squeeze.compress(bytes(2**20)) for _ in range(300)) + squeeze.flush()
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    return encode(gradient())[:33] + chunk + encode(gradient())[33:]


BOMBS = {
    "profile": lambda: compressed(b"iCCP", b"x\0\0"),
    "text": lambda: compressed(b"zTXt", b"x\0\0"),
    "unicode": lambda: compressed(b"iTXt", b"x\0\1\0\0\0"),
    "frames": lambda: encode(
        Image.new("P", (900, 900)),
        "GIF",
        save_all=True,
        append_images=[Image.new("P", (900, 900), n) for n in range(99)],
    ),
    "pages": lambda: encode(
        Image.new("L", (900, 900)),
        "TIFF",
        save_all=True,
        append_images=[Image.new("L", (900, 900), n) for n in range(99)],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_what_comes_with_the_pixels_takes_little_memory(name, tmp_path):
    """Chunks of text and colour profiles, and all frames but the first."""
    (tmp_path / "bomb").write_bytes(BOMBS[name]())
    script = (
        "import sys, contextlib; from vlm.data.images import *; from vlm.training.memory import _of_process\n"
        "data = open(sys.argv[1], 'rb').read(); before = _of_process('VmRSS')\n"
        "for read in (image_size, open_image):\n"
        "    with contextlib.suppress(ImageError): read(data)\n"
        "print(_of_process('VmHWM') - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "bomb")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 50e6, "as large as the file, and a few small buffers"


def test_limits_can_be_set():
    data = encode(gradient())
    with pytest.raises(ImageError, match=r"7 x 5 is 35 pixels, more than the 34 allowed; resize"):
        open_image(data, max_pixels=34)
    with pytest.raises(ImageError, match=r"bytes, more than the 10 allowed"):
        open_image(data, max_bytes=10)


def test_chunks_are_bounded_by_number_and_by_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.data.images.CHUNK", 3)
    monkeypatch.setattr("vlm.data.images.CHUNK_PIXELS", 100)
    sizes = [(5, 5), (5, 5), (5, 5), (5, 5), (9, 9), (5, 5), (20, 20), (1, 1)]
    opened = []

    def groups():
        for number, size in enumerate(sizes):
            opened.append(number)
            yield number, [Image.new("RGB", size)]

    found = []
    for chunk in chunks(groups()):
        found.append([number for number, _ in chunk])
        assert len(opened) <= found[-1][-1] + 2, "no more is opened than the next one"
    assert found == [[0, 1, 2], [3], [4], [5], [6], [7]]
    assert list(chunks([])) == []
