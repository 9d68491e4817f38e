"""LLaVA's JSON (or JSON Lines) of conversations, and a folder of images (github.com/haotian-liu/LLaVA, finetuning)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from vlm.data.readers_common import Collector, ReadResult, Source, files_of, image_sources, images_id, resolve
from vlm.data.readers_conversations import conversation_branch
from vlm.data.readers_json import read_rows
from vlm.data.readers_text import RowError, file_names, id_text, is_null, unknown_near_miss
from vlm.errors import shown

_KNOWN = ("id", "image", "images", "conversations")
_EXPECTED = "expected the name of an image, or a list of names"


class LlavaSource(Source):
    """`path` is the file, `images` the folder that `image` starts at (by default the folder of the file)."""

    format_name: ClassVar[str] = "llava"
    path: str
    images: str | None = None

    def read(self, base_dir: Path) -> ReadResult:
        path = resolve(self.path, base_dir, "path")
        folder = path.parent if self.images is None else resolve(self.images, base_dir, "images", folder=True)
        collector = Collector(self.limit, self.inside(folder, path.parent))
        for where, row in read_rows(path, self.path, collector.problems):
            if "id" in row:
                where = f"{where} (id {shown(row['id'])})"
            if "video" in row:
                collector.bad(where, "video", "videos are not supported")
                continue
            if miss := unknown_near_miss(row, _KNOWN):
                collector.bad(where, *miss)
                continue
            try:
                given = row.get("images") if is_null(row.get("image")) else row["image"]
                names = [] if is_null(given) else file_names(given, "image", _EXPECTED)
                images = image_sources(names, folder, "image")
                image_id = images_id(names, images) or where
                if not collector.wants(image_id):
                    continue
                question_id = id_text(row.get("id"), "id") or where
                key = "messages" if "conversations" not in row and "messages" in row else "conversations"
                branch = conversation_branch(row.get(key), len(names), key, where, question_id)
            except RowError as error:
                collector.bad(where, error.key, error.why)
                continue
            if not collector.missing_images(files_of(images), where):
                collector.add(images, [branch], image_id=image_id, where=where)
        return collector.result(self.path)
