"""Text from data for a terminal or a page: a file name or a caption must not control either.

A terminal acts on control characters (they clear it, recolour it, set its title), and bidirectional overrides show a
text in another order than it has ("Trojan Source", https://trojansource.codes).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from rich.console import Console
from rich.segment import Segment

from vlm.errors import UserError

# C0 and C1 without tab and line feed; line and paragraph separators; bidirectional embeddings, overrides and isolates;
# surrogates, which no encoding has. Marks and joiners stay: Arabic, Persian and emoji need them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_IN_NAME = re.compile(f"{_UNSAFE.pattern}|[\t\n]")


def printable(text: str) -> str:
    r"""`text` with unsafe characters written out (`\x1b`); a byte of a file name that is not UTF-8 too (`\xe9`)."""
    return _UNSAFE.sub(_written_out, text.replace("\r\n", "\n"))


def printable_name(name: str) -> str:
    """The same for a file name, which is on one line."""
    return _UNSAFE_IN_NAME.sub(_written_out, name)


def valid_unicode(text: str) -> str:
    """`text` from a terminal or a command line, as tokenizers take it: bytes that are not UTF-8, and halves of
    surrogate pairs, become U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def html_text(text: str) -> str:
    """`text` for an HTML page: escaped, unsafe characters written out."""
    return escape(printable(text))


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON that can be encoded as UTF-8, in readable characters. Half of a surrogate pair, which stands for
    a byte of a file name that is not UTF-8, becomes an escape (`\\udce9`): read back, the name is the same. A number
    that is NaN or infinite, which JSON does not have, becomes null."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, **options)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, **options)
    return text.encode("utf-8", "backslashreplace").decode()


def _finite(value: Any) -> Any:
    """Return plain values with None for every number that is NaN or infinite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_unicode(text: str, what: str) -> None:
    """Raise UserError if a tokenizer cannot take a text: it has half of a surrogate pair, or a byte from the command
    line that is not UTF-8. `what` is called so in the message."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = printable(text[error.start])
        raise UserError(f"{what}: character {error.start} is no Unicode ({found}); write it as UTF-8") from None


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    # Python decodes a byte of a file name that is not UTF-8 as U+DC00 plus the byte (PEP 383).
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else match[0].encode("unicode_escape").decode()


class SafeConsole(Console):
    """A console on which only rich itself uses control characters, whatever text is printed."""

    def render(self, *args: Any, **kwargs: Any) -> Iterable[Segment]:
        for segment in super().render(*args, **kwargs):
            is_safe = segment.control or not _UNSAFE.search(segment.text)
            yield segment if is_safe else Segment(printable(segment.text), segment.style)
