"""Opening images from anywhere as plain RGB, within bounds, or saying what is wrong with them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from typing import TypeVar

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from vlm.data.example import ImageSource, StoredImage
from vlm.data.rgb import to_rgb
from vlm.errors import UserError, cut
from vlm.printing import printable_name

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a gigabyte of RGB
MAX_BYTES = 256 * 2**20
MAX_ASPECT_RATIO = 200
"""The longest side over the shortest. An image processor that brings the shortest side to the encoder's size makes the
longest that many times as long; those of Qwen refuse more. With `MAX_PIXELS` it bounds a side to 133,776 pixels."""

MAX_SCANS = 100
"""Passes over the pixels of a JPEG file. One of a few bytes takes as long as any. Encoders write about ten."""

# Only raster formats decoded by Pillow itself: opening an EPS file would start Ghostscript on the user's data.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")

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
_PNG_START = b"\x89PNG\r\n\x1a\n"
_ICON = b"\0\0\1\0"
_SCAN = b"\xff\xda"
_PNG_TEXT = (b"eXIf", b"iTXt", b"zTXt", b"tEXt")

_LONGEST_NAME = 300  # in messages: what is given as a name may be anything

LFS_POINTER = b"version https://git-lfs"
WHY_LFS = "a pointer of Git LFS in place of the file; get the file with `git lfs pull`"

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


class RefusedImages(UserError):  # noqa: N818 - named for what it says
    """Images that open, and that the model's image processor refuses.

    Attributes:
        reasons: the reason of each, by the identity of the image.
        images: the images, which keeps their identities theirs.
    """

    def __init__(self, refused: Sequence[tuple[Image.Image, str]]) -> None:
        super().__init__("; ".join(dict.fromkeys(why for _, why in refused)))
        self.images = [image for image, _ in refused]
        self.reasons = {id(image): why for image, why in refused}

    def of(self, image: Image.Image, source: ImageSource, where: str = "") -> ImageError | None:
        """The error of one image, named by its source; None if it was not refused."""
        return self.error_of(image, source, where) if id(image) in self.reasons else None

    def error_of(self, image: Image.Image, source: ImageSource, where: str = "") -> ImageError:
        """The error of an image that was refused."""
        return ImageError(_name(source, where), self.reasons[id(image)], "resize it, or crop it")


def open_image(
    source: ImageSource,
    *,
    where: str = "",
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    sha256: str | None = None,
) -> Image.Image:
    """Open an image as RGB: upright by its EXIF tag, alpha composited on white, 16 bits scaled to 8, first frame.

    Args:
        source: a path, encoded bytes, an image in memory or a place in a data set.
        where: the row that names the image, put before the image's own name in errors.
        max_pixels: the largest width x height; checked on the header, before any pixel is decoded.
        max_bytes: the largest file; checked before it is read.
        sha256: what `image_sha256` gave.

    Raises:
        ImageError: the image is missing, empty, too large, too thin (`MAX_ASPECT_RATIO`), truncated, not an image, or
            has another `sha256`.
    """
    name = _name(source, where)
    image = _undecoded(source, name, max_pixels, max_bytes, sha256)
    _load(image, name)
    _require_bounds(image, name, max_pixels)
    orientation = _orientation(image)
    try:
        rgb = to_rgb(image)
    except ValueError as error:
        raise ImageError(name, str(error), "re-save it with 8 bits, as PNG or JPEG") from error
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def image_size(
    source: ImageSource, *, where: str = "", max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES
) -> tuple[int, int]:
    """`(height, width)` of what `open_image` would give, from the header; no pixel is decoded, unless a PNG says after
    its pixels how it is turned.

    Raises:
        ImageError: the image is missing, empty, too large or too thin, or not an image.
    """
    name = _name(source, where)
    image = _undecoded(source, name, max_pixels, max_bytes)
    on_its_side = _header_orientation(image) in _ON_ITS_SIDE
    return (image.width, image.height) if on_its_side else (image.height, image.width)


def _undecoded(
    source: ImageSource, name: str, max_pixels: int, max_bytes: int, sha256: str | None = None
) -> Image.Image:
    """An image whose header has been read, and is within bounds."""
    payload = _fetch(source, name)
    if isinstance(payload, Image.Image):
        _require_bounds(payload, name, max_pixels)
        return payload
    data = _read(payload, name, max_bytes)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise ImageError(name, "the image has changed since it was first read", "do not change images while in use")
    if data.startswith(_ICON) and (pixels := _icon_pixels(data)) > max_pixels:  # Pillow decodes it when it opens it
        raise ImageError(name, f"an icon of {pixels:,} pixels, more than the {max_pixels:,} allowed", "save it again")
    try:
        Image.init()
        image = Image.open(BytesIO(data), formats=[f for f in FORMATS if f in Image.OPEN])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"too many pixels ({error})", "resize it before training") from error
    except Exception as error:  # Pillow's plugins raise a dozen different types on broken headers
        if data.startswith(LFS_POINTER):
            raise ImageError(name, *WHY_LFS.split("; ")) from error
        why = f"not an image that can be read ({len(data)} bytes, starts with {data[:8]!r})"
        raise ImageError(name, why, f"re-save it as PNG or JPEG; formats read: {', '.join(FORMATS)}") from error
    _require_bounds(image, name, max_pixels)
    if isinstance(image, JpegImageFile) and (scans := data.count(_SCAN)) > MAX_SCANS:
        raise ImageError(name, f"a JPEG file of {scans:,} scans, more than the {MAX_SCANS} allowed", "save it again")
    return image


def _icon_pixels(data: bytes) -> int:
    """The pixels of the largest image in an icon file. Each says its size itself, whatever the list of them says."""
    largest = 0
    for entry in range(6, 6 + 16 * int.from_bytes(data[4:6], "little"), 16):
        start = int.from_bytes(data[entry + 12 : entry + 16], "little")
        is_png = data[start : start + 8] == _PNG_START
        at, order = (start + 16, "big") if is_png else (start + 4, "little")
        sides = [int.from_bytes(data[at + side : at + side + 4], order, signed=not is_png) for side in (0, 4)]  # type: ignore[arg-type]
        largest = max(largest, abs(math.prod(sides)))
    return largest


def _require_bounds(image: Image.Image, name: str, max_pixels: int) -> None:
    """Raise ImageError for an image that would take too much memory: decoded, or resized by its shortest side."""
    width, height = image.size
    # The tiles of a TIFF are decoded whole, and may be larger than it is.
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    sides = [tags.get(side, 0) for side in (TILEWIDTH, TILELENGTH)]
    tile = math.prod(sides) if all(isinstance(side, int) for side in sides) else 0
    if not width * height:
        raise ImageError(name, f"an image of {width} x {height} has no pixels", "remove it or save it again")
    if width * height > max_pixels:
        why = f"{width} x {height} is {width * height:,} pixels, more than the {max_pixels:,} allowed"
        raise ImageError(name, why, "resize it before training")
    if tile > max_pixels:
        raise ImageError(name, f"its tiles have {tile:,} pixels, more than the {max_pixels:,} allowed", "save it again")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        why = f"{width} x {height} is thinner than the {MAX_ASPECT_RATIO}:1 allowed"
        raise ImageError(name, why, "crop it or cut it into pieces")


def _load(image: Image.Image, name: str) -> None:
    try:
        image.load()
    except MemoryError as error:
        raise ImageError(name, f"no memory for {image.width} x {image.height} pixels", "resize it") from error
    except Exception as error:  # as above: decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError ...
        raise ImageError(name, f"truncated or damaged ({error})", "download or save it again") from error


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
        own = printable_name(source if len(source) <= _LONGEST_NAME else f"{source[:_LONGEST_NAME]}...")
    elif isinstance(source, StoredImage):
        own = f"column {source.column!r}" if source.index is None else f"column {source.column!r}, image {source.index}"
        own = own if where else f"row {source.row}, {own}"
    else:
        own = f"image of {len(source):,} bytes" if isinstance(source, bytes) else "image in memory"
    return f"{where}: {own}" if where else own


def _fetch(source: ImageSource, name: str) -> str | bytes | Image.Image:
    try:
        payload = source.fetch() if isinstance(source, StoredImage) else source
    except (LookupError, OSError, StopIteration, TypeError, ValueError) as error:
        why = f"its row cannot be read again ({cut(str(error), 200)})"
        raise ImageError(name, why, "do not change the file while it is in use") from error
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
        if not os.path.exists(payload):  # also what is too long for a name
            raise ImageError(name, "the file does not exist", "check the folder and the name")
        if not os.path.isfile(payload):  # a folder, or a device that never ends
            raise ImageError(name, "not a regular file", "check the folder and the name")
        size = os.path.getsize(payload)
    else:
        size = len(payload)
    if size > max_bytes:
        raise ImageError(name, f"{size:,} bytes, more than the {max_bytes:,} allowed", "re-save it smaller")
    if size == 0:
        raise ImageError(name, "the image has zero bytes", "download or save it again")
    if isinstance(payload, bytes):
        return payload
    try:
        with open(payload, "rb") as file:
            return file.read()
    except OSError as error:
        raise ImageError(name, f"cannot be read ({error.strerror})", "check the file and its permissions") from error


def _orientation(image: Image.Image) -> int | None:
    """How a decoded image is turned, by its EXIF or XMP data."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a damaged EXIF block says nothing about the pixels; viewers show such an image unrotated too
        return None


def _header_orientation(image: Image.Image) -> int | None:
    """How an image that is not decoded yet will be turned."""
    if isinstance(image, TiffImageFile) and image.tag_v2.get(ExifTags.Base.Orientation) in _ON_ITS_SIDE:
        return None  # Pillow decodes a TIFF upright, and gives the size that it has then
    if isinstance(image, PngImageFile) and isinstance(image.fp, BytesIO) and not _tells_after_pixels(image.fp):
        try:
            return Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # that of a PNG decodes it first
        except Exception:  # as in `_orientation`
            return None
    return _orientation(image)


def _tells_after_pixels(file: BytesIO) -> bool:
    """Whether a PNG has EXIF data or text after its pixels."""
    data, at, pixels = file.getbuffer(), 8, False
    while at + 8 <= len(data):
        kind = bytes(data[at + 4 : at + 8])
        if pixels and kind in _PNG_TEXT:
            return True
        pixels |= kind == b"IDAT"
        at += 12 + int.from_bytes(data[at : at + 4])
    return False
