"""An image folder with `metadata.jsonl`, `.csv` or `.parquet`: one row an image, as in `datasets`' imagefolder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vlm.data.example import Problem
from vlm.data.image_files import has_image_suffix, is_hidden
from vlm.data.readers_common import (
    Collector,
    ReadResult,
    Source,
    SourceError,
    files_of,
    image_sources,
    images_id,
    resolve,
)
from vlm.data.readers_json import read_rows
from vlm.data.readers_rows import DEFAULT_PROMPT, DEFAULT_QUESTION_PROMPT, ROW_KEYS, RowReader
from vlm.data.readers_tables import Rows, read_csv, read_parquet
from vlm.data.readers_text import RowError, file_names, id_text, show, unknown_near_miss

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_KNOWN = ("file_name", "file_names", "image_id", "question_id", *ROW_KEYS)
_OTHER_NAMES = ("image", "images", "image_path", "image_file", "img", "path", "file")
_EXPECTED = "expected the name of an image (or several under 'file_names')"


class ImageFolderSource(Source):
    """`path` is the folder. `metadata` is a file in it, or anywhere else while `file_name` still starts at `path`; by
    default the one of `METADATA_FILES` that is there."""

    format_name: ClassVar[str] = "image_folder"
    path: str
    metadata: str | None = None
    prompt: str = DEFAULT_PROMPT
    question_prompt: str = DEFAULT_QUESTION_PROMPT

    def read(self, base_dir: Path) -> ReadResult:
        folder = resolve(self.path, base_dir, "path", folder=True)
        name = self.metadata or _metadata_in(folder)
        metadata = resolve(name, folder, "metadata")
        label = str(Path(self.path) / name)
        collector = Collector(self.limit, self.inside(folder))
        rows = RowReader(self.prompt, self.question_prompt)
        for where, row in metadata_rows(metadata, label, collector.problems):
            if miss := unknown_near_miss(row, _KNOWN):
                collector.bad(where, *miss)
                continue
            try:
                names = _file_names(row)
                images = image_sources(names, folder, "file_name")
                image_id = id_text(row.get("image_id"), "image_id") or images_id(names, images) or where
            except RowError as error:
                collector.bad(where, error.key, error.why)
                continue
            if not collector.wants(image_id):
                continue
            branches = rows.branches(row, num_images=len(names), where=where, problems=collector.problems)
            if branches and not collector.missing_images(files_of(images), where, lost=len(branches)):
                collector.add(images, branches, image_id=image_id, where=where)
        return collector.result(label)


def _file_names(row: Mapping[str, Any]) -> list[str]:
    if "file_names" not in row and "file_name" not in row:
        found = ", ".join(map(show, row)) or "nothing"
        hint = next((f"; call {key!r} 'file_name'" for key in row if key in _OTHER_NAMES), "")
        raise RowError("file_name", f"{_EXPECTED}, found only {found}{hint}")
    return file_names(row.get("file_names", row.get("file_name")), "file_name", _EXPECTED)


def metadata_rows(metadata: Path, label: str, problems: list[Problem]) -> Rows:
    """Return the rows of a metadata file, by what it is called, and where each stands; bad ones go to `problems`."""
    suffix = metadata.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return read_csv(metadata, label, problems)
    return read_parquet(metadata, label) if suffix == ".parquet" else read_rows(metadata, label, problems)


def _metadata_in(folder: Path) -> str:
    """The file that says what to learn of the images in a folder.

    Raises:
        SourceError: there is none, or there are several; the message says what to do.
    """
    found = [name for name in METADATA_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise SourceError(f"{folder} has {' and '.join(found)}; say which one to read, as in metadata: {found[0]}")
    if found:
        return found[0]
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        raise SourceError(f"{folder} is a data set that `datasets` saved; read it with format: dataset and its columns")
    names = [e.name for e in os.scandir(folder) if e.is_dir() and not is_hidden(e.name)]
    folders = sorted(names, key=lambda name: (not name.lower().startswith("train"), name))
    inner = [f"{name}/{file}" for name in folders for file in METADATA_FILES if (folder / name / file).is_file()]
    none = f"{folder} has none of {', '.join(METADATA_FILES)}, which say what to learn of each image"
    if inner:
        raise SourceError(f"{none}; but there is {inner[0]}: set path to {folder / Path(inner[0]).parent}")
    if any(has_image_suffix(file) for name in folders for file in os.listdir(folder / name)):
        raise SourceError(
            f"{none}. To learn the names of its folders ({', '.join(folders[:3])}) as captions, read it with "
            "format: dataset and columns: {image: image, caption: label}"
        )
    example = '{"file_name": "cat.jpg", "caption": "A cat."}'
    raise SourceError(f"{none}. Write {METADATA_FILES[0]} with a line for each, as in {example}")
