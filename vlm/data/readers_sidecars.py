"""Captions in text files next to their images: `cat.jpg` and `cat.txt`, as trainers of diffusion models read them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.data.example import Problem
from vlm.data.image_files import find_images, is_hidden
from vlm.data.readers_common import SourceError
from vlm.data.text_files import file_text
from vlm.errors import UserError

CAPTION_SUFFIXES = (".txt", ".caption")
_OTHER_TEXTS = ("readme", "license", "classes", "requirements")
"""How text files begin that are about a folder, not about an image."""
_BOXES = re.compile(r"\s*[0-9]+(?:\s+[0-9.]+){4,}\s*")


def has_captions(folder: Path) -> bool:
    """Whether one of the images in a folder, or in its folders, has a caption file."""
    return any(_caption_of(image) for image in _images(folder))


def caption_rows(folder: Path, label: str, problems: list[Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a row for each image in a folder, and in its folders, that has a caption file, and where that is. The
    caption is all that is in the file. Images without one, and caption files without an image, go to `problems`.

    Raises:
        SourceError: it holds the folders of several splits.
    """
    splits = [entry.name for entry in os.scandir(folder) if entry.is_dir() and _SPLIT.match(entry.name)]
    train = [name for name in splits if name.lower().startswith("train")]
    if train and len(splits) > 1:
        raise SourceError(f"{folder} has the folders {' and '.join(sorted(splits))}; set path to {folder / train[0]}")
    told = set()
    for image in _images(folder):
        name = os.path.relpath(image, folder)
        caption = _caption_of(image)
        if caption is None:
            why = f"there is no {Path(name).stem}.txt next to it"
            problems.append(Problem(str(Path(label) / name), "caption", why))
            continue
        told.add(caption)
        where = str(Path(label) / os.path.relpath(caption, folder))
        try:
            text = file_text(Path(caption))
        except SourceError as error:
            problems.append(Problem(where, "caption", str(error)))
            continue
        if _BOXES.fullmatch(text):
            problems.append(
                Problem(where, "caption", "these are numbers, as of boxes in YOLO's format, and no caption")
            )
            continue
        yield where, {"file_name": name, "caption": text}
    for caption in _caption_files(folder):
        if caption not in told:
            where = str(Path(label) / os.path.relpath(caption, folder))
            problems.append(Problem(where, "image", f"there is no image called {Path(caption).stem} next to it"))


_SPLIT = re.compile("(train|val|test|dev)", re.IGNORECASE)


def _images(folder: Path) -> list[str]:
    try:
        return find_images([str(folder)]).paths
    except UserError:
        return []


def _caption_of(image: str) -> str | None:
    stem = os.path.splitext(image)[0]
    return next((stem + suffix for suffix in CAPTION_SUFFIXES if os.path.isfile(stem + suffix)), None)


def _caption_files(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(files):
            if name.endswith(CAPTION_SUFFIXES) and not name.startswith(".") and not _is_other(name):
                yield os.path.join(place, name)


def _is_other(name: str) -> bool:
    return name.lower().startswith(_OTHER_TEXTS)
