"""An index brought up to date with its files: what is new or changed is encoded, what is gone is removed."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import track

from vlm.data.encoding import BATCH_IMAGES
from vlm.data.images import ImageError, image_sha256
from vlm.embedding import Embedder
from vlm.retrieval.index import ImageIndex, IndexedFile

SAVE_EVERY = 60.0
"""Seconds of encoding that may be lost if the process is killed; more for an index that takes long to write."""
SAVE_SHARE = 0.05
"""The share of the time that may go into writing."""


@dataclass
class Changes:
    """How many files an update found new, changed, moved (of a new name), gone and as they were; and what did not
    open."""

    new: int = 0
    changed: int = 0
    moved: int = 0
    gone: int = 0
    same: int = 0
    broken: list[ImageError] = field(default_factory=list)

    def __str__(self) -> str:
        counts = {
            "new": self.new, "changed": self.changed, "moved": self.moved, "gone": self.gone, "as before": self.same,
            "could not be opened": len(self.broken),
        }  # fmt: skip
        return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def update(index: ImageIndex, paths: Sequence[str], embedder: Embedder, *, console: Console) -> Changes:
    """Bring `index` up to date with the files `paths`, and forget files that are no longer there, named or not.

    A file is the same if its size and time are, or else its content. One that does not open is not in the index
    afterwards, and is tried again next time. The index is saved now and then, and also when an exception ends it.
    """
    changes = Changes()
    try:
        missing = _compare(index, [os.path.abspath(path) for path in paths], changes, console)
        _encode(index, missing, embedder, changes, console)
    finally:
        index.save()
    return changes


def _compare(
    index: ImageIndex, paths: Sequence[str], changes: Changes, console: Console
) -> dict[str, tuple[IndexedFile, bool]]:
    """Take out of the index what is no longer so, let it follow files that were moved, and give the files to encode, by
    their paths, with whether they were there with another content."""
    files = index.files()
    numbers = {file.path: number for number, file in files.items()}
    gone: dict[str, list[int]] = {}
    for number, file in files.items():
        if not os.path.exists(file.path):
            gone.setdefault(file.sha256, []).append(number)
    missing = {}
    for path in track(paths, "looking at files", console=console, disable=not console.is_terminal):
        known = numbers.get(path)
        before = None if known is None else files[known]
        try:
            file = _file_at(path, before)
        except ImageError as error:
            changes.broken.append(error)
            index.remove([] if known is None else [known])
            continue
        if known is not None and before and file.sha256 == before.sha256:
            changes.same += 1
            index.replace(known, file)
        elif known is None and gone.get(file.sha256):
            changes.moved += 1
            index.replace(gone[file.sha256].pop(), file)
        else:
            index.remove([] if known is None else [known])
            missing[path] = file, known is not None
    left = [number for numbers in gone.values() for number in numbers]
    index.remove(left)
    changes.gone = len(left)
    return missing


def _file_at(path: str, before: IndexedFile | None) -> IndexedFile:
    """What the file is like now; its content is read only if size or time are other than `before`.

    Raises ImageError for a file that cannot be read, or is too large.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise ImageError(path, f"cannot be read ({error.strerror})", "check the file and its permissions") from error
    if before and (before.size, before.mtime_ns) == (found.st_size, found.st_mtime_ns):
        return before
    return IndexedFile(path, found.st_size, found.st_mtime_ns, image_sha256(path))


def _encode(
    index: ImageIndex,
    missing: Mapping[str, tuple[IndexedFile, bool]],
    embedder: Embedder,
    changes: Changes,
    console: Console,
) -> None:
    broken: dict[str, ImageError] = {}
    batches = embedder.embed_images({path: path for path in missing}, broken=broken)
    total = -(-len(missing) // BATCH_IMAGES)
    saved, pause = time.monotonic(), SAVE_EVERY
    for batch in track(
        batches, "encoding images", total, console=console, disable=not (missing and console.is_terminal)
    ):
        files = [missing[path] for path in batch.images]
        index.add([file for file, _ in files], batch.features.cpu().numpy())
        changes.changed += sum(changed for _, changed in files)
        changes.new += sum(not changed for _, changed in files)
        if time.monotonic() - saved >= pause:
            start = time.monotonic()
            index.save()
            saved = time.monotonic()
            pause = max(SAVE_EVERY, (saved - start) / SAVE_SHARE)
    changes.broken += broken.values()
