"""JSON and CSV files of a data set, read row by row wherever they are.

`datasets` reads them by pandas and PyArrow, which guess types (`007` and 2**64 become other numbers), mend what is not
well formed, and give up a whole file for one bad row.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.data.example import ImageSource, Problem, StoredImage
from vlm.data.readers_common import Collector, ReadResult, SourceError, image_sources
from vlm.data.readers_json import RowsOnDisk, json_rows
from vlm.data.readers_tables import CellsOnDisk, class_labels, csv_columns, csv_rows
from vlm.data.readers_text import RowError, as_text
from vlm.data.text_files import FoundRow, TextFile, require_some_utf8
from vlm.errors import shown

if TYPE_CHECKING:
    from vlm.data.readers_dataset import DatasetSource

LONGEST_INDEX = 64
"""Characters. What is longer is an image, as in VLMEvalKit."""
FIRST_ROWS = 1000
"""Of a stream, in which columns are looked for."""


@dataclass(frozen=True)
class RowFile:
    """A file of rows: JSON, JSON Lines, or CSV if `is_csv`."""

    file: TextFile
    is_csv: bool

    def rows(self) -> Iterator[FoundRow]:
        """Yield the rows in order, and what is wrong with bad ones. Raises SourceError for a damaged file."""
        return (csv_rows if self.is_csv else json_rows)(self.file, self.file.name)

    @cached_property
    def on_disk(self) -> RowsOnDisk | CellsOnDisk:
        """The rows by the byte that they start at."""
        return (CellsOnDisk if self.is_csv else RowsOnDisk)(self.file.url)


@dataclass(frozen=True)
class RowFiles:
    """The files of a data set by split; columns of class labels, where its card names them, and the number of rows."""

    by_split: dict[str, list[RowFile]]
    labels: dict[str, Any]
    num_rows: dict[str, int]


def row_files(builder: Any, *, streamed: bool) -> RowFiles | None:
    """Return the files that a builder of `datasets` would read, None if they are of other formats. Those elsewhere are
    brought to this disk, or else `streamed`."""
    import datasets
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    if not isinstance(builder, Csv | Json):
        return None
    opening = datasets.StreamingDownloadManager()
    by_split = {}
    for split, files in (builder.config.data_files or {}).items():
        here = [str(file) if streamed else datasets.DownloadManager().download(str(file)) for file in files]
        urls = [opening.extract(file) for file in here]
        by_split[str(split)] = [
            RowFile(TextFile(url, _name(str(file), str(place), url)), isinstance(builder, Csv))
            for file, place in zip(files, urls, strict=True)
            for url in opening.iter_files(place)
        ]
    splits = builder.info.splits or {}
    num_rows = {str(name): split.num_examples for name, split in splits.items() if split.num_examples}
    return RowFiles(by_split, class_labels(builder.info.features), num_rows)


def _name(file: str, place: str, url: str) -> str:
    """What a file is called in messages: in an archive, by the archive and its place in there."""
    if url == place:
        return file
    return f"{file}:{url.partition('::')[0].removeprefix('zip://').removeprefix(place).lstrip('/')}"


def columns_of(files: Sequence[RowFile], wanted: Sequence[str], most: int | None = None) -> list[str]:
    """Return the columns of some files: those that the first line of a CSV file names, or that the first `most` rows of
    JSON have, by default all, until each of the `wanted` has been seen.

    Raises:
        SourceError: a CSV file has not the columns of the first one, or no row can be read.
    """
    found: dict[str, None] = {}
    rows = chain.from_iterable(file.rows() for file in files if not file.is_csv)
    for file in files:
        if file.is_csv:
            names, _ = csv_columns(file.file)
            if missing := [name for name in wanted if found and name in found and name not in names]:
                raise SourceError(f"{file.file}: no column {shown(missing[0])}, which {files[0].file} has")
            found |= dict.fromkeys(names)
    bad: Problem | None = None
    for row in islice(rows, most):
        if isinstance(row.content, Problem):
            bad = bad or row.content
            continue
        found |= dict.fromkeys(row.content)
        if found.keys() >= set(wanted):
            break
    if bad and not found:
        raise SourceError(f"{bad}; no other row can be read either")
    return list(found)


def read_files(source: DatasetSource, base_dir: Path, files: RowFiles) -> ReadResult:
    """Read the rows of a split, or of slices of splits (`train[:10%]`).

    Raises:
        SourceError: there is no such split, a file cannot be read, or a column is not there.
    """
    parts = _parts(source.split, files)
    of_all = [file for part, _, _ in parts for file in part]
    if not of_all:
        raise SourceError(f"no file matches {source.data_files or source.path}")
    source.check_columns(columns_of(of_all, source.columns.all))
    collector = Collector(source.limit, source.inside(*source.folders(base_dir)))
    reader = _Reader(source, base_dir, collector, files.labels)
    for part, start, stop in parts:
        rows = ((file, row) for file in part for row in file.rows())
        for file, row in islice(rows, start, stop):
            if collector.full and source.columns.image_id is None:
                break
            reader.add(file, row)
    reader.add_later()
    if collector.problems:
        for file in of_all:
            require_some_utf8(file.file)
    return collector.result(source.path)


def _parts(split: str, files: RowFiles) -> list[tuple[list[RowFile], int, int | None]]:
    """Return the files that a split, or a sum of slices of splits, is in, and from which row to which."""
    import datasets

    if split in files.by_split:
        return [(files.by_split[split], 0, None)]
    if split == "all":
        return [(of_split, 0, None) for of_split in files.by_split.values()]
    asked = [part.partition("[")[0] for part in split.split("+")]
    names = [name for name in files.by_split if name in asked]
    if not names:
        raise SourceError(f"there is no split {split!r}; there is {', '.join(files.by_split) or 'none'}")
    lengths = {name: sum(1 for file in files.by_split[name] for _ in file.rows()) for name in names}
    absolute = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return [(files.by_split[part.splitname], part.from_ or 0, part.to) for part in absolute]


class _Reader:
    """Rows with their images, which stay on disk where they are inside the rows of a file that stays there too."""

    def __init__(self, source: DatasetSource, base_dir: Path, collector: Collector, labels: dict[str, Any]) -> None:
        self.source, self.collector, self.labels = source, collector, labels
        self.folder = source.image_folder(base_dir)
        self.by_index: dict[str, tuple[str, Sequence[ImageSource] | str]] = {}
        """In VLMEvalKit's tables, which have a column `index`, a row may hold, in place of an image, the index of the
        row that has it."""
        self.later: list[tuple[str, str, dict[str, Any]]] = []

    def add(self, file: RowFile, row: FoundRow) -> None:
        """Add what a row says, or what is wrong with it."""
        where, content, start = row
        if isinstance(content, Problem):
            self.collector.problems.append(content)
            return
        column = self.source.columns.of_images
        cell = content.get(column) if column else None
        images = images_of(cell, self.folder, column) if column else ()
        if not isinstance(images, str) and start is not None and file.file.on_disk:
            at = [index if isinstance(cell, list) else None for index in range(len(images))]
            images = [
                StoredImage(file.on_disk, start, str(column), index) if isinstance(image, bytes) else image
                for image, index in zip(images, at, strict=True)
            ]
        index = as_text(content.get("index"))
        if index is not None and isinstance(cell, str) and len(cell) > LONGEST_INDEX:
            self.by_index[index] = where, images
        elif index is not None and isinstance(cell, str) and not os.path.isfile(self.folder / cell):
            self.later.append((where, cell, content))
            return
        self._collect(where, content, images, where)

    def add_later(self) -> None:
        """Add the rows that name another row which has their image."""
        for where, cell, content in self.later:
            owner, images = self.by_index.get(
                cell, (where, images_of(cell, self.folder, str(self.source.columns.image)))
            )
            self._collect(where, content, images, owner)

    def _collect(self, where: str, content: dict[str, Any], images: Sequence[ImageSource] | str, owner: str) -> None:
        image_id = self.source.image_id(content, where, self.collector)
        image_id = owner if image_id == where else image_id
        if image_id is not None and self.collector.wants(image_id):
            self.source.collect(self.collector, content, images, image_id=image_id, where=where, labels=self.labels)


def images_of(cell: Any, folder: Path, column: str) -> Sequence[ImageSource] | str:
    """Return the images in a cell of the column of images, or why there are none."""
    try:
        images = [_image(one, folder, column) for one in (cell if isinstance(cell, list) else [cell])]
    except RowError as error:
        return error.why
    found = [image for image in images if image is not None]
    return found if len(found) == len(images) else "no image"


def _image(cell: Any, folder: Path, column: str) -> ImageSource | None:
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if cell is None or cell == "":
        return None
    if not isinstance(cell, str | bytes):
        raise RowError(column, f"expected an image or the name of one, found {shown(cell)}")
    return image_sources([cell], folder, column)[0] if isinstance(cell, str) else cell
