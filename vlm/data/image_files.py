"""Finding the images in folders, and saying what is left out."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image
from rich.console import Console

from vlm.data.images import FORMATS
from vlm.errors import UserError
from vlm.paths import existing
from vlm.printing import printable_name

HIDDEN_FOLDERS = ("__macosx", "@eadir", "#recycle", "$recycle.bin")
"""Where macOS, Synology and Windows keep previews, resource forks and deleted files, in small letters. What begins with
a dot is hidden too: `.trash`, `.ipynb_checkpoints`, and the resource forks `._photo.jpg`."""

EXPECTED_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "thumbs.db", "desktop.ini")
"""What may lie among images, in small letters, without a message: captions in the layout of `datasets`' imagefolder and
files that Windows puts into folders."""

SHOWN = 5
"""Names in a message."""


def _suffixes() -> frozenset[str]:
    Image.init()
    formats = {*FORMATS, "MPO"}  # a JPEG with several images, opened as one
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in formats)


IMAGE_SUFFIXES = _suffixes()
"""How the names of files end that hold one of `FORMATS`, by Pillow: `.jpg`, `.jfif`, `.tga` and so on."""


@dataclass
class ImageFiles:
    """Attributes:
    paths: the images, each once, as the first pattern that finds it spells its name.
    hidden: by hidden folder, or the folder of hidden files, how many images were left out.
    others: files whose names do not end like that of an image.
    unreadable: folders that cannot be read.
    """

    paths: list[str] = field(default_factory=list)
    hidden: Counter[str] = field(default_factory=Counter)
    others: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def left_out(self) -> list[str]:
        """What was left out, each kind in a line for people."""
        lines = []
        if self.hidden:
            places = [f"{place}: {count}" for place, count in self.hidden.items()]
            lines.append(f"{_count(self.hidden.total(), 'hidden image')} ({_some(places)})")
        if self.others:
            lines.append(f"{_count(len(self.others), 'file')} of other types ({_some(self.others)})")
        if self.unreadable:
            folders = _count(len(self.unreadable), "folder")
            lines.append(f"{folders} that cannot be read ({_some(self.unreadable)})")
        return lines

    def show_left_out(self, console: Console) -> None:
        for line in self.left_out():
            console.print(f"left out: {line}", markup=False, highlight=False, soft_wrap=True)


def find_images(patterns: Sequence[str]) -> ImageFiles:
    """Find the files that `patterns` name: files, folders (with what is in their folders), and globs.

    In folders, files whose names end like that of an image (`IMAGE_SUFFIXES`) are taken, and hidden ones are left out;
    links are followed. A file that is named or matches a glob is taken whatever its name ends in.

    Raises UserError for a pattern that finds nothing.
    """
    found = ImageFiles()
    paths: dict[str, str] = {}
    for pattern in patterns:
        mine = ImageFiles()
        path = existing(pattern)
        if path is not None and path.is_dir():
            _scan(str(path), mine)
        elif path is not None:  # before the glob: `photo[1].jpg` may be a file of that name
            mine.paths.append(str(path))
        else:
            _match(os.path.expanduser(pattern), mine)
        if not mine.paths:
            what = "is no file or folder, and no file matches it" if path is None else "has no images in it"
            left_out = mine.left_out()
            what += f"; left out: {', '.join(left_out)}" if left_out else ""
            raise UserError(f"{printable_name(pattern)} {what}")
        for name in sorted(mine.paths):
            paths.setdefault(place_of(name), name)
        found.hidden += mine.hidden
        found.others += mine.others
        found.unreadable += mine.unreadable
    found.paths = list(paths.values())
    return found


def place_of(path: str) -> str:
    """Return the same text for all spellings of a file's name: relative, absolute, or through a link to its folder.
    Links to files are files of their own."""
    folder, name = os.path.split(path)
    return os.path.join(_real_folder(folder, os.getcwd()), name)


@lru_cache(maxsize=1024)
def _real_folder(folder: str, here: str) -> str:
    try:
        return os.path.realpath(os.path.join(here, folder))
    except ValueError:  # a character that no file name has
        return folder


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is left out of what a folder holds."""
    return name.startswith(".") or name.lower() in HIDDEN_FOLDERS


def has_image_suffix(name: str) -> bool:
    """Whether a file's name ends like that of an image, in letters of any case."""
    return os.path.splitext(name.strip())[1].lower() in IMAGE_SUFFIXES


def _scan(folder: str, found: ImageFiles) -> None:
    """Add the images in `folder` and its folders to `found`, and what is left out."""

    def unreadable(error: OSError) -> None:
        found.unreadable.append(str(error.filename))

    visited: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in visited:  # a link back, or a second one to the same folder
            folders.clear()
            continue
        visited.add((here.st_dev, here.st_ino))
        for hidden in filter(is_hidden, folders):
            _add_hidden(found, os.path.join(place, hidden), _images_in(os.path.join(place, hidden)))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        _add_hidden(found, place, sum(is_hidden(name) and has_image_suffix(name) for name in files))
        for name in files:
            if not is_hidden(name) and name.lower() not in EXPECTED_FILES:
                (found.paths if has_image_suffix(name) else found.others).append(os.path.join(place, name))


def _match(pattern: str, found: ImageFiles) -> None:
    """Add the files that match a glob to `found`, and those that are left out for a hidden folder in their path, which
    is not in the pattern itself."""
    named = set(Path(pattern).parts)
    for path in glob.glob(pattern, recursive=True):
        if os.path.isdir(path):
            continue
        hidden = next((part for part in Path(path).parts if part not in named and is_hidden(part)), None)
        if hidden is None:
            found.paths.append(path)
        else:
            found.hidden[f"{printable_name(hidden)}/"] += 1


def _images_in(folder: str) -> int:
    return sum(has_image_suffix(name) for _, _, files in os.walk(folder) for name in files)


def _add_hidden(found: ImageFiles, place: str, count: int) -> None:
    if count:
        found.hidden[printable_name(place)] += count


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _some(names: Sequence[str]) -> str:
    shown = [printable_name(name) for name in names[:SHOWN]]
    return ", ".join([*shown, f"and {len(names) - SHOWN:,} more"] if len(names) > SHOWN else shown)
