"""Values of a row as text and as ids, and what is wrong with them. Every text of every reader passes through here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from vlm.errors import closest, shown

IMAGE_PLACEHOLDER = "<image>"
NO_IMAGE_IN_ANSWER = "an answer contains an image; images are only allowed in questions"
CONTENT_KEYS = ("caption", "captions", "question", "qa", "messages", "conversations", "completion")
"""What a row may have to answer."""
_ID = re.compile("(id|ids|idx|index)[0-9]*$")
_EXACT = 2**53  # up to here a float holds every integer


class RowError(ValueError):
    """One branch of a row is bad: which key, and why."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(key, why)
        self.key, self.why = key, why


def is_null(value: Any) -> bool:
    """Whether there is no value: null, or the NaN that tables have in empty cells."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any) -> str | None:
    """Return a value as text, or None if it is none (null, NaN, a list, an object, bytes).

    Numbers and booleans are written as in JSON, whole numbers without a fraction (2.0 is `2`, since tables store
    columns with empty cells as fractions). Dates are written as in ISO 8601, without a time at midnight.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() and abs(value) < _EXACT else repr(value)
    if isinstance(value, Decimal):
        return format(value, "f") if value.is_finite() else None
    if isinstance(value, datetime):
        at_midnight = value.time() == time() and value.tzinfo is None
        return value.date().isoformat() if at_midnight else value.isoformat(sep=" ")
    return value.isoformat() if isinstance(value, date | time) else None


def whole(text: str, key: str) -> str:
    """Return `text` if it can be written as UTF-8.

    Raises:
        RowError: it holds a lone surrogate: half of an emoji, which JSON can say (`"\\ud83d"`) and UTF-8 cannot.
    """
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # so Python decodes a byte that is not UTF-8 (PEP 383)
            why = f"not UTF-8 text (byte 0x{code - 0xDC00:02x}, or \\u{code:04x}, in place of character {error.start})"
        else:
            why = f"half of a character (\\u{code:04x}, in place of character {error.start})"
        raise RowError(key, f"{why}; write the text again") from None
    return text


def required_text(item: Mapping[str, Any], key: str, *, allow_empty: bool = False, as_key: str | None = None) -> str:
    """Return the text under a key, without white space around it; see [`as_text`] for numbers and dates.

    `as_key` is what the key is called in messages.

    Raises:
        RowError: it is missing, no text, empty, or not to be written as UTF-8.
    """
    named = as_key or key
    if is_null(item.get(key)):
        raise RowError(named, f"missing{near_miss(key, [k for k in item if k != key])}")
    value = item[key]
    text = as_text(value)
    if text is None:
        hint = f"; a list goes under '{key}s'" if isinstance(value, list) and key in ("caption", "answer") else ""
        raise RowError(named, f"expected text, found {shown(value)}{hint}")
    if not text.strip() and not allow_empty:
        raise RowError(named, "empty")
    return whole(text, named).strip()


def answer_text(item: Mapping[str, Any], key: str) -> str:
    """[`required_text`] of what is to be answered, in which no image can stand."""
    text = required_text(item, key)
    if IMAGE_PLACEHOLDER in text:
        raise RowError(key, NO_IMAGE_IN_ANSWER)
    return text


def answer_texts(answers: Any) -> tuple[str, ...]:
    """Return acceptable answers, given as texts or in VQAv2's form `{"answer": ...}`.

    Raises:
        RowError: not a list, empty, or holding something else.
    """
    if not isinstance(answers, list) or not answers:
        raise RowError("answers", f"expected a list that is not empty, found {shown(answers)}")
    texts = []
    for index, answer in enumerate(answers):
        key = f"answers[{index}]"
        text = as_text(answer.get("answer") if isinstance(answer, dict) else answer)
        if text is None:
            raise RowError(key, f"expected text, found {shown(answer)}")
        texts.append(whole(text, key).strip())
    return tuple(texts)


def id_text(value: Any, key: str) -> str | None:
    """Return an id as text, None where there is none: null, NaN or empty. 1, 1.0 and "1" are the same id.

    Raises:
        RowError: it is no text and no number.
    """
    if is_null(value):
        return None
    text = None if isinstance(value, bool) else as_text(value)
    if text is None:
        raise RowError(key, f"an id is text or a number, found {shown(value)}")
    return whole(text, key).strip() or None


def required_id(row: Mapping[str, Any], key: str) -> str:
    """Return the [`id_text`] under a key.

    Raises:
        RowError: there is none, or it is no text and no number.
    """
    text = id_text(row.get(key), key)
    if text is None:
        raise RowError(key, f"expected an id (text or a number), found {shown(row.get(key))}")
    return text


def file_names(value: Any, key: str, expected: str) -> list[str]:
    """Return the names of images: of a list, or of one name.

    Raises:
        RowError: it is something else, with what is `expected`; or a name that is empty, or not to be written as UTF-8.
    """
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise RowError(key, f"{expected}, found {shown(name)}")
        whole(name, key)
    return names


def near_miss(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `, did you mean 'x'?` for the known word that this one nearly is; empty where there is none."""
    close = closest(word, known, cutoff)
    return f", did you mean {close!r}?" if close else ""


def unknown_near_miss(row: Mapping[str, Any], known: Sequence[str]) -> tuple[str, str] | None:
    """Return a key that is nearly a known one, and why it is bad. Others are columns of other people, and so are those
    of a row with something to answer that are words of their own (`prompts`) or ids (`image_idx`)."""
    unknown = [key for key in row if key not in known]
    if not unknown:
        return None
    several = {key if key.endswith("s") else f"{key}s" for key in row if key in known}
    missing = [key for key in known if key not in row and (key if key.endswith("s") else f"{key}s") not in several]
    answered = any(key in row for key in CONTENT_KEYS)
    for key in unknown:
        if answered and _ID.search(key):
            continue
        meant = closest(key, missing, 0.85)
        if meant and not (answered and (key.startswith(meant) or meant.startswith(key))):
            return key, f"unknown key, did you mean {meant!r}?"
    return None
