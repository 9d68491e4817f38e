"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from vlm.disk_faults import is_write_fault, saving
from vlm.errors import UserError
from vlm.locks import (
    LOCK,
    InUse,
    beside,
    cannot_write_in,
    held,
    lock_beside,
    locked,
    locked_if_possible,
    real_path,
    stem,
    written_inside,
)

WRITING = ".writing"
"""How the name of a file or folder ends that is not whole yet: `.NAME.<8 hexadecimal digits>.writing`."""


_UNFINISHED = re.compile(r"(?P<file>\.(?P<name>.+)\.[0-9a-f]{8}\.writing)(\.lock)?", re.DOTALL)


@contextmanager
def atomic_write(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a file that replaces `path` when the block ends, whole and on disk. After an exception, `path` is unchanged.

    Text is UTF-8. The folder is created if missing. A device or a pipe is written directly.
    Raises DiskError if the disk is full.
    """
    encoding = None if mode == "wb" else "utf-8"
    path = real_path(path)  # a link stays a link
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    if path.exists() and not path.is_file():
        with path.open(mode, encoding=encoding) as file:
            yield file
        return
    with _temporary(path) as temporary:
        with temporary.open(mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_names(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `path` when the block ends, with all its files on disk.

    After an exception, there is nothing at `path`. Raises UserError if `path` already holds something, and DiskError if
    the disk is full.
    """
    path = real_path(path)
    require_new(path)
    inside = written_inside(path)
    with _temporary(path / path.name if inside else path) as temporary:
        temporary.mkdir()
        yield temporary
        _sync_all(temporary)
        require_new(path)
        if inside:
            for child in temporary.iterdir():
                child.rename(path / child.name)
            _sync_names(path)
            return
        if path.exists():
            path.rmdir()
        temporary.rename(path)
        _sync_names(path.parent)


@contextmanager
def replacing_files(folder: Path, last: str) -> Iterator[Path]:
    """Give an empty folder whose files go to `folder` when the block ends, all on disk first. The names in the folder
    that are there already are replaced, the others stay.

    The file `last` says that the files belong together: the earlier one is removed first, and the new one comes last.
    So a process that is killed in between leaves no `last`, and never one with files of another time. After an
    exception in the block, `folder` is unchanged. Raises DiskError if the disk is full.
    """
    folder = real_path(folder)
    with _temporary(folder / folder.name) as temporary:
        temporary.mkdir()
        yield temporary
        _sync_all(temporary)
        (folder / last).unlink(missing_ok=True)
        _sync_names(folder)
        for child in sorted(temporary.iterdir(), key=lambda child: child.name == last):
            if child.name == last:
                _sync_names(folder)
            child.replace(folder / child.name)
        _sync_names(folder)


@contextmanager
def new_file(path: Path | None) -> Iterator[None]:
    """Hold the lock on a file that does not exist yet and will be written by [`atomic_write`]; None means no file.

    Raises InUse if another process writes it, and UserError if it exists.
    """
    if path is None:
        yield
        return
    with locked(path, "Wait until it ends, or choose another --output."):
        if path.is_file() or path.is_dir():
            raise UserError(f"{path} exists already; choose another --output, or remove it")
        yield


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder next to `path` that nobody else can read. It is removed at the end, or, if this process is
    killed, by the next call with this `path`."""
    with _temporary(path) as temporary:
        temporary.mkdir(mode=0o700)
        yield temporary


def require_new(path: Path) -> None:
    """Raise UserError if there is a file, or a folder that holds more than a lock and what killed processes left."""
    if path.is_dir() and not holds(path):
        return
    if path.exists():
        raise UserError(f"{path} exists already; choose another name, or remove it")


def holds(folder: Path) -> list[str]:
    """Return what is in a folder besides a lock and what is being written, or was, in processes that were killed."""
    return sorted(name for name in os.listdir(folder) if name != LOCK and not _UNFINISHED.fullmatch(name))


def _sync_all(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        _sync_names(Path(parent))


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or as it was before, whenever the process ends."""
    with atomic_write(path) as file:
        file.write(text)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, through to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _sync_names(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a program cannot
        sync(folder)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Give a name next to `path` to write to. What is left under it is removed at the end, and by the next call if this
    process is killed."""
    temporary = beside(path, f"{uuid.uuid4().hex[:8]}{WRITING}")
    with saving(str(path), "Make room, and run the command again", is_write_fault), ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, path.name)
            stack.enter_context(locked_if_possible(temporary))
        except OSError as error:
            if is_write_fault(error):
                raise
            raise cannot_write_in(path.parent, error) from None
        try:
            yield temporary
        finally:
            _remove(temporary)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes were writing in `folder`, or there under `name` only. What a live process is writing
    stays."""
    matches = (_UNFINISHED.fullmatch(entry) for entry in os.listdir(folder))
    found = {match["file"] for match in matches if match and (name is None or match["name"] == stem(name))}
    for entry in found:
        with suppress(InUse, OSError), held(lock_beside(folder / entry), folder / entry, ""):
            _remove(folder / entry)


def discard(path: Path) -> None:
    """Remove a file or a folder. A folder is renamed first, so that none is there in part."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with _temporary(path) as temporary:
        path.rename(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
