"""Rows of tables: CSV, in which everything is text as it stands, and parquet."""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlm.data.example import Problem
from vlm.data.image_files import has_image_suffix
from vlm.data.readers_common import SourceError
from vlm.data.text_files import FoundRow, Readable, read_bytes, require_some_utf8, text_lines
from vlm.errors import shown

Rows = list[tuple[str, dict[str, Any]]]
"""Rows with where each stands."""
Line = tuple[int | None, str]
"""A line of a file with its end, and the byte that it starts at."""
_LONGEST_CELL = 2**29
"""Characters: an image of 256 MiB in base64 has fewer. Python's own limit is 131,072."""
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\ud800-\udfff]")
_DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "vertical bar"}


def read_csv(path: Path, label: str, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of [`csv_rows`], and where each stands. Bad rows go to `problems`.

    Raises:
        SourceError: it cannot be read, its first line does not name columns, or it is all in another encoding.
    """
    require_some_utf8(path)
    for where, content, _ in csv_rows(path, label):
        if isinstance(content, Problem):
            problems.append(content)
        else:
            yield where, content


def csv_rows(file: Readable, label: str) -> Iterator[FoundRow]:
    """Yield the rows of a CSV file; see [`csv_columns`]. An empty cell is null. `label` is the file in messages.

    Raises:
        SourceError: it cannot be read, or its first line does not name columns.
    """
    names, delimiter = csv_columns(file)
    records = _records(text_lines(file), delimiter)
    next(records, None)
    for number, start, record in records:
        where = f"{label}:{number}"
        try:
            cells = _cells(record, names, delimiter)
        except SourceError as error:
            yield FoundRow(where, Problem(where, "", str(error)))
            continue
        if cells:
            yield FoundRow(where, {n: cell for n, cell in zip(names, cells, strict=False) if n and cell}, start)


class CellsOnDisk:
    """The rows of a CSV file in UTF-8, each by the byte that it starts at."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.names, self.delimiter = csv_columns(Path(path))

    def __getitem__(self, start: int) -> dict[str, str]:
        with open(self.path, "rb") as file:
            file.seek(start)
            lines = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
            _, _, record = next(_records(((None, line) for line in lines), self.delimiter))
            return dict(zip(self.names, _cells(record, self.names, self.delimiter), strict=False))


def csv_columns(file: Readable) -> tuple[list[str], str]:
    """Return the columns that the first line of a CSV file names, and what separates cells: a tab in a file called
    `.tsv`, else a comma; another of `_DELIMITERS` if the first line has that and not the usual one.

    Raises:
        SourceError: it cannot be read, or has no such line.
    """
    usual = "\t" if file.suffix.lower() == ".tsv" else ","
    names: list[str] = []
    for delimiter in (usual, *_DELIMITERS):
        _, _, record = next(_records(text_lines(file), delimiter), (1, None, []))
        try:
            found = _cells(record, None, delimiter)
        except SourceError as error:
            raise SourceError(f"{file}: line 1, which names the columns, is {error}") from None
        names = names or found
        if len(found) > 1:
            names = found
            break
    else:
        delimiter = usual
    names = [name.strip() for name in names]
    if found := sorted(_NO_TEXT.findall("".join(names))):
        what = "not a CSV file" if found[0] < " " else "not UTF-8 text; save it as UTF-8"
        raise SourceError(f"{file}: {what} (it begins with {read_bytes(file, 12)!r})")
    if names and names[0].lower().startswith("sep="):
        raise SourceError(f"{file}: line 1 is {shown(names[0])}, which only Excel understands; remove it")
    if row := next((name for name in names if has_image_suffix(name.partition("#")[0])), None):
        raise SourceError(
            f"{file}: line 1 is a row already ({shown(row)}); write a line above it that names the columns, such as "
            f"{shown(delimiter.join(('image', 'caption')))}"
        )
    twice = [name for index, name in enumerate(names) if name and name in names[:index]]
    if twice:
        raise SourceError(f"{file}: two columns are called {shown(twice[0])}; rename one of them")
    return names, delimiter


def _records(lines: Iterable[Line], delimiter: str) -> Iterator[tuple[int, int | None, list[str] | csv.Error]]:
    """Yield each record, or what is wrong with it, with the number of its first line and the byte that it starts at.

    After an error reading goes on with the line after that one: a stray quotation mark costs no row but its own.
    """
    source, again = iter(lines), deque[Line]()
    of_record: list[Line] = []

    def feed() -> Iterator[str]:
        while line := again.popleft() if again else next(source, None):
            of_record.append(line)
            yield line[1]

    limit = csv.field_size_limit()
    number = 1
    records = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        found: list[str] | csv.Error | None
        csv.field_size_limit(_LONGEST_CELL)
        try:
            found = next(records, None)
        except csv.Error as error:
            found = error
        finally:
            csv.field_size_limit(limit)
        if found is None:
            return
        yield number, of_record[0][0], found
        if isinstance(found, csv.Error):
            again.extendleft(reversed(of_record[1:]))
            records = csv.reader(feed(), delimiter=delimiter, strict=True)
            number += 1
        else:
            number += len(of_record)
        of_record.clear()


def _cells(record: list[str] | csv.Error, names: list[str] | None, delimiter: str) -> list[str]:
    """Return the cells of a record. Raise SourceError, in words, if it is bad. `names` are the columns, if known."""
    if isinstance(record, csv.Error):
        raise SourceError(
            f'not valid CSV ({record}): put a cell with quotation marks in quotes, and write each twice, as in ""'
        )
    if names is not None and len(record) > len(names):
        raise SourceError(
            f"{len(record)} cells, and the first line names {len(names)} columns; put a cell with a "
            f"{_DELIMITERS[delimiter]} in it in quotation marks"
        )
    return [cell.strip() for cell in record] if delimiter == "|" else record


def read_parquet(path: Path, label: str) -> Rows:
    """Return the rows of a parquet file, class labels by name.

    Raises:
        SourceError: it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    try:
        table = pq.read_table(path)
        labels = class_labels(Features.from_arrow_schema(table.schema))
        rows = table.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"{path}: cannot be read as parquet ({error})") from error
    for row in rows:
        row |= {name: label_name(labels[name], row[name]) for name in labels}
    return [(f"{label}:row {index}", row) for index, row in enumerate(rows)]


def class_labels(features: Any) -> dict[str, Any]:
    """Return the columns of `datasets.Features` that hold a `ClassLabel`, or a list of them, with its names."""
    from datasets import ClassLabel

    found = {name: getattr(feature, "feature", feature) for name, feature in (features or {}).items()}
    return {name: feature for name, feature in found.items() if isinstance(feature, ClassLabel)}


def label_name(labels: Any, value: Any) -> Any:
    """Return the name of a class, or of each in a list; None where there is none (`datasets` writes -1 for that). What
    is no number of a class stays as it is."""
    if isinstance(value, list):
        return [label_name(labels, one) for one in value]
    if isinstance(value, str) and value.isdecimal() and value not in labels.names:  # of a CSV file
        value = int(value)
    if not isinstance(value, int) or not -1 <= value < labels.num_classes:
        return value
    return labels.int2str(value) if value >= 0 else None
