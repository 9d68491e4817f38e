"""JSON and JSON Lines: what cannot be a row is named with its place, and the rows around it are read."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from vlm.data.example import Problem
from vlm.data.readers_common import SourceError
from vlm.data.text_files import FoundRow, Readable, byte_lines, file_text, require_some_utf8
from vlm.errors import shown, some

MAX_DEPTH = 200
"""Where a text is nested deeper than Python can read, what is nested deeper than this is cut out."""
_TOO_DEEP = json.dumps({f"nested more than {MAX_DEPTH} levels deep": None})
_MAX_DIGITS = 4000  # Python refuses to read longer numbers, which takes the square of their length
# A string without an end is one up to the end of the text; else each quotation mark in it would be tried as a start.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


class RepeatedKey:
    """An object that has a key twice, and so no certain value. It is no row, and no text."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __repr__(self) -> str:
        return f"an object with the key {shown(self.key)} twice"


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
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return RepeatedKey(key)
        seen.add(key)
    return made


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


def load_json(file: Readable) -> Any:
    """Return the content of a JSON file, in UTF-8, UTF-16 or UTF-32; see [`parse_json`].

    Raises:
        SourceError: it cannot be read, or is not valid JSON; the message names file, line and column.
    """
    try:
        return parse_json(file_text(file))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise SourceError(f"{file}: not valid JSON: {error.msg} at {where}") from error


def load_json_list(path: Path, key: str) -> list[Any]:
    """Return the list under a key of a JSON object.

    Raises:
        SourceError: the file holds no such list.
    """
    content = load_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        found = f"an object with {some(content)}" if isinstance(content, dict) else shown(content)
        raise SourceError(f"{path}: expected an object with a list under {key!r}, found {found}")
    return list(content[key])


def read_rows(path: Path, label: str, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of [`json_rows`], and where each stands. Bad rows go to `problems`.

    Raises:
        SourceError: it cannot be read, is called `.json` and holds no rows, or is all in another encoding.
    """
    bad = False
    for where, content, _ in json_rows(path, label):
        if isinstance(content, Problem):
            problems.append(content)
            bad = True
        else:
            yield where, content
    if bad:
        require_some_utf8(path)


def json_rows(file: Readable, label: str) -> Iterator[FoundRow]:
    """Yield the rows of a JSON list or of JSON Lines, whatever the file is called. `label` is the file in messages.

    Raises:
        SourceError: it cannot be read, or is called `.json` and holds neither.
    """
    if _is_json_lines(file):
        yield from _rows_of_lines(file, label)
        return
    try:
        content = load_json(file)
    except SourceError as error:
        # Several values in a file are lines of JSON.
        cause = error.__cause__
        several = isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data"
        if not several and file.suffix == ".json":
            raise
        yield from _rows_of_lines(file, label)
        return
    if not isinstance(content, list):
        raise SourceError(f"{file}: expected a list of rows, or rows on a line each (.jsonl), found {_told(content)}")
    for index, row in enumerate(content):
        yield _row(f"{label}:row {index}", row)


def _is_json_lines(file: Readable) -> bool:
    """Whether it is so by its beginning; a large file is not read for that."""
    first = (line for _, line in byte_lines(file) if line.strip(codecs.BOM_UTF8 + b" \t\r\n"))
    lines = list(islice(first, 2))
    if lines and lines[0].lstrip(codecs.BOM_UTF8 + b" \t\r\n").startswith(b"["):
        return False
    if file.suffix != ".json":
        return True
    try:
        return len(lines) == 2 and isinstance(parse_json(lines[0].decode("utf-8-sig")), dict)
    except ValueError:
        return False


def _told(content: Any) -> str:
    """What a file holds in place of rows, and the key that holds them, if there is one."""
    if not isinstance(content, dict) or not content:
        return shown(content)
    holding = [
        key for key, value in content.items() if isinstance(value, list) and value and isinstance(value[0], dict)
    ]
    hint = f"; write the list under {shown(holding[0])} into a file of its own" if holding else ""
    return f"an object with {some(content)}{hint}"


def _rows_of_lines(file: Readable, label: str) -> Iterator[FoundRow]:
    """Rows of JSON Lines; empty lines are fine."""
    for number, (start, line) in enumerate(byte_lines(file), start=1):
        where = f"{label}:{number}"
        if not line.strip():
            continue
        try:
            row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            why = f"not valid JSON: {error.msg} at column {error.colno}"
            yield FoundRow(where, Problem(where, "", why))
        except UnicodeDecodeError as error:
            why = f"not UTF-8 text (byte {error.start} of the line); save it as UTF-8"
            yield FoundRow(where, Problem(where, "", why))
        else:
            yield _row(where, row, start)


def _row(where: str, row: Any, start: int | None = None) -> FoundRow:
    if isinstance(row, dict):
        return FoundRow(where, row, start)
    return FoundRow(where, Problem(where, "", f"expected an object {{...}}, found {shown(row)}"))


class RowsOnDisk:
    """The rows of a JSON Lines file, each by the byte that it starts at."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getitem__(self, start: int) -> Any:
        with open(self.path, "rb") as file:
            file.seek(start)
            return parse_json(file.readline().split(b"\r")[0].decode("utf-8-sig"))
