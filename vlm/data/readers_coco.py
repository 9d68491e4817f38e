"""COCO captions: a JSON file with `images` and `annotations`, and a folder of images (cocodataset.org/#format-data)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from vlm.data.example import question_and_answer
from vlm.data.readers_common import Collector, ReadResult, Source, SourceError, load_json, resolve
from vlm.data.readers_rows import DEFAULT_PROMPT, RowError, required_text


class CocoCaptionsSource(Source):
    """`annotations` is the JSON file, `images` the folder that its `file_name`s start at."""

    format_name: ClassVar[str] = "coco_captions"
    annotations: str
    images: str
    prompt: str = DEFAULT_PROMPT

    def read(self, base_dir: Path) -> ReadResult:
        content = load_json(path := resolve(self.annotations, base_dir, "annotations"))
        folder = resolve(self.images, base_dir, "images", folder=True)
        for key in ("images", "annotations"):
            if not isinstance(content, dict) or not isinstance(content.get(key), list):
                raise SourceError(
                    f"{path}: not COCO captions: expected an object with lists 'images' and 'annotations'"
                )
        collector = Collector()
        captions = self._captions(content["annotations"], collector)
        known: set[Any] = set()
        for index, image in enumerate(content["images"]):
            where = f"{self.annotations}:images row {index}"
            if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
                collector.bad(where, "file_name", "expected an object with 'id' and 'file_name'")
                continue
            where = f"{where} (id {image['id']})"
            if image["id"] in known:
                collector.bad(where, "id", "two images have this id")
                continue
            known.add(image["id"])
            if self.limit is not None and len(known) > self.limit:
                continue
            branches = []
            for caption_where, annotation in captions.get(image["id"], []):
                try:
                    text = required_text(annotation, "caption")
                except RowError as error:
                    collector.bad(caption_where, error.key, error.why)
                else:
                    branches.append(question_and_answer(self.prompt, text, where=caption_where))
            if image["id"] not in captions:
                collector.bad(where, "", "no annotation has a caption for this image")
            file = folder / image["file_name"]
            if branches and not collector.missing_images([file], where, lost=len(branches)):
                collector.add([str(file)], branches, image_id=str(image["id"]), where=where)
        for image_id in [i for i in captions if i not in known]:
            for where, _ in captions[image_id]:
                collector.bad(where, "image_id", f"no image has the id {image_id}")
        return collector.result(self.annotations)

    def _captions(self, annotations: list[Any], collector: Collector) -> dict[Any, list[tuple[str, dict[str, Any]]]]:
        """The annotations by image id, each with where it stands."""
        by_image: dict[Any, list[tuple[str, dict[str, Any]]]] = {}
        for index, annotation in enumerate(annotations):
            where = f"{self.annotations}:annotations row {index}"
            if not isinstance(annotation, dict) or not isinstance(annotation.get("image_id"), int | str):
                collector.bad(where, "image_id", "expected an object with 'image_id' and 'caption'")
                continue
            if "id" in annotation:
                where = f"{where} (id {annotation['id']})"
            by_image.setdefault(annotation["image_id"], []).append((where, annotation))
        return by_image
