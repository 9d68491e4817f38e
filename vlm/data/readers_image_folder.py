"""An image folder with `metadata.jsonl`: one line an image, in the layout of `datasets`' imagefolder."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from vlm.data.readers_common import Collector, ReadResult, Source, resolve
from vlm.data.readers_json import read_rows
from vlm.data.readers_rows import DEFAULT_PROMPT, DEFAULT_QUESTION_PROMPT, ROW_KEYS, RowReader
from vlm.data.readers_text import RowError, file_names, id_text, unknown_near_miss

_KNOWN = ("file_name", "file_names", "image_id", "question_id", *ROW_KEYS)
_EXPECTED = "expected the name of an image (or several under 'file_names')"


class ImageFolderSource(Source):
    """`path` is the folder. `metadata` is a file in it, or anywhere else while `file_name` still starts at `path`."""

    format_name: ClassVar[str] = "image_folder"
    path: str
    metadata: str = "metadata.jsonl"
    prompt: str = DEFAULT_PROMPT
    question_prompt: str = DEFAULT_QUESTION_PROMPT

    def read(self, base_dir: Path) -> ReadResult:
        folder = resolve(self.path, base_dir, "path", folder=True)
        metadata = resolve(self.metadata, folder, "metadata")
        label = str(Path(self.path) / self.metadata)
        collector = Collector(self.limit)
        rows = RowReader(self.prompt, self.question_prompt)
        for where, row in read_rows(metadata, label, collector.problems):
            if miss := unknown_near_miss(row, _KNOWN):
                collector.bad(where, *miss)
                continue
            try:
                names = file_names(row.get("file_names", row.get("file_name")), "file_name", _EXPECTED)
                image_id = id_text(row.get("image_id"), "image_id") or "|".join(names) or where
            except RowError as error:
                collector.bad(where, error.key, error.why)
                continue
            if not collector.wants(image_id):
                continue
            branches = rows.branches(row, num_images=len(names), where=where, problems=collector.problems)
            paths = [folder / name for name in names]
            if branches and not collector.missing_images(paths, where, lost=len(branches)):
                collector.add([str(path) for path in paths], branches, image_id=image_id, where=where)
        return collector.result(label)
