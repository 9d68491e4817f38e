"""Whether a text is the name of a file. Any text may be asked about: words, labels, a long prompt."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(text: str | Path) -> Path:
    """`text` as a path, with `~` and `~user` expanded; of a user that does not exist it stays as it is."""
    return Path(os.path.expanduser(text))


def existing(text: str | Path) -> Path | None:
    """The file or folder that `text` names, or None. Never raises, unlike `Path.exists`: a text may be too long for a
    file name, begin with `~`, or hold characters that no file name has."""
    path = os.path.expanduser(text)
    return Path(path) if os.path.exists(path) else None


def existing_file(text: str | Path) -> Path | None:
    """The file that `text` names, or None; see [`existing`]."""
    path = os.path.expanduser(text)
    return Path(path) if os.path.isfile(path) else None


def existing_folder(text: str | Path) -> Path | None:
    """The folder that `text` names, or None; see [`existing`]."""
    path = os.path.expanduser(text)
    return Path(path) if os.path.isdir(path) else None
