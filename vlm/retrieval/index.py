"""An index of images on disk: for each its file, what the file was like, and its vector.

<index>/index.json            format, encoder, encoder_key, and the name of the folder with the rest
<index>/content-.../          files.jsonl: line n is the file of vector n, or empty where there is none any more
                              what vlm.retrieval.vectors writes: the vectors, by those numbers

Content is written into a folder of a new name, and counts once `index.json`, which is replaced in one step, names it:
files and vectors are always of one moment, and whoever is killed while writing leaves the index as it was.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vlm.errors import UserError, cut
from vlm.files import atomic_folder, holds, remove_leftovers, write_text
from vlm.retrieval.vectors import VectorIndex

FORMAT = 2
REMOVED = b""
_KINDS = {"path": str, "size": int, "mtime_ns": int, "sha256": str}


@dataclass(frozen=True)
class IndexedFile:
    """A file as it was when its vector was computed; `path` is absolute."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        path: its file, absolute.
        score: the cosine of the angle to the query's vector.
        sha256: that of the file when it was indexed.
    """

    path: str
    score: float
    sha256: str


class ImageIndex:
    """Files and their vectors, in memory until `save`.

    Args:
        folder: where it is kept.
        encoder: Hub name, or absolute path, of the encoder.
        encoder_key: changes with the encoder's weights and preprocessing (`vlm.data.features.cache_key`).
    """

    def __init__(self, folder: Path, encoder: str, encoder_key: str) -> None:
        self.folder = folder
        self.encoder = encoder
        self.encoder_key = encoder_key
        self._vectors: VectorIndex | None = None  # the first vector says how wide they are
        self._lines: list[bytes] = []
        self._content: str | None = None
        self._changed = False

    @classmethod
    def open(cls, folder: Path) -> ImageIndex:
        """The index in `folder`.

        Raises UserError if there is none, or if it is damaged or of another version.
        """
        try:
            about = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise UserError(f"{folder} has format {about['format']}, and {FORMAT} is read; make the index anew")
            encoder, encoder_key, name = (about[key] for key in ("encoder", "encoder_key", "content"))
            if not all(isinstance(value, str) for value in (encoder, encoder_key, name)) or "/" in name:
                raise ValueError("index.json has values of another kind than text")
            index = cls(folder, encoder, encoder_key)
            content = folder / name
            index._lines = (content / "files.jsonl").read_bytes().split(b"\n")[:-1]
        except FileNotFoundError as error:
            raise UserError(f"{folder} is no index: {error.filename} is missing; vlm index makes one") from None
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder} is no index, or damaged ({cut(str(error))}); make the index anew") from None
        index._vectors = VectorIndex.read(content, np.array([*index._numbers()], dtype=np.int64))
        index._content = about["content"]
        return index

    def __len__(self) -> int:
        return 0 if self._vectors is None else len(self._vectors)

    def files(self) -> dict[int, IndexedFile]:
        """All files by their numbers. Raises UserError if one cannot be read."""
        return {number: self._file(number) for number in self._numbers()}

    def _file(self, number: int) -> IndexedFile:
        try:
            values = json.loads(self._lines[number])
            file = IndexedFile(**values)
            if not all(type(values[name]) is kind for name, kind in _KINDS.items()):
                raise ValueError("a value of another type")
        except (ValueError, TypeError, RecursionError) as error:
            where = self.folder / (self._content or "") / "files.jsonl"
            raise UserError(
                f"{self.folder} is damaged: line {number + 1} of {where} is not that of a file ({cut(str(error))}); "
                "make the index anew"
            ) from None
        return file

    def add(self, files: Sequence[IndexedFile], vectors: np.ndarray) -> None:
        """Add `files` with their unit `vectors [len(files), D]` float32."""
        numbers = np.arange(len(self._lines), len(self._lines) + len(files))
        if self._vectors is None:
            self._vectors = VectorIndex(vectors.shape[1])
        self._vectors.add(numbers, vectors)
        self._lines += [_line(file) for file in files]
        self._changed = True

    def remove(self, numbers: Sequence[int]) -> None:
        if self._vectors is not None and numbers:
            self._vectors.remove(np.array(numbers, dtype=np.int64))
            for number in numbers:
                self._lines[number] = REMOVED
            self._changed = True

    def replace(self, number: int, file: IndexedFile) -> None:
        """Say of a vector that it is now of `file`, which has the same content."""
        self._changed |= self._lines[number] != _line(file)
        self._lines[number] = _line(file)

    def search(self, vector: np.ndarray, k: int) -> list[Hit]:
        """The up to `k` images whose vectors have the largest inner product with the unit `vector [D]`, best first."""
        if self._vectors is None:
            return []
        if self._vectors.dimension != len(vector):
            raise UserError(
                f"{self.folder} is damaged: its vectors have {self._vectors.dimension} numbers, and those of "
                f"{self.encoder} {len(vector)}; make the index anew"
            )
        scores, numbers = self._vectors.search(vector, k)
        found = [(self._file(number), float(score)) for number, score in zip(numbers, scores, strict=True)]
        return [Hit(file.path, score, file.sha256) for file, score in found]

    def save(self) -> None:
        """Replace what is on disk, in one step, if there is a change, and it was not interrupted half way.

        Raises UserError if another process has replaced it since.
        """
        whole = len(self) == len(self._lines) - self._lines.count(REMOVED)
        if self._vectors is None or not self._changed or not whole:
            return
        content = self.folder / f"content-{uuid.uuid4().hex[:12]}"
        with atomic_folder(content) as unfinished:
            self._vectors.write(unfinished)
            with (unfinished / "files.jsonl").open("wb") as file:
                file.writelines(line + b"\n" for line in self._lines)
        if self._content_on_disk() != self._content:
            shutil.rmtree(content)
            raise UserError(f"{self.folder} was changed by another vlm index meanwhile; run this one again")
        about = {"encoder": self.encoder, "encoder_key": self.encoder_key, "content": content.name}
        try:
            write_text(self.folder / "index.json", json.dumps({"format": FORMAT, **about}, indent=1))
        except BaseException:
            shutil.rmtree(content, ignore_errors=True)
            raise
        self._content, self._changed = content.name, False
        self.remove_others()

    def remove_others(self) -> None:
        """Remove contents that are not this index's: older ones, and what killed processes left."""
        remove_leftovers(self.folder)
        for old in self.folder.glob("content-*"):
            if old.name != self._content:
                shutil.rmtree(old, ignore_errors=True)

    def _content_on_disk(self) -> str | None:
        try:
            return json.loads((self.folder / "index.json").read_text(encoding="utf-8"))["content"]
        except FileNotFoundError:
            return None

    def _numbers(self) -> Iterator[int]:
        return (number for number, line in enumerate(self._lines) if line != REMOVED)


def holds_content_only(folder: Path) -> bool:
    """Whether `folder` is empty, or what a first `save` leaves that was killed."""
    return folder.is_dir() and all(name.startswith("content-") for name in holds(folder))


def _line(file: IndexedFile) -> bytes:
    return json.dumps(asdict(file)).encode()  # in ASCII, so that a name of any bytes comes back, and no line breaks
