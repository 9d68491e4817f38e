"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each file in `folder`, by name."""
    names = list(names)
    with ThreadPoolExecutor(4) as pool:  # hashlib works in parallel
        return dict(zip(names, pool.map(lambda name: file_sha256(folder / name), names), strict=True))
