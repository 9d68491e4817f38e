"""What all readers share: options checked before reading, files named in errors, branches grouped by image."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self
from urllib.parse import unquote

from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from vlm.data.example import Branch, Example, ImageSource, Message, Problem, StoredImage
from vlm.data.inline_images import inline_image
from vlm.data.inside import Inside
from vlm.errors import UserError, cut, nearest

_ARCHIVES = ("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4")
"""How fsspec calls what files are inside of."""
_NUMBERED = re.compile("#[0-9]+$")
_ADDRESS = re.compile(r"(?:^|/)([A-Za-z][A-Za-z0-9+.-]+):/+(.*)")


class SourceError(UserError):
    """A source that cannot be read at all: a wrong option, a missing file, a file that is not of its format."""


class ReadResult(NamedTuple):
    """The examples of a source, and what was bad in it."""

    examples: list[Example]
    problems: list[Problem]

    @property
    def total(self) -> int:
        """How many branches the source holds: those that were read and those that were lost."""
        return sum(len(e.branches) for e in self.examples) + sum(p.lost for p in self.problems)


class Source(BaseModel):
    """The options of one format, checked before anything is read. `limit` keeps the first so many images. With
    `allow_outside` images may lie outside the folders of the data, at absolute paths, past `..` or behind links."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format_name: ClassVar[str]

    limit: PositiveInt | None = None
    allow_outside: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """Check the options.

        Raises:
            SourceError: an option is unknown (with the nearest known one), missing or of the wrong type; all are named.
        """
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            lines = [_option_error(e, cls) for e in error.errors()]
            raise SourceError(f"data source of format {cls.format_name!r}: " + "; ".join(lines)) from None

    def inside(self, *folders: Path) -> Inside | None:
        """Where images may be, if these are the folders of the data; None for anywhere."""
        return None if self.allow_outside else Inside(folders)

    def read(self, base_dir: Path) -> ReadResult:
        """Read everything but the pixels. Relative paths start at `base_dir`."""
        raise NotImplementedError


def _option_error(error: Any, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        for part in error["loc"][:-1]:
            inner = model.model_fields[part].annotation
            model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
        known = list(model.model_fields)
        return f"unknown option {key!r}; {nearest(error['loc'][-1], known)}"
    if error["type"] == "missing":
        return f"option {key!r} is missing"
    reason = str(error["msg"]).removeprefix("Value error, ")
    return f"option {key!r}: {reason}" if key else reason


def resolve(path: str, base_dir: Path, option: str, *, folder: bool = False) -> Path:
    """The file (or folder) an option names.

    Raises:
        SourceError: it is not there; the message says which path was tried.
    """
    tried = base_dir / os.path.expanduser(path)
    if os.path.isdir(tried) if not folder else os.path.isfile(tried):
        is_there, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
        raise SourceError(f"option {option!r}: {tried} is {is_there}, and {wanted} is wanted")
    if folder and not os.path.isdir(tried):
        raise SourceError(f"option {option!r}: no such folder: {tried}")
    if not folder and not os.path.isfile(tried):
        raise SourceError(f"option {option!r}: no such file: {tried}")
    return tried


@dataclass(eq=False)
class _Images:
    """Images that have an id, and the place of the row that was first to name them."""

    images: tuple[ImageSource, ...]
    where: str

    @cached_property
    def identity(self) -> tuple[Any, ...]:
        """What tells these images from others: the names of files, or the SHA-256 of what is stored."""
        return tuple(map(_identity, self.images))


class Collector:
    """Gathers branches under their images, in order of first appearance, and the problems met on the way.

    Rows with the same id belong together only where they name the same images. Other images with that id are examples
    of their own, whose ids name the row too.
    """

    def __init__(self, limit: int | None = None, inside: Inside | None = None) -> None:
        self.limit = limit
        self.inside = inside
        self.problems: list[Problem] = []
        self._gathered: dict[tuple[_Images, str], tuple[str, str, list[Branch]]] = {}
        """Of each example its id, where it was first named, and its branches."""
        self._num_images = 0
        self._first: dict[str, _Images] = {}
        self._shared: dict[tuple[str, tuple[Any, ...]], _Images] = {}

    @property
    def full(self) -> bool:
        """Whether `limit` images are there already."""
        return self.limit is not None and self._num_images >= self.limit

    def bad(self, where: str, key: str, why: str, lost: int = 1) -> None:
        """Note something bad."""
        self.problems.append(Problem(where, key, why, lost))

    def wants(self, image_id: str) -> bool:
        """Whether an image with this id may be within the limit."""
        return not self.full or image_id in self._first

    def add(self, images: Sequence[ImageSource], branches: Sequence[Branch], *, image_id: str, where: str) -> None:
        """Add branches to the example of these images.

        Branches share an example only when everything up to the last image is the same in them, since an example's
        images are encoded once and seen by all its branches.
        """
        found = self._images(_Images(tuple(images), where), image_id)
        if found is None:
            return
        name = image_id if found is self._first[image_id] else f"{image_id} ({found.where})"
        for branch in branches:
            key = (found, _up_to_last_image(branch.messages) if images else branch.where)
            self._gathered.setdefault(key, (name, where, []))[2].append(branch)

    def _images(self, new: _Images, image_id: str) -> _Images | None:
        """The images of this id that are the same as the new ones; else these, or None where there are enough."""
        found: _Images | None = None
        if image_id in self._first:  # else nothing is compared, for which stored images would be read
            first = self._first[image_id]
            self._shared[image_id, first.identity] = first
            found = self._shared.get((image_id, new.identity))
        if found is None and not self.full:
            found = self._first.setdefault(image_id, new)
            if found is not new:
                found = self._shared[image_id, new.identity] = new
            self._num_images += 1
        return found

    def missing_images(self, paths: Iterable[Path], where: str, lost: int = 1) -> bool:
        """Note the first of these image files that is not there, or outside the folders of the data; whether there was
        one. Opens none of them."""
        for path in paths:
            if not os.path.isfile(path):  # which is also said of names that are too long for any file
                self.bad(where, "image", _why_missing(path), lost)
                return True
            if self.inside is not None and not self.inside.holds(path):
                folders = " or ".join(map(str, self.inside.folders))
                why = f"{path} is outside {folders}; if you trust the data, set allow_outside: true in its source"
                self.bad(where, "image", why, lost)
                return True
        return False

    def result(self, label: str) -> ReadResult:
        """Everything that was added.

        Raises:
            SourceError: nothing was added and nothing was bad.
        """
        if not self._gathered and not self.problems:
            raise SourceError(f"{label}: there is not a single row in it")
        examples = (
            Example(group.images, tuple(branches), name, where)
            for (group, _), (name, where, branches) in self._gathered.items()
        )
        return ReadResult(list(map(_share_references, examples)), self.problems)


def image_sources(names: Sequence[str], folder: Path, key: str) -> list[ImageSource]:
    """Return what the names in a row stand for: files in `folder`, or images in base64.

    Raises:
        RowError: base64 that cannot be decoded.
    """
    sources: list[ImageSource] = []
    for name in names:
        inline = inline_image(name, key)
        sources.append(str(_file(folder, name)) if inline is None else inline)
    return sources


def _file(folder: Path, name: str) -> Path:
    """A file in a folder whose name may be as another system writes it: with backslashes, accents as characters of
    their own, as in web addresses (`%20`), or with the number of a caption, as in Flickr8k (`a.jpg#0`)."""
    path = folder / name
    if "\\" in name or "%" in name or "#" in name or not name.isascii():
        slashed = name.replace("\\", "/")
        ways = [
            slashed,
            _NUMBERED.sub("", name),
            *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD")),
            unquote(slashed),
        ]
        return next((folder / way for way in (name, *ways) if os.path.isfile(folder / way)), path)
    return path


def _why_missing(path: Path) -> str:
    if address := _ADDRESS.search(str(path)):  # `Path` made one slash of two
        web = cut(f"{address[1]}://{address[2]}", 300)
        if address[1] in _ARCHIVES:
            return f"{web} is in an archive; unpack it first"
        return f"{web} is an address, and data is never fetched while training; download it first"
    return f"no such image: {cut(str(path), 300)}{_called_otherwise(path)}"


def _called_otherwise(path: Path) -> str:
    """The file that is there, if it is called so but for capitals."""
    if os.path.islink(path):
        return f"; it is a link to {cut(os.readlink(path), 300)}, which is not there"
    found = _small_letters(path.parent).get(path.name.lower())
    return f"; there is {found}, and capitals matter: write the name so" if found else ""


@lru_cache(maxsize=4)
def _small_letters(folder: Path) -> dict[str, str]:
    """The names in a folder by the same in small letters."""
    try:
        return {name.lower(): name for name in os.listdir(folder)}
    except OSError:
        return {}


def files_of(images: Sequence[ImageSource]) -> list[Path]:
    """Return the images that are files."""
    return [Path(image) for image in images if isinstance(image, str)]


def images_id(names: Sequence[str], images: Sequence[ImageSource]) -> str:
    """Return an id for images without one: the names of their files, or a hash of those that are no files."""
    hashed = (f"sha256:{hashlib.sha256(i).hexdigest()[:16]}" if isinstance(i, bytes) else "" for i in images)
    return "|".join(digest or name for digest, name in zip(hashed, names, strict=True))


def _identity(image: ImageSource) -> Any:
    stored = image.fetch() if isinstance(image, StoredImage) else image
    if isinstance(stored, Image.Image):
        return id(stored)
    return hashlib.sha256(stored).digest() if isinstance(stored, bytes) else stored


def _up_to_last_image(messages: Sequence[Message]) -> str:
    parts = [(m["role"], i, part) for i, m in enumerate(messages) for part in m["content"]]
    last = max(position for position, (_, _, part) in enumerate(parts) if part["type"] == "image")
    return repr(parts[: last + 1])  # a third of the time of json.dumps, over half a million questions


def _share_references(example: Example) -> Example:
    """Five captions of an image, asked for by the same prompt, are references of each other; so are the answers to one
    question, which its id tells from others of the same words."""
    if all(branch.references for branch in example.branches):
        return example
    groups: dict[tuple[str, str | None], list[str]] = {}
    keys = [(repr(branch.messages[:-1]), branch.question_id) for branch in example.branches]
    for key, branch in zip(keys, example.branches, strict=True):
        groups.setdefault(key, []).extend(branch.all_references)
    shared = {key: tuple(references) for key, references in groups.items()}
    branches = tuple(
        branch if shared[key] == branch.all_references else replace(branch, references=shared[key])
        for key, branch in zip(keys, example.branches, strict=True)
    )
    return replace(example, branches=branches)
