"""COCO captions: a JSON file with `images` and `annotations`, and a folder of images (cocodataset.org/#format-data)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from vlm.data.readers_common import Collector, ReadResult, Source, SourceError, resolve
from vlm.data.readers_conversations import asked_branch
from vlm.data.readers_json import load_json
from vlm.data.readers_rows import DEFAULT_PROMPT
from vlm.data.readers_text import RowError, answer_text, required_id, whole
from vlm.errors import shown


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
        collector = Collector(inside=self.inside(folder))
        captions = self._captions(content["annotations"], collector)
        known: dict[str, str] = {}
        for index, image in enumerate(content["images"]):
            where = f"{self.annotations}:images row {index}"
            try:
                image_id, name = _image(image)
            except RowError as error:
                collector.bad(where, error.key, error.why)
                continue
            where = f"{where} (id {shown(image['id'])})"
            if image_id in known:
                collector.bad(where, "id", f"two images have this id; the other one is in {known[image_id]}")
                continue
            known[image_id] = where
            if self.limit is not None and len(known) > self.limit:
                continue
            branches = []
            for caption_where, annotation in captions.get(image_id, []):
                try:
                    text = answer_text(annotation, "caption")
                    branches.append(asked_branch(self.prompt, text, where=caption_where, key="prompt"))
                except RowError as error:
                    collector.bad(caption_where, error.key, error.why)
            if image_id not in captions:
                collector.bad(where, "", "no annotation has a caption for this image")
            file = folder / name
            if branches and not collector.missing_images([file], where, lost=len(branches)):
                collector.add([str(file)], branches, image_id=image_id, where=where)
        for image_id in [i for i in captions if i not in known]:
            for where, annotation in captions[image_id]:
                collector.bad(where, "image_id", f"no image has the id {shown(annotation['image_id'])}")
        return collector.result(self.annotations)

    def _captions(self, annotations: list[Any], collector: Collector) -> dict[str, list[tuple[str, dict[str, Any]]]]:
        """The annotations by image id, each with where it stands."""
        by_image: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for index, annotation in enumerate(annotations):
            where = f"{self.annotations}:annotations row {index}"
            try:
                if not isinstance(annotation, dict):
                    raise RowError("", f"expected an object with 'image_id' and 'caption', found {shown(annotation)}")
                image_id = required_id(annotation, "image_id")
            except RowError as error:
                collector.bad(where, error.key, error.why)
                continue
            if "id" in annotation:
                where = f"{where} (id {shown(annotation['id'])})"
            by_image.setdefault(image_id, []).append((where, annotation))
        return by_image


def _image(image: Any) -> tuple[str, str]:
    """The id and the file name of an entry of `images`."""
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
        raise RowError("file_name", f"expected an object with 'id' and 'file_name', found {shown(image)}")
    return required_id(image, "id"), whole(image["file_name"], "file_name")
