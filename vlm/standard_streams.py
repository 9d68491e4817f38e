"""Standard output and error that outlive their readers and full disks: what cannot be written is dropped."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

GONE = {errno.EPIPE, errno.ECONNRESET, errno.EIO}
"""Errors of a stream that nobody reads any more: a closed pipe or terminal."""


class LastingStream:
    """A text stream whose `write` and `flush` never raise OSError. The first error is said on standard error, once.

    After its reader has gone, the stream leads to the null device, for child processes too. On a full disk, every
    later write is tried.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._said = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            gone = error.errno in GONE
            if gone:
                self.lead_nowhere()
            if not self._said:
                self._said = True
                why = "nobody reads the output any more" if gone else f"the output cannot be written: {error.strerror}"
                with contextlib.suppress(OSError):
                    os.write(2, f"vlm: {why}; going on without it\n".encode())

    def lead_nowhere(self) -> None:
        """Drop what is in the buffer, and everything later."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Replace standard output and error by [`LastingStream`]s while the block runs."""
    before = sys.stdout, sys.stderr
    lasting = LastingStream(sys.stdout), LastingStream(sys.stderr)
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in lasting:  # what still does not fit would be an error at exit
            try:
                stream._stream.flush()
            except OSError:
                stream.lead_nowhere()
            except ValueError:  # closed
                pass
