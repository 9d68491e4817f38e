"""Rows of tables: CSV and TSV, in which everything is text as it stands, and parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vlm.data.example import Problem
from vlm.data.readers_common import SourceError
from vlm.data.readers_json import file_text
from vlm.data.readers_text import show

Rows = list[tuple[str, dict[str, Any]]]
"""Rows with where each stands."""
_LONGEST_CELL = 2**31 - 1  # an image in base64 may be in it; Python's own limit are 131,072 characters


def read_csv(path: Path, label: str, problems: list[Problem]) -> Rows:
    """Return the rows of a CSV file, or with tabs if it is called `.tsv`. An empty cell is null.

    Raises:
        SourceError: it cannot be read, or its first line does not name columns.
    """
    delimiter = _delimiter(path)
    lines = io.StringIO(file_text(path, errors="surrogateescape"), newline="").readlines()
    records = _records(lines, delimiter)
    try:
        names = _cells(next(records, (1, []))[1], None)
    except SourceError as error:
        raise SourceError(f"{path}: line 1, which names the columns, is {error}") from None
    _require_columns(names, path, delimiter)
    rows: Rows = []
    for number, record in records:
        where = f"{label}:{number}"
        try:
            cells = _cells(record, names)
        except SourceError as error:
            problems.append(Problem(where, "", str(error)))
            continue
        if cells:
            rows.append((where, {name: cell for name, cell in zip(names, cells, strict=False) if cell}))
    return rows


def require_whole_csv(path: Path) -> None:
    """Raise SourceError for the first bad record of a CSV file. pandas, and so `datasets`, reads over many of them: it
    mangles stray quotation marks, and takes the first column for an index."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        names: list[str] | None = None
        for number, record in _until_error(file, _delimiter(path)):
            try:
                cells = _cells(record, names)
            except SourceError as error:
                raise SourceError(f"{path}:{number}: {error}") from None
            names = names or cells


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _records(lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield each record, or what is wrong with it, with the number of its first line.

    After an error reading goes on with the line after that one: a stray quotation mark costs no row but its own.
    """
    start, last = 0, None
    while start < len(lines):
        for number, last in _until_error((lines[at] for at in range(start, len(lines))), delimiter):
            yield start + number, last
        if not isinstance(last, csv.Error):
            return
        start += number


def _until_error(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    limit = csv.field_size_limit()
    while True:
        number = records.line_num + 1
        csv.field_size_limit(_LONGEST_CELL)
        try:
            cells = next(records, None)
        except csv.Error as error:
            yield number, error
            return
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        yield number, cells


def _cells(record: list[str] | csv.Error, names: list[str] | None) -> list[str]:
    """Return the cells of a record. Raise SourceError, in words, if it is bad. `names` are the columns, if known."""
    if isinstance(record, csv.Error):
        raise SourceError(
            f'not valid CSV ({record}): put a cell with quotation marks in quotes, and write each twice, as in ""'
        )
    if names is not None and len(record) > len(names):
        raise SourceError(f"{len(record)} cells, and the first line names {len(names)} columns")
    return record


def _require_columns(names: list[str], path: Path, delimiter: str) -> None:
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise SourceError(f"{path}: two columns are called {show(twice[0])}; rename one of them")
    others = [other for other in ",;\t" if other != delimiter and other in "".join(names)]
    if len(names) == 1 and others:
        told = "tabs, and call it .tsv" if delimiter == "\t" else "commas, or with tabs and call it .tsv"
        raise SourceError(f"{path}: there is only one column, {show(names[0])}; separate columns with {told}")


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
    if not isinstance(value, int) or not -1 <= value < labels.num_classes:
        return value
    return labels.int2str(value) if value >= 0 else None
