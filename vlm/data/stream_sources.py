"""Sources in pieces: row groups of parquet files, files of other kinds, and the rows of a piece in order.

A row keeps its images as they are stored, encoded, so that it is cheap to read and to pass over.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vlm.data import readers_webdataset as webdataset
from vlm.data.example import Example, Problem
from vlm.data.readers import parse_source
from vlm.data.readers_common import Collector, ReadResult, SourceError
from vlm.data.readers_dataset import DatasetSource, require_whole_tar
from vlm.data.readers_files import FIRST_ROWS, RowFile, RowFiles, columns_of, images_of, row_files
from vlm.data.readers_tables import class_labels
from vlm.data.text_files import DAMAGED, FoundRow

ROWS_AT_ONCE = 256
ROWS_IN_A_PIECE = 1000
"""Of what can be read from anywhere, a piece has so many rows."""
BUFFER_FROM = 2**27
"""A row group that is larger, in bytes, is read through a buffer, not whole."""
OPEN_FILES = 16


class Place(NamedTuple):
    """Where a row stands: in which piece, and which row of it."""

    piece: int
    row: int


class Pieces(Protocol):
    """A source that is read in pieces, each from its beginning or from a row of it. `len` counts the pieces."""

    num_rows: int | None
    """How many rows there are in all, if that is known without reading them."""
    outline: list[Any]
    """What tells the source from one that has changed, as far as that is known without reading it."""
    counted: bool
    """Whether its answers, and what is bad in its rows, were counted before it is streamed."""

    def __len__(self) -> int: ...

    def rows(self, piece: int, start: int = 0) -> Iterator[Any]:
        """The rows of a piece in order, from row `start` on."""

    def examples(self, rows: Sequence[tuple[Place, Any]]) -> ReadResult:
        """The examples of some rows, those of one image together, and what is bad in them."""


class InMemory:
    """What has been read already."""

    def __init__(self, examples: Sequence[Example], *, counted: bool = False) -> None:
        self.all, self.counted = examples, counted
        self.num_rows: int | None = len(examples)
        self.outline = [example.image_id for example in examples]

    def __len__(self) -> int:
        return -(-len(self.all) // ROWS_IN_A_PIECE)

    def rows(self, piece: int, start: int = 0) -> Iterator[Example]:
        return iter(self.all[piece * ROWS_IN_A_PIECE + start : (piece + 1) * ROWS_IN_A_PIECE])

    def examples(self, rows: Sequence[tuple[Place, Example]]) -> ReadResult:
        return ReadResult([example for _, example in rows], [])


class _Dataset:
    """What rows of a `dataset` source say, wherever they come from."""

    counted = False

    def __init__(self, source: DatasetSource, base_dir: Path) -> None:
        self.source = source
        self.folder = source.image_folder(base_dir)
        self.inside = source.inside(*source.folders(base_dir))
        self.labels: dict[str, Any] = {}
        """The columns of class labels."""

    def where(self, place: Place) -> str:
        """File and row, for messages."""
        raise NotImplementedError

    def _rows(self, piece: int, start: int) -> Iterator[Any]:
        raise NotImplementedError

    def found(self, place: Place, row: Any) -> FoundRow:
        """A row as it was read, with where it stands."""
        return FoundRow(self.where(place), row)

    def rows(self, piece: int, start: int = 0) -> Iterator[Any]:
        """As they are stored. Raises SourceError for a file that is damaged."""
        row = start
        try:
            for content in self._rows(piece, start):
                yield content
                row += 1
        except SourceError:
            raise
        except (OSError, ValueError, tarfile.TarError, *DAMAGED) as error:
            raise SourceError(f"{self.where(Place(piece, row))}: cannot be read ({error})") from error

    def examples(self, rows: Sequence[tuple[Place, Any]]) -> ReadResult:
        columns, collector = self.source.columns, Collector(inside=self.inside)
        for place, content in rows:
            where, row, _ = self.found(place, content)
            if isinstance(row, Problem):
                collector.problems.append(row)
                continue
            images = images_of(row.get(columns.of_images), self.folder, columns.of_images) if columns.of_images else ()
            image_id = self.source.image_id(row, where, collector)
            if image_id is not None:
                self.source.collect(collector, row, images, image_id=image_id, where=where, labels=self.labels)
        return collector.result(self.source.path)


class ParquetRowGroups(_Dataset):
    """Row groups of parquet files, of which the needed columns are read. `files` are paths or addresses of fsspec.
    `features` say what the columns hold, by default as the first file says it."""

    def __init__(self, source: DatasetSource, base_dir: Path, files: Sequence[str], features: Any = None) -> None:
        from datasets import Features

        super().__init__(source, base_dir)
        self.files = files
        with ThreadPoolExecutor(8) as threads:  # footers of remote files are waited for
            footers = list(threads.map(_footer, files))
        for schema, _ in footers:
            source.check_columns(schema.names)
        self.labels = class_labels(features or Features.from_arrow_schema(footers[0][0]))
        self.pieces = [(file, *group) for file, (_, groups) in enumerate(footers) for group in groups]
        self.num_rows: int | None = sum(rows for _, _, _, rows, _ in self.pieces)
        self.outline = [[os.path.basename(files[file]), *group] for file, *group in self.pieces]

    def __len__(self) -> int:
        return len(self.pieces)

    def where(self, place: Place) -> str:
        file, _, first_row, _, _ = self.pieces[place.piece]
        return f"{self.files[file]}:row {first_row + place.row}"

    def _rows(self, piece: int, start: int) -> Iterator[dict[str, Any]]:
        file, group, _, _, size = self.pieces[piece]
        opened = _parquet(self.files[file], size > BUFFER_FROM, os.getpid())
        batches = opened.iter_batches(
            ROWS_AT_ONCE, row_groups=[group], columns=self.source.columns.all, use_threads=False
        )
        for batch in batches:
            if start < len(batch):
                yield from batch.slice(start).to_pylist()
            start = max(0, start - len(batch))


class Files(_Dataset):
    """Files that `datasets` streams, such as WebDataset shards; one file is a piece."""

    def __init__(
        self, source: DatasetSource, base_dir: Path, dataset: Any, files: Sequence[str], num_rows: int | None
    ) -> None:
        super().__init__(source, base_dir)
        columns = source.columns
        source.check_columns(dataset.column_names or list(next(iter(dataset), {})))
        self.labels = class_labels(dataset.features)
        if columns.of_images is not None and dataset.features is not None:
            dataset = source.undecoded(dataset, columns.of_images)
        self.dataset = dataset.select_columns(columns.all)
        self.files = files if len(files) == dataset.num_shards else []
        self.num_rows = num_rows
        self.outline = [[os.path.basename(file), os.path.isfile(file) and os.path.getsize(file)] for file in files]

    def __len__(self) -> int:
        return int(self.dataset.num_shards)

    def where(self, place: Place) -> str:
        name = self.files[place.piece] if self.files else f"{self.source.path}[{self.source.split}], part {place.piece}"
        return f"{name}:row {place.row}"

    def _rows(self, piece: int, start: int) -> Iterator[dict[str, Any]]:
        yield from self.dataset.shard(len(self), piece).skip(start)
        if self.files:
            require_whole_tar(self.files[piece])


class FilesOfRows(_Dataset):
    """JSON and CSV files; one file is a piece."""

    def __init__(self, source: DatasetSource, base_dir: Path, files: RowFiles) -> None:
        super().__init__(source, base_dir)
        if source.split not in files.by_split:
            known = ", ".join(files.by_split) or "none"
            raise SourceError(f"there is no split {source.split!r} to stream; there is {known}")
        self.files: list[RowFile] = files.by_split[source.split]
        source.check_columns(columns_of(self.files, source.columns.all, FIRST_ROWS))
        self.labels = files.labels
        self.num_rows: int | None = files.num_rows.get(source.split)
        names = [row_file.file.name for row_file in self.files]
        self.outline = [[os.path.basename(name), os.path.isfile(name) and os.path.getsize(name)] for name in names]

    def __len__(self) -> int:
        return len(self.files)

    def where(self, place: Place) -> str:
        return f"{self.files[place.piece].file}:row {place.row}"

    def found(self, place: Place, row: FoundRow) -> FoundRow:
        return row

    def _rows(self, piece: int, start: int) -> Iterator[FoundRow]:
        return islice(self.files[piece].rows(), start, None)


class Saved(_Dataset):
    """A data set that `save_to_disk` saved: memory-mapped, and read from anywhere."""

    def __init__(self, source: DatasetSource, base_dir: Path, dataset: Any) -> None:
        super().__init__(source, base_dir)
        source.check_columns(dataset.column_names)
        self.labels = class_labels(dataset.features)
        columns = source.columns
        if columns.of_images is not None:
            dataset = source.undecoded(dataset, columns.of_images)
        self.dataset = dataset.select_columns(columns.all)
        self.num_rows: int | None = len(dataset)
        self.outline = [dataset._fingerprint]

    def __len__(self) -> int:
        return -(-len(self.dataset) // ROWS_IN_A_PIECE)

    def where(self, place: Place) -> str:
        return f"{self.source.path}[{self.source.split}]:row {place.piece * ROWS_IN_A_PIECE + place.row}"

    def _rows(self, piece: int, start: int) -> Iterator[dict[str, Any]]:
        stop = min(len(self.dataset), (piece + 1) * ROWS_IN_A_PIECE)
        for first in range(piece * ROWS_IN_A_PIECE + start, stop, ROWS_AT_ONCE):
            batch = self.dataset[first : min(stop, first + ROWS_AT_ONCE)]
            yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))


def in_pieces(source: dict[str, Any], base_dir: Path, read_whole: Callable[[dict[str, Any]], list[Example]]) -> Pieces:
    """The source of a recipe in pieces. One that is not streamed is read by `read_whole`.

    Raises SourceError where it cannot be read, or has no rows.
    """
    parsed = parse_source(source)
    if not (isinstance(parsed, DatasetSource) and parsed.streaming):
        return InMemory(read_whole(source), counted=True)
    with parsed.errors(base_dir):
        pieces = _pieces(parsed, base_dir)
    if not len(pieces) or pieces.num_rows == 0:
        raise SourceError(f"{parsed.path}: there is not a single row in it")
    return pieces


def _pieces(source: DatasetSource, base_dir: Path) -> Pieces:
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    if (saved := source.saved(base_dir)) is not None:
        return Saved(source, base_dir, saved)
    builder = source.builder(base_dir)
    found = {str(split): list(names) for split, names in (builder.config.data_files or {}).items()}
    if (of_rows := row_files(builder, streamed=True)) is not None:
        return FilesOfRows(source, base_dir, of_rows)
    if isinstance(builder, Parquet) and source.split in found:
        return ParquetRowGroups(source, base_dir, found[source.split], builder.info.features)
    said = (builder.info.splits or {}).get(source.split)
    if isinstance(builder, WebDataset) and found.get(source.split):
        tars = found[source.split]
        made = {"tars": tars} | source.fields(tars[0])
        dataset = datasets.IterableDataset.from_generator(webdataset.rows, gen_kwargs=made)
    else:
        dataset = builder.as_streaming_dataset(source.split)
    return Files(source, base_dir, dataset, found.get(source.split, []), said.num_examples if said else None)


def _footer(file: str) -> tuple[Any, list[tuple[int, int, int, int]]]:
    """The Arrow schema of a parquet file, and of each row group its number, first row, rows and bytes."""
    opened = _open_parquet(file, buffered=False)
    groups, first_row = [], 0
    for number in range(opened.metadata.num_row_groups):
        group = opened.metadata.row_group(number)
        groups.append((number, first_row, group.num_rows, group.total_byte_size))
        first_row += group.num_rows
    schema = opened.schema_arrow
    opened.close(force=True)
    return schema, groups


@lru_cache(OPEN_FILES)
def _parquet(file: str, buffered: bool, process: int) -> Any:
    """An open file. A process that was forked opens its own: with its parent's it would share the place to read at."""
    return _open_parquet(file, buffered)


def _open_parquet(file: str, buffered: bool) -> Any:
    import fsspec
    import pyarrow.parquet as pq

    source = fsspec.open(file).open() if "://" in file else file
    return pq.ParquetFile(source, buffer_size=2**20 if buffered else 0)
