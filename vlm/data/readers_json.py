"""JSON and JSON Lines: what cannot be a row is named with its place, and the rows around it are read."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlm.data.example import Problem
from vlm.data.readers_common import SourceError
from vlm.data.readers_text import show

MAX_DEPTH = 200
"""Where a text is nested deeper than Python can read, what is nested deeper than this is cut out."""
_TOO_DEEP = json.dumps({f"nested more than {MAX_DEPTH} levels deep": None})
_MAX_DIGITS = 4000  # Python refuses to read longer numbers, which takes the square of their length
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class RepeatedKey:
    """An object that has a key twice, and so no certain value. It is no row, and no text."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __repr__(self) -> str:
        return f"an object with the key {show(self.key)} twice"


def parse_json(text: str) -> Any:
    """Return the content of a JSON text. Numbers of more than 4,000 digits are strings; an object with a key twice is a
    [`RepeatedKey`]; what is nested too deep is an object that says so.

    Raises:
        json.JSONDecodeError: it is not valid JSON.
    """
    try:
        return _parse(text)
    except RecursionError:
        return _parse(_cut_deep(text))


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except ValueError:  # a number with too many digits
        return json.loads(text, object_pairs_hook=_object, parse_int=_number)


def _object(pairs: list[tuple[str, Any]]) -> Any:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    keys = [key for key, _ in pairs]
    return RepeatedKey(next(key for index, key in enumerate(keys) if key in keys[:index]))


def _number(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MAX_DIGITS else digits


def _cut_deep(text: str) -> str:
    kept, end, depth = [], 0, 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in "[{":
            depth += 1
            if depth == MAX_DEPTH + 1:
                kept += [text[end : match.start()], _TOO_DEEP]
        elif match[0] in "]}":
            if depth == MAX_DEPTH + 1:
                end = match.end()
            depth -= 1
    return "".join([*kept, text[end:]])


def load_json(path: Path) -> Any:
    """Return the content of a JSON file, in UTF-8, UTF-16 or UTF-32; see [`parse_json`].

    Raises:
        SourceError: it cannot be read, or is not valid JSON; the message names file, line and column.
    """
    try:
        return parse_json(file_text(path))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise SourceError(f"{path}: not valid JSON: {error.msg} at {where}") from error


def load_json_list(path: Path, key: str) -> list[Any]:
    """Return the list under a key of a JSON object.

    Raises:
        SourceError: the file holds no such list.
    """
    content = load_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        found = f"an object with {', '.join(map(show, content))}" if isinstance(content, dict) else show(content)
        raise SourceError(f"{path}: expected an object with a list under {key!r}, found {found}")
    return list(content[key])


def read_rows(path: Path, label: str, problems: list[Problem]) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a JSON list or of JSON Lines, whatever the file is called, and where each stands.

    Bad rows go to `problems`.

    Raises:
        SourceError: it cannot be read, or is called `.json` and holds neither.
    """
    start = read_bytes(path, 4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if path.suffix != ".json" and start != b"[":
        return read_json_lines(path, label, problems)
    try:
        content = load_json(path)
    except SourceError as error:
        # Several values in a file are lines of JSON.
        cause = error.__cause__
        several = isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data"
        if several or path.suffix != ".json":
            return read_json_lines(path, label, problems)
        raise
    if not isinstance(content, list):
        raise SourceError(f"{path}: expected a list of rows, or rows on a line each (.jsonl), found {show(content)}")
    rows = []
    for index, row in enumerate(content):
        where = f"{label}:row {index}"
        if isinstance(row, dict):
            rows.append((where, row))
        else:
            problems.append(Problem(where, "", f"expected an object {{...}}, found {show(row)}"))
    return rows


def read_json_lines(path: Path, label: str, problems: list[Problem]) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a JSON Lines file, and where each stands. Bad lines go to `problems`; empty ones are fine.

    Raises:
        SourceError: the file cannot be read.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    garbled = False
    for number, line in enumerate(_lines(path), start=1):
        where = f"{label}:{number}"
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            problems.append(Problem(where, "", f"not valid JSON: {error.msg} at column {error.colno}"))
        except UnicodeDecodeError as error:
            garbled = True
            problems.append(Problem(where, "", f"not UTF-8 text (byte {error.start} of the line); save it as UTF-8"))
        else:
            if isinstance(row, dict):
                rows.append((where, row))
            else:
                problems.append(Problem(where, "", f"expected an object {{...}}, found {show(row)}"))
    if garbled:
        _require_some_utf8(path, _lines(path))
    return rows


def _require_some_utf8(path: Path, lines: Iterable[bytes]) -> None:
    """Raise SourceError if several lines are not UTF-8, and no character outside ASCII is: it is all of another
    encoding. A single such line is a bad row."""
    others: list[int] = []
    for number, line in enumerate(lines, start=1):
        if line.isascii():
            continue
        try:
            line.decode()
        except UnicodeDecodeError:
            others.append(number)
        else:
            if line.strip(codecs.BOM_UTF8):
                return
    if len(others) > 1:
        raise SourceError(
            f"{path}: not UTF-8 text ({len(others):,} lines with characters in another encoding, the first is line "
            f"{others[0]}); save the file as UTF-8"
        )


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file as UTF-8, without their ends: `\\n`, `\\r\\n` or `\\r`."""
    encoding = json.detect_encoding(read_bytes(path, 4))
    if not encoding.startswith("utf-8"):
        yield from (line.encode(errors="surrogatepass") for line in file_text(path).splitlines())
        return
    with path.open("rb") as file:
        for line in file:
            yield from line.removesuffix(b"\n").removesuffix(b"\r").split(b"\r")


def read_bytes(path: Path, count: int = -1) -> bytes:
    """Return the first `count` bytes of a file, by default all.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from error


def file_text(path: Path, errors: str = "strict") -> str:
    """Return the text of a file in UTF-8, UTF-16 or UTF-32. `errors` are those of `bytes.decode`. They are for single
    lines: a file that is all in another encoding is refused.

    Raises:
        SourceError: it cannot be read, or is no such text.
    """
    content = read_bytes(path)
    encoding = json.detect_encoding(content)
    if errors != "strict" and encoding.startswith("utf-8"):
        _require_some_utf8(path, content.splitlines())
    try:
        return content.decode("utf-8-sig" if encoding.startswith("utf-8") else encoding, errors)
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not {encoding.upper()} text (byte {error.start}); save it as UTF-8") from error
