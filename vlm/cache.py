"""`vlm cache`: which encoders' features are kept on disk, and making room."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from vlm.data.disk import gigabytes, size_on_disk
from vlm.errors import UserError, nearest
from vlm.recipe_paths import home

SHOWN = 12
"""Letters of a key in the table: enough to tell two apart."""


@dataclass
class Kept:
    """The features of one encoder, as its folder and the `about.json` in it tell; `images` is None where they are of a
    format that is not read any more."""

    folder: Path
    about: dict[str, Any]
    images: int | None
    size: int
    last_used: float

    @property
    def key(self) -> str:
        return self.folder.name


def kept() -> list[Kept]:
    """What is in the feature cache, latest used first."""
    folder = home() / "features"
    folders = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted((_look(path) for path in folders), key=lambda entry: -entry.last_used)


def _look(folder: Path) -> Kept:
    file = folder / "about.json"
    about = _about(file)
    shards = list(folder.glob("*.safetensors"))
    return Kept(
        folder,
        about,
        sum(map(_images, shards)) if about or shards else None,
        size_on_disk(folder),
        (file if file.is_file() else folder).stat().st_mtime,
    )


def _images(shard: Path) -> int:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="np") as opened:
            keys = json.loads(opened.metadata()["images"])
        return len({key.partition(":")[0] for key in keys})  # after the colon is the number of a tile
    except (SafetensorError, KeyError, TypeError, ValueError):  # training does not read it either
        return 0


def _about(file: Path) -> dict[str, Any]:
    """What is said of an encoder's features; nothing if the file is not there, or damaged."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def ls(console: Console) -> None:
    """Print a table of what is in the feature cache."""
    entries = kept()
    if not entries:
        console.print(f"no features are kept in {home() / 'features'}", highlight=False, soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("key", "encoder", "image", "layer", "precision"):
        table.add_column(name, no_wrap=name != "encoder", overflow="fold")
    for name in ("images", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    for entry in entries:
        described = [str(entry.about.get(name, "?")) for name in ("encoder", "image_size", "layer", "precision")]
        described[0] = Path(described[0]).name if Path(described[0]).is_absolute() else described[0]
        images = "?" if entry.images is None else f"{entry.images:,}"
        used = time.strftime("%Y-%m-%d", time.localtime(entry.last_used))
        table.add_row(entry.key[:SHOWN], *described, images, gigabytes(entry.size), used)
    console.print(table, highlight=False, markup=False)
    total = sum(entry.size for entry in entries)
    console.print(f"{gigabytes(total)} in {home() / 'features'}", highlight=False, soft_wrap=True)


def clear(keys: Sequence[str], *, yes: bool, console: Console) -> None:
    """Remove the features whose keys start as one of `keys` says; without any, all of them, and unless `yes` only
    after asking. Raises UserError for a key that there is not; then nothing is removed."""
    entries = kept()
    for key in keys:
        if not key or not any(entry.key.startswith(key) for entry in entries):
            known = nearest(key, [entry.key for entry in entries]) if entries else "the cache is empty"
            raise UserError(f"no features are kept under a key that starts with {key!r}; {known}")
    chosen = [entry for entry in entries if not keys or entry.key.startswith(tuple(keys))]
    size = gigabytes(sum(entry.size for entry in chosen))
    if chosen and not keys and not yes:
        typer.confirm(f"Remove all kept features, {size} in {home() / 'features'}?", abort=True)
    for entry in chosen:
        shutil.rmtree(entry.folder)
    console.print(f"removed {size}, of {len(chosen)} encoders", highlight=False)
