"""Finding images, and opening them from anywhere as plain RGB, within bounds, or saying what is wrong with them."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from vlm.data.example import ImageSource, StoredImage
from vlm.errors import UserError

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte of RGB
MAX_BYTES = 256 * 2**20

# Only raster formats decoded by Pillow itself: opening an EPS file would start Ghostscript on the user's data.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2"}
"""What a file in a folder is called if it is an image."""

CHUNK = 64
CHUNK_PIXELS = 2**26  # 192 MB of RGB

_T = TypeVar("_T")


class ImageError(UserError):
    """An image that cannot be used: where it is, why, and what to do about it."""

    def __init__(self, where: str, why: str, fix: str) -> None:
        super().__init__(where, why, fix)  # all three in args, so that it survives the way back from a worker process
        self.where, self.why, self.fix = where, why, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.why}; {self.fix}"


def find_images(patterns: Sequence[str]) -> list[str]:
    """Return the files that `patterns` name, each once: files, folders (with what is in their folders), and globs.

    Raises UserError for a pattern that finds nothing.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            files = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        elif path.exists():  # before the glob: `photo[1].jpg` may be a file of that name
            files = [str(path)]
        else:
            files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not files:
            what = "has no images in it" if path.is_dir() else "is no file or folder, and no file matches it"
            raise UserError(f"{pattern} {what}")
        found |= dict.fromkeys(files)
    return list(found)


def open_image(
    source: ImageSource, *, where: str = "", max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> Image.Image:
    """Open an image as RGB: upright by its EXIF tag, alpha composited on white, 16 bits scaled to 8, first frame.

    Args:
        source: a path, encoded bytes, an image in memory or a place in a data set.
        where: the row that names the image, put before the image's own name in errors.
        max_pixels: the largest width x height; checked on the header, before any pixel is decoded.
        max_bytes: the largest file; checked before it is read.

    Raises:
        ImageError: the image is missing, empty, too large, truncated, or not an image.
    """
    name = _name(source, where)
    image = _undecoded(source, name, max_bytes)
    width, height = image.size
    if width * height > max_pixels:
        why = f"{width} x {height} is {width * height:,} pixels, more than the {max_pixels:,} allowed"
        raise ImageError(name, why, "resize it before training")
    if width * height == 0:
        raise ImageError(name, f"an image of {width} x {height} has no pixels", "remove it or save it again")
    try:
        image.load()
    except Exception as error:  # as above: decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError ...
        raise ImageError(name, f"truncated or damaged ({error})", "download or save it again") from error
    return _to_rgb(_upright(image), name)


def image_size(source: ImageSource, *, where: str = "", max_bytes: int = MAX_BYTES) -> tuple[int, int]:
    """`(height, width)` of what `open_image` would give, from the header; no pixel is decoded.

    Raises:
        ImageError: the image is missing, empty or too large, or not an image.
    """
    image = _undecoded(source, _name(source, where), max_bytes)
    return (image.width, image.height) if _orientation(image) in _ON_ITS_SIDE else (image.height, image.width)


def _undecoded(source: ImageSource, name: str, max_bytes: int) -> Image.Image:
    """An image whose header has been read."""
    payload = _fetch(source, name)
    if isinstance(payload, Image.Image):
        return payload
    data = _read(payload, name, max_bytes)
    try:
        Image.init()
        return Image.open(BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"too many pixels ({error})", "resize it before training") from error
    except Exception as error:  # Pillow's plugins raise a dozen different types on broken headers
        why = f"not an image that can be read ({len(data)} bytes, starts with {data[:8]!r})"
        raise ImageError(name, why, f"re-save it as PNG or JPEG; formats read: {', '.join(FORMATS)}") from error


def chunks(groups: Iterable[tuple[_T, list[Image.Image]]]) -> Iterator[list[tuple[_T, list[Image.Image]]]]:
    """Opened images, each list with what it belongs to, in chunks: enough to fill batches, few enough to be held in
    memory. A chunk has up to `CHUNK` groups and `CHUNK_PIXELS` pixels, or one group that has more."""
    chunk: list[tuple[_T, list[Image.Image]]] = []
    held = 0
    for group in groups:
        pixels = sum(image.width * image.height for image in group[1])
        if chunk and (len(chunk) == CHUNK or held + pixels > CHUNK_PIXELS):
            yield chunk
            chunk, held = [], 0
        chunk.append(group)
        held += pixels
    if chunk:
        yield chunk


def image_sha256(source: ImageSource, *, where: str = "", max_bytes: int = MAX_BYTES) -> str:
    """The SHA-256 (hex) of the encoded image; of size, mode and pixels for an image in memory. Nothing is decoded.

    Raises:
        ImageError: the image is missing, empty or too large.
    """
    name = _name(source, where)
    payload = _fetch(source, name)
    if isinstance(payload, Image.Image):
        digest = hashlib.sha256(f"{payload.mode} {payload.size}".encode())
        digest.update(payload.tobytes())
        return digest.hexdigest()
    return hashlib.sha256(_read(payload, name, max_bytes)).hexdigest()


def _name(source: ImageSource, where: str) -> str:
    if isinstance(source, str):
        own = source
    elif isinstance(source, StoredImage):
        own = f"column {source.column!r}" if source.index is None else f"column {source.column!r}, image {source.index}"
        own = own if where else f"row {source.row}, {own}"
    else:
        own = f"image of {len(source):,} bytes" if isinstance(source, bytes) else "image in memory"
    return f"{where}: {own}" if where else own


def _fetch(source: ImageSource, name: str) -> str | bytes | Image.Image:
    payload = source.fetch() if isinstance(source, StoredImage) else source
    if isinstance(payload, str | bytes | Image.Image):
        return payload
    if isinstance(payload, os.PathLike):
        return os.fspath(payload)
    why = "no image here" if payload is None else f"not an image but {type(payload).__name__}"
    raise ImageError(name, why, "give a path, encoded bytes or an image")


def _read(payload: str | bytes, name: str, max_bytes: int) -> bytes:
    if isinstance(payload, str):
        if payload.startswith(("http://", "https://")):
            raise ImageError(name, "a web address, and data is never fetched while training", "download it first")
        path = Path(payload)
        if not path.exists():
            raise ImageError(name, "the file does not exist", "check the folder and the name")
        if not path.is_file():  # a folder, or a device that never ends
            raise ImageError(name, "not a regular file", "check the folder and the name")
        size = path.stat().st_size
    else:
        size = len(payload)
    if size > max_bytes:
        raise ImageError(name, f"{size:,} bytes, more than the {max_bytes:,} allowed", "re-save it smaller")
    if size == 0:
        raise ImageError(name, "the image has zero bytes", "download or save it again")
    if isinstance(payload, bytes):
        return payload
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(name, f"cannot be read ({error.strerror})", "check the file and its permissions") from error


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # a damaged EXIF block says nothing about the pixels; viewers show such an image unrotated too
        return None


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _wide_to_rgb(image, name)
    try:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, rgba).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(name, f"mode {image.mode} has no way to RGB", "re-save it as PNG or JPEG") from error


def _wide_to_rgb(image: Image.Image, name: str) -> Image.Image:
    """16-bit, 32-bit and float grey to RGB by their full range. Pillow's own `convert` clips them at 255: all white."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not (low >= 0 and high <= 255):  # also catches NaN
            why = f"floating-point pixels from {low:g} to {high:g}; 0 to 1 or 0 to 255 is understood"
            raise ImageError(name, why, "scale it and re-save it with 8 bits")
        scaled = values * 255 if high <= 1 else values
    else:
        if not (low >= 0 and high <= 65535):
            why = f"integer pixels from {low:g} to {high:g}; 0 to 65535 is understood"
            raise ImageError(name, why, "scale it and re-save it with 8 or 16 bits")
        scaled = values / 257  # 65535 = 255 * 257
        if isinstance(transparent := image.info.get("transparency"), int):
            scaled[values == transparent] = 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")
