"""Images inside a text: base64, as TSV benchmarks have it, and data URIs, as chat APIs do."""

from __future__ import annotations

import base64
import binascii

from vlm.data.readers_text import RowError
from vlm.errors import shown

_SHORTEST = 64
"""Characters: no image is smaller, and few names are longer."""
_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0AK", "AAAA", "/0//UQ")
"""PNG, JPEG, GIF, WebP, BMP, TIFF (two kinds), AVIF and JPEG 2000, JPEG 2000 without a container."""


def inline_image(text: str, key: str) -> bytes | None:
    """Return the encoded image that a text holds, or None if it is something else, such as the name of a file.

    Raises:
        RowError: it is a data URI, or base64 that begins like an image, and cannot be decoded.
    """
    if text[:5].lower() == "data:":
        head, _, body = text.partition(",")
        if not head.lower().endswith(";base64"):
            raise RowError(key, f"a data URI without base64 ({shown(head)}); write the image as base64")
    elif len(text) >= _SHORTEST and text.startswith(_BEGINNINGS) and "." not in text:
        body = text
    else:
        return None
    body = "".join(body.split())
    try:
        return base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(key, f"base64 that cannot be decoded ({error}); write the image again") from None
