"""Checkpoints on disk: sealed with a manifest when they are whole, looked through before a run goes on from one."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import sort_checkpoints

from vlm.data.dataset import TreeItem
from vlm.data.pairs import PairItem
from vlm.errors import UserError
from vlm.files import DiskError, sync, write_text

MANIFEST = "manifest.json"
"""What a checkpoint holds: its step, the batch of a step, the data it was trained on, names and sizes of files."""

PICKLED = (".pt", ".pth", ".bin")
"""What torch.save writes, as zip archives, whose index stands at their end."""


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Write the files of a checkpoint through to the disk, and its manifest, with what else is known `about` it.

    Raises DiskError if what stands there afterwards is not what was written.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_text(folder / MANIFEST, json.dumps({**about, "files": sizes}, indent=1))
    for file in files:
        sync(file)
    if os.name == "posix":  # the names of the files as well, which elsewhere a program has no say in
        for directory in {file.parent for file in files}:
            sync(directory)
    if why := why_broken(folder):
        raise DiskError(f"it was written, but {why}")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that is [whole][`why_broken`]."""
    found: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return found


def why_broken(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Of each file its size is looked at and its index, not the rest."""
    try:
        sizes = read_manifest(checkpoint)["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes of {size:,}"
        if not _has_index(path):
            return f"{name} is damaged"
    return None


def _has_index(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):
                pass
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in PICKLED:
            zipfile.ZipFile(path).close()
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False
    return True


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `folder`, None if there is none at all; `say` is told of newer ones, broken.

    Raises UserError if there are some and each is broken.
    """
    found = [Path(path) for path in reversed(sort_checkpoints(str(folder)))]
    broken: list[str] = []
    for checkpoint in found:
        why = why_broken(checkpoint)
        if why is None:
            for line in broken:
                say(f"{line}; going on from {checkpoint.name}")
            return checkpoint
        broken.append(f"{checkpoint.name} is broken: {why}")
    if broken:
        raise UserError(
            f"no checkpoint in {folder} is whole: {'; '.join(broken)}. Put a copy of one there, or begin anew with "
            "--overwrite"
        )
    return None


def fingerprint(items: Sequence[TreeItem] | Sequence[PairItem], outline: Sequence[Any] = ()) -> dict[str, Any]:
    """What tells training data from others: how many examples and answers there are, and a hash of the names of their
    images and all that is learned, in order. Of image files the size counts too. Of a stream `items` are a sample, and
    the `outline` of its sources counts."""
    digest = hashlib.sha256(json.dumps(outline).encode() if outline else b"")
    for item in items:
        sizes = [os.path.getsize(s) for s in item.example.images if isinstance(s, str) and os.path.isfile(s)]
        digest.update(json.dumps([item.example.image_id, sizes]).encode())
        digest.update(item.content)
    return {
        "examples": len({id(item.example) for item in items}),
        "answers": sum(item.answers for item in items),
        "sha256": digest.hexdigest(),
    }


def require_same_data(checkpoint: Path, now: dict[str, Any]) -> None:
    """Raise UserError if the data are not those that `checkpoint` was trained on."""
    before = read_manifest(checkpoint).get("data")
    if before is None or before == now:
        return
    counts = [f"{data['examples']:,} examples with {data['answers']:,} answers" for data in (before, now)]
    how = "of other texts or images" if counts[0] == counts[1] else f"now {counts[1]}"
    raise UserError(
        f"the training data have changed since {checkpoint} was saved: {counts[0]} then, {how}. The place in the data "
        "would be another. Put back the data as they were, or begin anew with --overwrite or another output_dir"
    )
