"""Reading a source: the dictionary of formats, and `read`. To add a format, write its `Source` and name it here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm.data.readers_coco import CocoCaptionsSource
from vlm.data.readers_common import ReadResult, Source, SourceError
from vlm.data.readers_dataset import DatasetSource
from vlm.data.readers_image_folder import ImageFolderSource
from vlm.data.readers_llava import LlavaSource
from vlm.data.readers_vqa import VQAv2Source
from vlm.errors import nearest

__all__ = ["READERS", "ReadResult", "Source", "SourceError", "parse_source", "read"]

READERS: dict[str, type[Source]] = {
    "image_folder": ImageFolderSource,
    "coco_captions": CocoCaptionsSource,
    "vqav2": VQAv2Source,
    "llava": LlavaSource,
    "dataset": DatasetSource,
}


def parse_source(source: Mapping[str, Any]) -> Source:
    """Check a recipe's source, `{"format": ..., **options}`, without touching the disk.

    Raises:
        SourceError: the format or an option is unknown (the nearest known one is suggested), or missing or wrong.
    """
    if not isinstance(source, Mapping):
        raise SourceError(f"a data source is a mapping with 'format' and its options, found {source!r}")
    options = dict(source)
    name = options.pop("format", None)
    if not isinstance(name, str) or name not in READERS:
        known = ", ".join(READERS)
        if name is None:
            raise SourceError(f"a data source needs a 'format': one of {known}")
        raise SourceError(f"unknown format {name!r}; {nearest(name, READERS)}")
    return READERS[name].parse(options)


def read(source: Mapping[str, Any], *, base_dir: Path | str = ".") -> ReadResult:
    """Read a source whole, except for the pixels: images are checked to be there, and opened only when they are used.

    Args:
        source: the recipe's mapping; docs/data.md shows each format and its options.
        base_dir: where relative paths start, usually the folder of the recipe.

    Raises:
        SourceError: nothing can be read. What is wrong with single rows is returned as problems instead.
    """
    return parse_source(source).read(Path(base_dir))
