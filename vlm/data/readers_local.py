"""JSON and CSV files of this disk read row by row, where `datasets` gives up the whole file for one bad row."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.data.example import ImageSource
from vlm.data.readers_common import Collector, ReadResult, SourceError, image_sources
from vlm.data.readers_json import read_rows
from vlm.data.readers_tables import read_csv
from vlm.data.readers_text import RowError

if TYPE_CHECKING:
    from vlm.data.readers_dataset import DatasetSource

_READERS = {"json": read_rows, "csv": read_csv}


def read_row_by_row(source: DatasetSource, base_dir: Path, error: SourceError) -> ReadResult:
    """Read what `datasets` could not, for the reason `error`.

    Raises:
        SourceError: the source is something else than such files, or they have not the columns.
    """
    files = sorted(file for pattern in source.place(base_dir)[1] or [] for file in glob.glob(pattern, recursive=True))
    if source.path not in _READERS or source.split != "train" or not files:
        raise error
    collector = Collector(source.limit, source.inside(*source.folders(base_dir)))
    rows = [row for file in files for row in _READERS[source.path](Path(file), file, collector.problems)]
    if not rows:
        raise error
    source.check_columns(list(dict.fromkeys(key for _, row in rows for key in row)))
    column = source.columns.of_images
    folder = source.image_folder(base_dir)
    for where, row in rows:
        image_id = source.image_id(row, where, collector)
        if image_id is not None and collector.wants(image_id):
            images = images_of(row.get(column), folder, column) if column else ()
            source.collect(collector, row, images, image_id=image_id, where=where, labels={})
    return collector.result(source.path)


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
    return image_sources([cell], folder, column)[0] if isinstance(cell, str) else cell
