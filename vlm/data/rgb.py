"""Any mode of Pillow to RGB in 8 bits, in strips: beside the image itself only the result takes memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

STRIP_PIXELS = 2**18
MIN_FLOAT_WHITE = 16
"""Floating-point pixels from 0 to 255 reach at least this value. A maximum between 1 and this is ambiguous."""


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in RGB: alpha composited on white, grey of more than 8 bits scaled as `_scale` says.

    Raises ValueError, in words, for pixels out of range and for a mode that has no way to RGB.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if _is_wide(image):
        scale, white = _scale(image), 0 if _is_negative(image) else 255
        return _in_strips(image, lambda strip: _wide_to_rgb(strip, scale, white))
    try:
        return _in_strips(image, _on_white if image.has_transparency_data else lambda strip: strip.convert("RGB"))
    except ValueError as error:
        raise ValueError(f"mode {image.mode} has no way to RGB") from error


def _is_wide(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in strips of whole rows, each with its first row."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


def _on_white(strip: Image.Image) -> Image.Image:
    rgba = strip.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")


def _scale(image: Image.Image) -> float:
    """What brings the values of a wide mode to 0 to 255. Pillow's own `convert` clips them at 255: all white.

    32-bit integers have no common white. Up to 255 they are taken as 8 bits that were stored as integers, as Pillow
    takes them, above as 16 bits. A PPM says what white is, and Pillow has scaled that to 65535.
    """
    strips = (np.asarray(strip) for _, strip in _strips(image))
    ranges = [(float(values.min()), float(values.max())) for values in strips]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if image.mode == "F":
        # Each strip on its own, since `min` and `max` pass NaN over.
        if not all(low >= 0 and high <= 255 for low, high in ranges):
            raise ValueError(f"floating-point pixels from {low:g} to {high:g}; 0 to 1 or 0 to 255 is understood")
        if 1 < high < MIN_FLOAT_WHITE:
            raise ValueError(
                f"floating-point pixels up to {high:g}: unclear whether white is 1 or 255; "
                f"the maximum must be at most 1, or from {MIN_FLOAT_WHITE} to 255"
            )
        return 255.0 if high <= 1 else 1.0
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"integer pixels from {low:g} to {high:g}; 0 to 65535 is understood")
    if isinstance(image, TiffImageFile) and image.tag_v2.get(BITSPERSAMPLE) == (12,):
        return 255 / 4095
    if image.mode == "I" and image.format != "PPM" and high <= 255:
        return 1.0
    return 1 / 257  # 65535 = 255 * 257


def _is_negative(image: Image.Image) -> bool:
    """Whether 0 is white, which Pillow heeds in 8 bits only."""
    return isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0


def _wide_to_rgb(strip: Image.Image, scale: float, white: int) -> Image.Image:
    values = np.asarray(strip)
    scaled = np.rint(values.astype(np.float64) * scale).astype(np.uint8)
    if strip.mode != "F" and isinstance(transparent := strip.info.get("transparency"), int):
        scaled[values == transparent] = white
    return Image.fromarray(scaled if white else 255 - scaled).convert("RGB")
