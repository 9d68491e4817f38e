"""Rows of tables: CSV and TSV, in which everything is text as it stands, and parquet."""

from __future__ import annotations

import csv
import io
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
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = csv.reader(io.StringIO(file_text(path, errors="surrogateescape"), newline=""), delimiter=delimiter)
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        names = next(lines, [])
        _require_columns(names, path, delimiter)
        rows: Rows = []
        while True:
            where = f"{label}:{lines.line_num + 1}"
            try:
                cells = next(lines, None)
            except csv.Error as error:
                problems.append(Problem(where, "", f"not a line of CSV: {error}"))
                continue
            if cells is None:
                return rows
            if len(cells) > len(names):
                problems.append(
                    Problem(where, "", f"{len(cells)} cells, and the first line names {len(names)} columns")
                )
            elif cells:
                rows.append((where, {name: cell for name, cell in zip(names, cells, strict=False) if cell}))
    finally:
        csv.field_size_limit(limit)


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
