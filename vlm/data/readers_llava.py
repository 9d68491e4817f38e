"""LLaVA's JSON (or JSON Lines) of conversations, and a folder of images (github.com/haotian-liu/LLaVA, finetuning)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from vlm.data.readers_common import Collector, ReadResult, Source, SourceError, load_json, read_json_lines, resolve
from vlm.data.readers_rows import RowError, llava_branch, unknown_near_miss

_KNOWN = ("id", "image", "images", "conversations")


class LlavaSource(Source):
    """`path` is the file, `images` the folder that `image` starts at (by default the folder of the file)."""

    format_name: ClassVar[str] = "llava"
    path: str
    images: str | None = None

    def read(self, base_dir: Path) -> ReadResult:
        path = resolve(self.path, base_dir, "path")
        folder = path.parent if self.images is None else resolve(self.images, base_dir, "images", folder=True)
        collector = Collector(self.limit)
        for where, row in self._rows(path, collector):
            if "video" in row:
                collector.bad(where, "video", "videos are not supported")
                continue
            if miss := unknown_near_miss(row, _KNOWN):
                collector.bad(where, *miss)
                continue
            names = row.get("images") if row.get("image") is None else row["image"]
            names = [] if names is None else [names] if isinstance(names, str) else names
            if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
                collector.bad(where, "image", "expected the name of an image, or a list of names")
                continue
            image_id = "|".join(names) or where
            if not collector.wants(image_id):
                continue
            try:
                branch = llava_branch(row.get("conversations"), len(names), where)
            except RowError as error:
                collector.bad(where, error.key, error.why)
                continue
            paths = [folder / name for name in names]
            if not collector.missing_images(paths, where):
                collector.add([str(p) for p in paths], [branch], image_id=image_id, where=where)
        return collector.result(self.path)

    def _rows(self, path: Path, collector: Collector) -> list[tuple[str, dict[str, Any]]]:
        if path.suffix == ".jsonl":
            return read_json_lines(path, self.path, collector.problems)
        content = load_json(path)
        if not isinstance(content, list):
            raise SourceError(f"{path}: not LLaVA JSON: expected a list of rows, found {type(content).__name__}")
        rows = []
        for index, row in enumerate(content):
            where = f"{self.path}:row {index}"
            if isinstance(row, dict):
                rows.append((f"{where} (id {row['id']!r})" if "id" in row else where, row))
            else:
                collector.bad(where, "", f"expected an object {{...}}, found {type(row).__name__}")
        return rows
