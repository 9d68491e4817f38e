"""Images as bytes, for tests."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width: int = 7, height: int = 5) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 30, y * 40, x + y], axis=-1).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims any size."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (ihdr, data)
    )
    return b"\x89PNG\r\n\x1a\n" + chunks
