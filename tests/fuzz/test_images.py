"""Damaged image files of every format: each is opened whole, or refused with ImageError; sizes agree with pixels."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fuzz.cases import changed_bytes, parts, run, told
from tests.tiny import image, image_processor
from vlm.data.images import ImageError, image_size, open_image

FORMATS = {
    "PNG": ("RGB", "L", "RGBA", "P", "I;16", "1", "LA"), "JPEG": ("RGB", "L", "CMYK"), "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L"), "BMP": ("RGB", "L", "1"), "TIFF": ("RGB", "CMYK", "F", "I;16"), "PPM": ("RGB", "L"),
    "TGA": ("RGB", "RGBA"), "ICO": ("RGBA",), "JPEG2000": ("RGB",), "DIB": ("RGB",),
}  # fmt: skip


def files() -> list[bytes]:
    made = []
    for name, modes in FORMATS.items():
        for mode in modes:
            picture = image(3).resize((33, 20))
            if mode == "I;16":
                picture = Image.fromarray(np.arange(660, dtype=np.uint16).reshape(20, 33) * 90)
            elif mode != "RGB":
                picture = picture.convert("L").convert("F") if mode == "F" else picture.convert(mode)
            for options in ({}, {"exif": _turned()}) if name in ("JPEG", "PNG", "WEBP") else ({},):
                buffer = io.BytesIO()
                picture.save(buffer, name, **options)
                made.append(buffer.getvalue())
    buffer = io.BytesIO()
    image(1).save(buffer, "PNG", save_all=True, append_images=[image(2)])
    return [*made, buffer.getvalue()]


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


@pytest.fixture(scope="module")
def sound() -> list[bytes]:
    return files()


def test_sound_files_open(sound: list[bytes]) -> None:
    for content in sound:
        assert open_image(content).size == image_size(content)[::-1]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what is damaged
@parts(fast=100, slow=5_000)
def test_bytes(numbers: range, sound: list[bytes], tmp_path: Path) -> None:
    path, processor = tmp_path / "damaged image", image_processor()

    def case(draw: random.Random) -> bool:
        content = changed_bytes(draw.choice(sound), draw)
        where = content if draw.randrange(2) else str(path)
        path.write_bytes(content)
        with told(content):
            size = _or_refused(lambda: image_size(where, where="row 7", max_pixels=10**6))
            opened = _or_refused(lambda: open_image(where, where="row 7", max_pixels=10**6))
            if opened is None:
                return False
            assert opened.mode == "RGB"
            assert size == opened.size[::-1]
            pixels = processor(opened, return_tensors="pt")["pixel_values"]
            assert bool(pixels.isfinite().all())
        return True

    opened = run("image", numbers, case)
    assert any(opened)
    assert not all(opened)


def _or_refused(read):
    try:
        return read()
    except ImageError as error:
        said = str(error)
    assert "row 7" in said
    assert len(said) < 2_000
    return None
