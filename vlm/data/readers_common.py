"""What all readers share: options checked before reading, files named in errors, branches grouped by image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from vlm.data.example import Branch, Example, ImageSource, Message, Problem
from vlm.errors import UserError, nearest


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
    """The options of one format, checked before anything is read. `limit` keeps the first so many images."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format_name: ClassVar[str]

    limit: PositiveInt | None = None

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
    tried = base_dir / Path(path).expanduser()
    if folder and not tried.is_dir():
        raise SourceError(f"option {option!r}: no such folder: {tried}")
    if not folder and not tried.is_file():
        raise SourceError(f"option {option!r}: no such file: {tried}")
    return tried


def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        SourceError: it is not valid JSON; the message names file, line and column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise SourceError(f"{path}: not valid JSON: {error.msg} at {where}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def load_json_list(path: Path, key: str) -> list[Any]:
    """The list under a key of a JSON object.

    Raises:
        SourceError: the file holds no such list.
    """
    content = load_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        found = (
            f"an object with {', '.join(map(repr, content))}" if isinstance(content, dict) else type(content).__name__
        )
        raise SourceError(f"{path}: expected an object with a list under {key!r}, found {found}")
    return list(content[key])


def read_json_lines(path: Path, label: str, problems: list[Problem]) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines file, and where each stands. Bad lines go to `problems`; empty lines are fine."""
    rows: list[tuple[str, dict[str, Any]]] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{label}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except json.JSONDecodeError as error:
                problems.append(Problem(where, "", f"not valid JSON: {error.msg} at column {error.colno}"))
            except UnicodeDecodeError as error:
                problems.append(Problem(where, "", f"not UTF-8 text (byte {error.start} of the line)"))
            else:
                if isinstance(row, dict):
                    rows.append((where, row))
                else:
                    problems.append(Problem(where, "", f"expected an object {{...}}, found {type(row).__name__}"))
    return rows


class Collector:
    """Gathers branches under their images, in order of first appearance, and the problems met on the way."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.problems: list[Problem] = []
        self._examples: dict[tuple[str, str], Example] = {}
        self._ids: set[str] = set()

    @property
    def full(self) -> bool:
        """Whether `limit` images are there already."""
        return self.limit is not None and len(self._ids) >= self.limit

    def bad(self, where: str, key: str, why: str, lost: int = 1) -> None:
        """Note something bad."""
        self.problems.append(Problem(where, key, why, lost))

    def wants(self, image_id: str) -> bool:
        """Whether an image with this id is within the limit."""
        return not self.full or image_id in self._ids

    def add(self, images: Sequence[ImageSource], branches: Sequence[Branch], *, image_id: str, where: str) -> None:
        """Add branches to the example of these images.

        Branches share an example only when everything up to the last image is the same in them, since an example's
        images are encoded once and seen by all its branches.
        """
        if not self.wants(image_id):
            return
        self._ids.add(image_id)
        for branch in branches:
            key = (image_id, _up_to_last_image(branch.messages) if images else branch.where)
            if key in self._examples:
                found = self._examples[key]
                self._examples[key] = replace(found, branches=(*found.branches, branch))
            else:
                self._examples[key] = Example(tuple(images), (branch,), image_id, where)

    def missing_images(self, paths: Sequence[Path], where: str, lost: int = 1) -> bool:
        """Note the first of these image files that is not there; whether there was one. Opens none of them."""
        for path in paths:
            if not path.is_file():
                self.bad(where, "image", f"no such image: {path}", lost)
                return True
        return False

    def result(self, label: str) -> ReadResult:
        """Everything that was added.

        Raises:
            SourceError: nothing was added and nothing was bad.
        """
        if not self._examples and not self.problems:
            raise SourceError(f"{label}: there is not a single row in it")
        return ReadResult([_share_references(example) for example in self._examples.values()], self.problems)


def _up_to_last_image(messages: Sequence[Message]) -> str:
    parts = [(m["role"], i, part) for i, m in enumerate(messages) for part in m["content"]]
    last = max(position for position, (_, _, part) in enumerate(parts) if part["type"] == "image")
    return repr(parts[: last + 1])  # a third of the time of json.dumps, over half a million questions


def _share_references(example: Example) -> Example:
    """Several answers to one and the same question (five captions of an image) are references of each other."""
    if all(branch.references for branch in example.branches):
        return example
    groups: dict[str, list[str]] = {}
    keys = [repr(branch.messages[:-1]) for branch in example.branches]
    for key, branch in zip(keys, example.branches, strict=True):
        groups.setdefault(key, []).extend(branch.all_references)
    branches = tuple(
        branch if branch.references or len(groups[key]) == 1 else replace(branch, references=tuple(groups[key]))
        for key, branch in zip(keys, example.branches, strict=True)
    )
    return replace(example, branches=branches)
