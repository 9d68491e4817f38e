"""An image folder with `metadata.jsonl`, `.csv` or `.parquet`, as in `datasets`' imagefolder, or with captions in text
files next to its images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vlm.data.example import Problem
from vlm.data.layouts import IMAGE_KEYS, advice
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
from vlm.data.readers_sidecars import caption_rows, has_captions
from vlm.data.readers_tables import Rows, read_csv, read_parquet
from vlm.data.readers_text import RowError, file_names, id_text, unknown_near_miss
from vlm.data.text_files import read_bytes
from vlm.errors import some

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_KNOWN = ("file_name", "file_names", "image_id", "question_id", *ROW_KEYS, *IMAGE_KEYS)
_EXPECTED = "expected the name of an image (or several under 'file_names')"


class ImageFolderSource(Source):
    """`path` is the folder. `metadata` is a file in it, or anywhere else while `file_name` still starts at `path`; by
    default the one of `METADATA_FILES` that is there; without one, captions are in text files next to the images."""

    format_name: ClassVar[str] = "image_folder"
    path: str
    metadata: str | None = None
    prompt: str = DEFAULT_PROMPT
    question_prompt: str = DEFAULT_QUESTION_PROMPT

    def read(self, base_dir: Path) -> ReadResult:
        folder = resolve(self.path, base_dir, "path", folder=True)
        collector = Collector(self.limit, self.inside(folder))
        name = self.metadata or _metadata_in(folder)
        label = self.path if name is None else str(Path(self.path) / name)
        if name is None:
            found = caption_rows(folder, label, collector.problems)
        else:
            found = iter(metadata_rows(resolve(name, folder, "metadata"), label, collector.problems))
        rows = RowReader(self.prompt, self.question_prompt)
        for where, row in found:
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
    key = next((key for key in ("file_names", "file_name", *IMAGE_KEYS) if key in row), None)
    if key is None:
        raise RowError("file_name", f"{_EXPECTED}, found only {some(row)}")
    if isinstance(row[key], bytes | dict):
        raise RowError(key, "an image, not the name of one; read its file with format: dataset and its columns")
    return file_names(row[key], key if key in IMAGE_KEYS else "file_name", _EXPECTED)


def metadata_rows(metadata: Path, label: str, problems: list[Problem]) -> Rows:
    """Return the rows of a metadata file, by what it is called, and where each stands; bad ones go to `problems`."""
    suffix = metadata.suffix.lower()
    if suffix in (".xlsx", ".xls", ".ods"):
        raise SourceError(f"{metadata} is a spreadsheet; save it as CSV")
    if suffix in (".csv", ".tsv") or (suffix in (".txt", "") and not _is_json(metadata)):
        return list(read_csv(metadata, label, problems))
    return read_parquet(metadata, label) if suffix == ".parquet" else list(read_rows(metadata, label, problems))


def _is_json(file: Path) -> bool:
    return read_bytes(file, 4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[", b"")


def _metadata_in(folder: Path) -> str | None:
    """The file that says what to learn of the images in a folder; None where text files next to them do.

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
    if has_captions(folder):
        return None
    none = f"{folder} has none of {', '.join(METADATA_FILES)}, which say what to learn of each image"
    raise SourceError(f"{none}{advice(folder, METADATA_FILES)}")
