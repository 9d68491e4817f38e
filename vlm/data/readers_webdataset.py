"""WebDataset shards: tar files whose members `KEY.FIELD` with the same key are a row.

`datasets` asks that all rows have the same fields, and takes what follows the first dot of a name for its field. Here
the fields that are asked for say where a key ends, so that keys may have dots in them, and `jpg;png` stands for either
of two fields, as in the webdataset package.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

from vlm.data.readers_common import SourceError

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "tga")
_PEEKED = 1000
"""Members of the first shard that are looked at before it is read."""
_TEXTS = ("txt", "text", "transcript", "caption", "cls", "cls2", "class", "count", "index", "inx", "id")
_OBJECTS = ("json", "jsn")


def rows(tars: Sequence[str], columns: Sequence[str], others: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of shards in order: for each of `columns` the content of its field, None where a row has none.
    `others` are fields that are not asked for, such as `seg.png` next to `png`.

    Raises:
        ValueError: a row has the same field twice.
    """
    asked = _by_field(columns)
    fields = [*asked, *others]
    for tar in tars:
        row: dict[str, Any] = {}
        last = ""
        for name, file in _members(tar):
            key, field = split_name(name, fields)
            if field is None or field not in asked:
                continue
            if row and key != last:
                yield row
                row = {}
            row, last, column = row or dict.fromkeys(columns), key, asked[field]
            if row[column] is not None:
                raise ValueError(f"{tar}: two files for {column!r} with the key {key!r}")
            content = file.read()
            is_image = field.rpartition(".")[2] in IMAGE_FIELDS
            row[column] = {"bytes": content, "path": name} if is_image else _value(content, field)
        if row:
            yield row


def _by_field(columns: Sequence[str]) -> dict[str | None, str]:
    """Each field that is asked for, and its column."""
    return {field: column for column in columns for field in column.split(";")}


def split_name(name: str, fields: Iterable[str | None]) -> tuple[str, str | None]:
    """Return the key and the longest of `fields` that a name ends in, or None where it ends in none."""
    lower = posixpath.basename(name).lower()
    ends = [field for field in fields if field is not None and lower.endswith(f".{field.lower()}")]
    if not ends:
        return name, None
    field = max(ends, key=len)
    return name[: -len(field) - 1], field


class Look(NamedTuple):
    """What the first members of a shard show: the fields of its rows, as columns where they are asked for, and those
    that are not asked for."""

    known: list[str]
    others: list[str]


def look(tar: str, columns: Sequence[str], images: str | None) -> Look:
    """Look at the first members of a shard.

    Raises:
        SourceError: some rows have their image in another field than that of the column `images`.
    """
    asked = _by_field(columns)
    names = _first_names(tar)
    # By the first dot, as `datasets` splits names, and right wherever that finds a field that is asked for.
    parts = [(name.removesuffix(posixpath.basename(name)), *posixpath.basename(name).partition(".")) for name in names]
    plain = {(place, key) for place, key, _, field in parts if field in asked}
    others = {field for place, key, _, field in parts if (place, key) in plain and field and field not in asked}
    split = [split_name(name, [*asked, *others]) for name in names]
    with_image = {key for key, field in split if field in asked and asked[field] == images}
    without = {key for key, field in split if field in asked} - with_image if images else set()
    pictures = (split_name(name, IMAGE_FIELDS) for name in names)
    unasked = sorted({field for key, field in pictures if field is not None and key in without})
    if with_image and unasked:
        either = ";".join([str(images), *unasked])
        raise SourceError(
            f"{tar}: some rows have their image in .{unasked[0]}, not in .{images}; to read both, write {either!r} for "
            f"{images!r} in columns"
        )
    found = {asked[field] for _, field in split if field in asked}
    rest = {name.rpartition(".")[2] for name, (_, field) in zip(names, split, strict=True) if field is None}
    return Look(sorted(found | others | rest), sorted(others))


def _first_names(tar: str) -> list[str]:
    names = []
    with suppress(OSError, tarfile.TarError):  # which is said where the shard is read
        for name, _ in islice(_members(tar), _PEEKED):
            names.append(name)
    return names


def _members(tar: str) -> Iterator[tuple[str, Any]]:
    from datasets.download import StreamingDownloadManager

    return iter(StreamingDownloadManager().iter_archive(tar))


def _value(content: bytes, field: str) -> Any:
    """A text, or what a JSON file holds; None where that cannot be read as UTF-8, and bytes of another kind of file."""
    kind = field.rpartition(".")[2]
    if kind not in (*_TEXTS, *_OBJECTS):
        return content
    decode: Callable[[str], Any] = json.loads if kind in _OBJECTS else str
    try:
        value = decode(content.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError):
        return None
