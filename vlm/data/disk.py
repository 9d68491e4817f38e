"""Sizes on disk, and how people say them."""

import os
from contextlib import suppress
from pathlib import Path

GB = 1e9


def size_on_disk(folder: Path) -> int:
    """Bytes of all files below `folder`; 0 if there is none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # renamed or removed by another process meanwhile
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def gigabytes(size: float) -> str:
    """Bytes in GB: `0.59 GB`."""
    return f"{size / GB:.2f} GB" if size < 10 * GB else f"{size / GB:,.0f} GB"
