"""Folders without metadata: what layout they have, and how to read it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.data.image_files import has_image_suffix, is_hidden
from vlm.data.readers_common import SourceError
from vlm.data.readers_json import json_rows
from vlm.data.readers_tables import csv_columns
from vlm.data.text_files import read_bytes

IMAGE_KEYS = ("image", "images", "image_name", "image_path", "image_file", "filename", "img", "file", "path")
"""What the name of an image is also called, where a row has no `file_name`."""
_CAPTION_KEYS = ("caption", "captions", "text", "comment", "sentence", "sentences", "description", "title")
_ROW_FILES = (".csv", ".tsv", ".txt", ".token", ".jsonl", ".json", ".parquet")
_PEEKED = 100_000
"""Bytes of a JSON file that are looked at."""


def advice(folder: Path, metadata_files: Sequence[str]) -> str:
    """Return what to do with a folder that has none of `metadata_files`, by what is in it."""
    folders = _folders(folder)
    inner = [folder / name / file for name in folders for file in metadata_files if (folder / name / file).is_file()]
    if inner:
        return f"; but there is {inner[0].relative_to(folder)}: set path to {inner[0].parent}"
    if told := next((told for told in map(_told, _row_files(folder)) if told), None):
        return f"; but {told}"
    if classes := _class_folders(folder, folders):
        names = ", ".join(path.name for path in classes[:3])
        return (
            f". To learn the names of its folders ({names}) as captions, read {classes[0].parent} with format: dataset "
            "and columns: {image: image, caption: label}"
        )
    example = '{"file_name": "cat.jpg", "caption": "A cat."}'
    return f". Write {metadata_files[0]} with a line for each, as in {example}, or a text file for each (cat.txt)"


def _folders(folder: Path) -> list[str]:
    """The folders in a folder, those of training first."""
    names = [e.name for e in os.scandir(folder) if e.is_dir() and not is_hidden(e.name)]
    return sorted(names, key=lambda name: (not name.lower().startswith("train"), name))


def _has_images(folder: Path) -> bool:
    return any(has_image_suffix(name) and not is_hidden(name) for name in os.listdir(folder))


def _class_folders(folder: Path, folders: Sequence[str]) -> list[Path]:
    """The folders with images in a folder, or in the first of its folders (`train/cat`)."""
    direct = [folder / name for name in folders if _has_images(folder / name)]
    return direct or [path for name in folders[:1] for path in _class_folders(folder / name, _folders(folder / name))]


def _row_files(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_file() and not is_hidden(entry.name) and path.suffix.lower() in _ROW_FILES:
            yield path


def _told(file: Path) -> str:
    """How to read a file of rows; empty for a file that seems to be something else."""
    start = read_bytes(file, _PEEKED).lstrip() if file.suffix == ".json" else b""
    if start.startswith(b"{") and (b'"annotations"' in start or b'"images"' in start):
        return f"there is {file.name}: if it holds COCO captions, read it with format: coco_captions"
    try:
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            columns = list(pq.read_schema(file).names)
        elif file.suffix in (".json", ".jsonl"):
            first = next(json_rows(file, file.name), None)
            columns = list(first.content) if first is not None and isinstance(first.content, dict) else []
        else:
            columns, _ = csv_columns(file)
    except (SourceError, ValueError, OSError) as error:
        return str(error) if "is a row already" in str(error) else ""
    image = next((key for key in ("file_name", *IMAGE_KEYS) if key in columns), None)
    caption = next((key for key in _CAPTION_KEYS if key in columns), None)
    if "conversations" in columns:
        return f"there is {file.name} with conversations: read it with format: llava and path: {file}"
    if image is None or len(columns) < 2:
        return ""
    images = next(
        (file.parent / name for name in _folders(file.parent) if _has_images(file.parent / name)), file.parent
    )
    if caption in (None, "caption", "text", "captions"):
        metadata = os.path.relpath(file, images)
        return f"there is {file.name} with {', '.join(columns[:8])}: set path: {images} and metadata: {metadata}"
    source = {
        "format": "dataset",
        "path": _BUILDERS[file.suffix.lower()],
        "data_files": str(file),
        "images": str(images),
    }
    written = ", ".join(f"{key}: {value}" for key, value in source.items())
    columns_of = f"columns: {{image: {image}, image_id: {image}, caption: {caption}}}"
    return f"there is {file.name} with {', '.join(columns[:8])}: read it with {written}, {columns_of}"


_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"} | dict.fromkeys(
    (".csv", ".tsv", ".txt", ".token"), "csv"
)
