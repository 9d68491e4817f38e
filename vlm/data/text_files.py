"""Files of text, on this disk, compressed or remote: their bytes, their encoding, their lines."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vlm.data.example import Problem
from vlm.data.images import LFS_POINTER, WHY_LFS
from vlm.data.readers_common import SourceError

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, gzip.BadGzipFile)
"""What is raised where a compressed file is damaged."""
_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt")


class FoundRow(NamedTuple):
    """A row of a file, or what is wrong with it; where it stands, in words; and the byte that it starts at, if the file
    can be read from there."""

    where: str
    content: dict[str, Any] | Problem
    start: int | None = None


@dataclass(frozen=True)
class TextFile:
    """A file that `datasets` opens by its `url`: a path, an address, or `gzip://rows.csv::https://...`. It is called
    `name` in messages."""

    url: str
    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def on_disk(self) -> bool:
        """Whether it is a file of this disk, as it stands."""
        return "://" not in self.url

    @property
    def suffix(self) -> str:
        """How the name ends, compression apart: `.csv` of `rows.csv.gz`."""
        found = PurePosixPath(self.name.partition("::")[0]).suffixes
        return next((suffix for suffix in reversed(found) if suffix.lower() in _SUFFIXES), "")

    def open(self, mode: str) -> Any:
        from datasets.utils.file_utils import xopen

        return xopen(self.url, mode)


Readable = Path | TextFile


@contextmanager
def read_errors(file: Readable) -> Iterator[None]:
    """What is raised where a file cannot be read, as a SourceError."""
    try:
        yield
    except (OSError, *DAMAGED) as error:
        why = getattr(error, "strerror", None) or error
        raise SourceError(f"{file}: cannot be read ({why}); check the file and its permissions") from error
    except UnicodeDecodeError as error:
        name = error.encoding.upper().removesuffix("-LE").removesuffix("-BE")
        raise SourceError(f"{file}: not {name} text (byte {error.start}); save it as UTF-8") from error


def read_bytes(file: Readable, count: int = -1) -> bytes:
    """Return the first `count` bytes of a file, by default all.

    Raises:
        SourceError: it cannot be read.
    """
    with read_errors(file), file.open("rb") as opened:
        return bytes(opened.read(count))


def encoding_of(file: Readable) -> str:
    """Return the encoding of a file, by its first bytes: UTF-8, UTF-16 or UTF-32, as Python calls them.

    Raises:
        SourceError: it cannot be read, or is a pointer of Git LFS.
    """
    start = read_bytes(file, len(LFS_POINTER))
    if start == LFS_POINTER:
        raise SourceError(f"{file}: {WHY_LFS}")
    encoding = json.detect_encoding(start[:4])
    return "utf-8-sig" if encoding.startswith("utf-8") else encoding


def file_text(file: Readable) -> str:
    """Return the text of a file in UTF-8, UTF-16 or UTF-32.

    Raises:
        SourceError: it cannot be read, or is no such text.
    """
    content = read_bytes(file)
    with read_errors(file):
        return content.decode(encoding_of(file))


def byte_lines(file: Readable) -> Iterator[tuple[int | None, bytes]]:
    """Yield the lines of a file as UTF-8, without their ends (`\\n`, `\\r\\n` or `\\r`), and the byte that each
    starts at, None in another encoding.

    Raises:
        SourceError: it cannot be read.
    """
    if encoding_of(file) != "utf-8-sig":
        for text in io.StringIO(file_text(file), newline=None):
            yield None, text.removesuffix("\n").encode(errors="surrogatepass")
        return
    start = 0
    with read_errors(file), file.open("rb") as opened:
        for line in opened:
            at = start
            for part in line.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
                yield at, part
                at += len(part) + 1
            start += len(line)


def text_lines(file: Readable) -> Iterator[tuple[int | None, str]]:
    """Yield the lines of a file with their ends, as the `csv` module wants them, and the byte that each starts at.
    Bytes that are not UTF-8 become lone surrogates (PEP 383).

    Raises:
        SourceError: it cannot be read, or is no text in its encoding.
    """
    encoding = encoding_of(file)
    start = len(codecs.BOM_UTF8) if read_bytes(file, 3) == codecs.BOM_UTF8 else 0
    with read_errors(file), file.open("rb") as opened:
        for line in io.TextIOWrapper(opened, encoding, errors="surrogateescape", newline=""):
            yield (start if encoding == "utf-8-sig" else None), line
            start += len(line.encode("utf-8", "surrogateescape")) if encoding == "utf-8-sig" else 0


def require_some_utf8(file: Readable) -> None:
    """Raise SourceError if several lines are not UTF-8, and no character outside ASCII is: it is all of another
    encoding. A single such line is a bad row."""
    others: list[int] = []
    for number, (_, line) in enumerate(byte_lines(file), start=1):
        if line.isascii():
            continue
        try:
            line.decode()
        except UnicodeDecodeError:
            others.append(number)
        else:
            if line.strip(codecs.BOM_UTF8):
                return
    if len(others) > 1:
        raise SourceError(
            f"{file}: not UTF-8 text ({len(others):,} lines with characters in another encoding, the first is line "
            f"{others[0]}); save the file as UTF-8"
        )
