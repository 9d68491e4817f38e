"""Counts of the host's waits, copies and launches, with the line that caused each."""

from __future__ import annotations

import sys
import sysconfig
from collections import Counter
from pathlib import Path

PROJECT = f"{Path.cwd()}/"
HERE = f"{Path(__file__).parent}/"
STANDARD_LIBRARY = sysconfig.get_path("stdlib") + "/"


def where() -> str:
    """Return the innermost line of the project (the folder that the process started in), then `<` and the line of a
    library that it called, if it did."""
    frame, innermost = sys._getframe(1), ""
    while frame is not None:
        file = frame.f_code.co_filename
        package = file.rpartition("/site-packages/")[2]
        ours = file.startswith(PROJECT) and package == file
        if package == file:
            hidden = file.startswith((HERE, STANDARD_LIBRARY))
        else:
            hidden = package.startswith("torch/")
        if not hidden:
            line = f"{file.removeprefix(PROJECT) if ours else package}:{frame.f_lineno}"
            innermost = innermost or line
            if ours:
                return line if line == innermost else f"{line} < {innermost}"
        frame = frame.f_back
    return innermost or "backward pass"  # threads of autograd run no lines of Python


class Log:
    """Counters: `waits` and `copies` (in bytes) by kind and line, `launches` by operator, `attention` by kernel, shapes
    and line, `unordered` (operators whose result may differ from run to run on CUDA) by operator and line."""

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[str] = Counter()
        self.attention: Counter[tuple[str, str]] = Counter()
        self.unordered: Counter[tuple[str, str]] = Counter()

    def clear(self) -> None:
        for counter in vars(self).values():
            counter.clear()

    def copy(self) -> Log:
        return self - Log()

    def __sub__(self, before: Log) -> Log:
        """Return what happened after `before`."""
        since = Log()
        for name, counter in vars(self).items():
            setattr(since, name, counter - getattr(before, name))
        return since

    def table(self, name: str, rows: int | None = None) -> str:
        """Return the `rows` largest entries of a counter, or all, as text."""
        counter = getattr(self, name)
        lines = [f"{name}: {counter.total():,}{' bytes' if name == 'copies' else ''}"]
        for key, count in counter.most_common(rows):
            what, line = key if isinstance(key, tuple) else (key, "")
            lines.append(f"{count:>10,}  {what:<36} {line}".rstrip())
        if rows is not None and len(counter) > rows:
            lines.append(f"{'':>10}  and {len(counter) - rows} more")
        return "\n".join(lines)

    def __str__(self) -> str:
        return "\n".join(map(self.table, vars(self)))


log = Log()
