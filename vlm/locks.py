"""Locks on files and folders, which keep a second process out."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from vlm.errors import UserError
from vlm.printing import printable_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The name of a folder's lock, inside it. The lock of a file is next to it: `.NAME.lock`."""

MAX_NAME = 255
"""Bytes in a file name."""

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
"""What `flock` fails with on a file system without locks."""


class InUse(UserError):  # noqa: N818 - named for what it says
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, advice: str = "Wait until it ends, or choose another name.") -> Iterator[None]:
    """Hold the lock on `path`, a file or folder that need not exist.

    The operating system releases the lock when the process ends, even if it is killed. Processes on different machines
    exclude each other where the file system has locks for all of them, such as NFS, CephFS, GPFS, and Lustre mounted
    with `flock`. On a file system without locks, a warning says so.

    Raises InUse if another process holds it: which one, and the `advice`. Raises UserError if the folder is read-only.
    """
    path = real_path(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe
        yield
        return
    lock = path / LOCK if written_inside(path) else beside(path, LOCK.removeprefix("."))
    with _locked_by(lock, path, advice):
        yield


@contextmanager
def locked_folder(path: Path, advice: str = "Wait until it ends, or choose another folder.") -> Iterator[None]:
    """Hold the lock on a folder whose files are written one by one, as [`locked`]. The folder is created, and removed
    again if it is empty at the end."""
    path = real_path(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose another folder")
    try:
        with _locked_by(path / LOCK, path, advice):
            yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextmanager
def _locked_by(lock: Path, path: Path, advice: str) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(lock, path, advice))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise cannot_write_in(lock.parent, error) from None
            warnings.warn(f"no locks on this file system: start no second process that writes {path}", stacklevel=5)
        yield


@contextmanager
def locked_if_possible(path: Path) -> Iterator[None]:
    lock = lock_beside(path)
    try:
        number = _take(lock)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        number = None
    try:
        yield
    finally:
        if number is not None:
            _release(lock, number)


@contextmanager
def held(lock: Path, what: Path, advice: str) -> Iterator[None]:
    number = _take(lock)
    if number is None:
        raise InUse(f"{what} is in use by {_owner(lock)}. {advice}")
    try:
        about = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with suppress(OSError):  # on a full disk the lock holds without it
            os.truncate(number, 0)
            os.write(number, json.dumps(about).encode())
        yield
    finally:
        _release(lock, number)


_held_files: set[int] = set()


def _take(lock: Path) -> int | None:
    """Lock a file, created if missing. Return its descriptor, or None if it is locked already."""
    while True:
        if fcntl is None:  # Windows: the file exists as long as it is open
            try:
                number = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_TEMPORARY", 0))
            except (FileExistsError, PermissionError):
                return None
        else:
            # A link could lead to a file of ours, if others may write into the folder: what is locked is written to.
            number = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(number)
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    return None
                lock.unlink(missing_ok=True)
                raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(number), os.lstat(lock)):
                _held_files.add(number)
                return number
        os.close(number)  # its holder removed it between our two calls


def _release(lock: Path, number: int) -> None:
    with suppress(OSError):
        lock.unlink()
    _held_files.discard(number)
    os.close(number)


def _close_in_child() -> None:
    """A lock lasts until every copy of the descriptor is closed; workers of a killed process live on for seconds."""
    for number in _held_files:
        os.close(number)
    _held_files.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _owner(lock: Path) -> str:
    try:
        about = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {about['process']} on {about['host']}, since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def real_path(path: Path) -> Path:
    """Return the path that `path` leads to, which need not exist.

    Raises UserError for a name that no file can have, and for a folder that cannot be searched.
    """
    try:
        real = os.path.realpath(path)
        os.lstat(real)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{printable_name(str(path))} cannot be written: {why}. Choose another name") from None
    return Path(real)


def written_inside(path: Path) -> bool:
    """Whether it is a folder that cannot be replaced by another: a mount point, or one in a read-only folder."""
    return path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK))


def beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{stem(path.name)}.{ending}")


def stem(name: str) -> str:
    """A file name short enough to be lengthened."""
    data = os.fsencode(name)
    return name if len(data) <= MAX_NAME - 40 else sha256(data).hexdigest()


def lock_beside(path: Path) -> Path:
    return path.with_name(path.name + LOCK)


def cannot_write_in(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write in {folder}: {error.strerror}")
