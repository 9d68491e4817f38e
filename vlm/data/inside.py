"""Whether a file is in one of some folders, once `..` and links in its path are followed.

The rows of a data set that somebody else made may name any file of this machine, which would then be shown in pages and
learned. See CWE-22 (https://cwe.mitre.org/data/definitions/22.html) and CWE-59.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path


class Inside:
    """The `folders` that images may be in. One that is a link itself is followed."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        self._roots = {os.path.join(os.path.realpath(folder), "") for folder in folders}

    def holds(self, path: str | Path) -> bool:
        """Whether the file `path` is in one of the folders."""
        folder, name = os.path.split(path)
        # A folder has many images: its links are followed once.
        real = os.path.join(_real_folder(os.path.abspath(folder)), name)
        if name in ("", ".", "..") or os.path.islink(real):
            real = os.path.realpath(path)
        return any(real.startswith(root) for root in self._roots)


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)
