"""Files that could not be written: which errors say so, and in which words."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm.errors import UserError

logger = logging.getLogger(__name__)

NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""Errors of the operating system that only writing has."""


class DiskError(UserError, OSError):
    """Something could not be written. `why` is the reason alone."""

    def __init__(self, message: str, why: str = "") -> None:
        super().__init__(message)
        self.why = why or message


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


@contextmanager
def going_on(path: Path) -> Iterator[None]:
    """Log a warning, and go on, if `path` cannot be written."""
    try:
        yield
    except OSError as error:
        logger.warning("%s could not be written: %s", path, reason(error))
