"""Files and folders that appear whole or not at all, and locks that keep a second process out."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Literal

from vlm.errors import UserError
from vlm.printing import printable_name

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

WRITING = ".writing"
"""How the name of a file or folder ends that is not whole yet: `.NAME.<8 hexadecimal digits>.writing`."""

LOCK = ".lock"
"""The name of a folder's lock, inside it. The lock of a file is next to it: `.NAME.lock`."""

MAX_NAME = 255
"""Bytes in a file name."""

_UNFINISHED = re.compile(r"(?P<file>\.(?P<name>.+)\.[0-9a-f]{8}\.writing)(\.lock)?", re.DOTALL)

NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""Errors of the operating system that only writing has."""

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}
"""What `flock` fails with on a file system without locks."""


class DiskError(UserError, OSError):
    """Something could not be written. `why` is the reason alone."""

    def __init__(self, message: str, why: str = "") -> None:
        super().__init__(message)
        self.why = why or message


class InUse(UserError):  # noqa: N818 - named for what it says
    """Another process holds the lock."""


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
    inside = _written_inside(path)
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


def require_new(path: Path) -> None:
    """Raise UserError if there is a file, or a folder that holds more than a lock and what killed processes left."""
    if path.is_dir() and not holds(path):
        return
    if path.exists():
        raise UserError(f"{path} exists already; choose another name, or remove it")


def holds(folder: Path) -> list[str]:
    """Return what is in a folder besides a lock and what is being written, or was, in processes that were killed."""
    return sorted(name for name in os.listdir(folder) if name != LOCK and not _UNFINISHED.fullmatch(name))


def _written_inside(path: Path) -> bool:
    """Whether it is a folder that cannot be replaced by another: a mount point, or one in a read-only folder."""
    return path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK))


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
    temporary = _beside(path, f"{uuid.uuid4().hex[:8]}{WRITING}")
    with saving(str(path), "Make room, and run the command again", is_write_fault), ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent, path.name)
            stack.enter_context(_locked_if_possible(temporary))
        except OSError as error:
            if is_write_fault(error):
                raise
            raise _cannot_write_in(path.parent, error) from None
        try:
            yield temporary
        finally:
            _remove(temporary)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes were writing in `folder`, or there under `name` only. What a live process is writing
    stays."""
    matches = (_UNFINISHED.fullmatch(entry) for entry in os.listdir(folder))
    found = {match["file"] for match in matches if match and (name is None or match["name"] == _stem(name))}
    for entry in found:
        with suppress(InUse, OSError), _held(_lock_beside(folder / entry), folder / entry, ""):
            _remove(folder / entry)


def discard(path: Path) -> None:
    """Remove a file or a folder. A folder is renamed first, so that none is there in part."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with _temporary(path) as temporary:
        path.rename(temporary)


@contextmanager
def going_on(path: Path) -> Iterator[None]:
    """Log a warning, and go on, if `path` cannot be written."""
    try:
        yield
    except OSError as error:
        logger.warning("%s could not be written: %s", path, reason(error))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{_stem(path.name)}.{ending}")


def _stem(name: str) -> str:
    """A file name short enough to be lengthened."""
    data = os.fsencode(name)
    return name if len(data) <= MAX_NAME - 40 else sha256(data).hexdigest()


def _lock_beside(path: Path) -> Path:
    return path.with_name(path.name + LOCK)


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
    lock = path / LOCK if _written_inside(path) else _beside(path, LOCK.removeprefix("."))
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
            stack.enter_context(_held(lock, path, advice))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise _cannot_write_in(lock.parent, error) from None
            warnings.warn(f"no locks on this file system: start no second process that writes {path}", stacklevel=5)
        yield


def _cannot_write_in(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write in {folder}: {error.strerror}")


@contextmanager
def _locked_if_possible(path: Path) -> Iterator[None]:
    lock = _lock_beside(path)
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
def _held(lock: Path, what: Path, advice: str) -> Iterator[None]:
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


def is_disk_fault(error: BaseException) -> bool:
    """Whether it is a file that could not be written or read: an OSError, or what torch and safetensors make of one."""
    return isinstance(error, OSError) or _from_library(error)


def is_write_fault(error: BaseException) -> bool:
    """Whether something could not be written, as far as an error that has gone through other code tells."""
    return isinstance(error, DiskError) or getattr(error, "errno", None) in NOT_WRITTEN or _from_library(error)


def _from_library(error: BaseException) -> bool:
    """Whether torch or safetensors could not write a file."""
    from safetensors import SafetensorError

    written_by_torch = isinstance(error, RuntimeError) and (
        "PytorchStreamWriter" in str(error) or "inline_container" in str(error) or "unexpected pos" in str(error)
    )
    return isinstance(error, SafetensorError) or written_by_torch


@contextmanager
def saving(what: str, advice: str, is_fault: Callable[[BaseException], bool] = is_disk_fault) -> Iterator[None]:
    """Raise DiskError for a file that cannot be written: `what` could not be saved, why, and the `advice`."""
    try:
        yield
    except Exception as error:
        if not is_fault(error):
            raise
        why = reason(error)
        raise DiskError(f"{what} could not be saved: {why}. {advice}", why) from error


def reason(error: BaseException) -> str:
    """A disk fault in words."""
    if isinstance(error, DiskError):
        return error.why
    if isinstance(error, RuntimeError):
        return "torch could not write a file; is the disk full?"
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    return "the disk is full" if full else getattr(error, "strerror", None) or " ".join(str(error).split())
