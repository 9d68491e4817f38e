"""Checkpoints on disk: sealed with a manifest when they are whole, looked through before a run goes on from one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import sort_checkpoints

from vlm.data.dataset import TreeItem
from vlm.data.pairs import PairItem
from vlm.disk_faults import DiskError
from vlm.errors import UserError
from vlm.files import sync, write_text
from vlm.hashes import hashes

MANIFEST = "manifest.json"
"""What a checkpoint holds: its step, the batch of a step, the data it was trained on, names, sizes and hashes of files.
"""

DIVERGED = "diverged"
"""The key in a manifest that says in which precision the gradients after the checkpoint were not finite."""

CHECKPOINT = re.compile(r"checkpoint-\d+")
"""The name of a checkpoint, by its step."""

PICKLED = (".pt", ".pth", ".bin")
"""What torch.save writes, as zip archives, whose index stands at their end."""


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Write the files of a checkpoint through to the disk, and its manifest, with what else is known `about` it.

    Raises DiskError if what stands there afterwards is not what was written.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_text(folder / MANIFEST, json.dumps({**about, "files": sizes, "sha256": hashes(folder, sizes)}, indent=1))
    for file in files:
        sync(file)
    if os.name == "posix":  # the names of the files as well, which elsewhere a program has no say in
        for directory in {file.parent for file in files}:
            sync(directory)
    if why := why_broken(folder, contents=False):
        raise DiskError(f"it was written, but {why}")


def changed(folder: Path, before: Mapping[str, str]) -> str | None:
    """Return what is wrong with the first file that no longer has the hash that it had `before`, or None."""
    if missing := [name for name in before if not (folder / name).is_file()]:
        return f"{missing[0]} is missing"
    try:
        now = hashes(folder, before)
    except OSError as error:
        return f"a file cannot be read ({error})"
    return next((f"the content of {name} has changed (SHA-256)" for name in before if now[name] != before[name]), None)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that is [whole][`why_broken`]."""
    found: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return found


def has_hashes(checkpoint: Path) -> bool:
    """Whether a checkpoint has hashes of its files. Versions that wrote none also froze no unread weights, so their
    optimizers have those in their groups."""
    return "sha256" in read_manifest(checkpoint)


def why_broken(checkpoint: Path, *, contents: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, or None. Of each file the size and the index are checked, and with
    `contents` the hash, for which all files are read. Older checkpoints have no hashes."""
    try:
        manifest = read_manifest(checkpoint)
        sizes, before = dict(manifest["files"]), dict(manifest.get("sha256", {}))
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
    return changed(checkpoint, before) if contents else None


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


def newest(
    folder: Path, say: Callable[[str], None], *, precision: str | None = None, contents: bool = True
) -> Path | None:
    """Return the newest checkpoint in `folder` to resume from, or None if there is none at all. `say` is told of newer
    ones that are broken, or whose gradients are not finite in this `precision`. For `contents` see `why_broken`.

    Raises UserError if there are checkpoints but none to resume from.
    """
    found = [Path(path) for path in reversed(sort_checkpoints(str(folder)))]
    passed_over: list[str] = []
    for checkpoint in found:
        if why := why_broken(checkpoint, contents=contents):
            passed_over.append(f"{checkpoint.name} is broken: {why}")
        elif (diverged := read_manifest(checkpoint).get(DIVERGED)) and diverged == precision:
            passed_over.append(f"{checkpoint.name} has diverged: with its weights no gradients are finite")
        else:
            for line in passed_over:
                say(f"{line}; going on from {checkpoint.name}")
            return checkpoint
    if not passed_over:
        return None
    if any(" is broken: " in line for line in passed_over):
        raise UserError(
            f"no checkpoint in {folder} is whole: {'; '.join(passed_over)}. Put a copy of one there, or begin anew "
            "with --overwrite"
        )
    raise UserError(
        f"no checkpoint in {folder} can be resumed: {'; '.join(passed_over)}. Begin anew with --overwrite and lower "
        "learning rates, or remove this folder and begin the stage anew with --resume"
        f"{'' if precision == 'float32' else ', or train in float32 (train.bf16: false)'}"
    )


def mark_diverged(folder: Path, step: int, precision: str) -> None:
    """Note in the manifests of all checkpoints in `folder` from `step` on that in this `precision` the gradients of
    their weights are not finite, so that no run is resumed from them."""
    for path in map(Path, sort_checkpoints(str(folder))):
        if why_broken(path, contents=False) is None and (manifest := read_manifest(path)).get("step", 0) >= step:
            write_text(path / MANIFEST, json.dumps({**manifest, DIVERGED: precision}, indent=1))


def remove_older(folder: Path, step: int, limit: int | None, best: str | None = None) -> None:
    """Remove checkpoints in `folder` until there are `limit`, never that of `step`, which was just saved, nor the
    `best`.

    Those of later steps go first: the run was resumed from before them. Then the oldest go. Times of files do not
    count: a copied folder has other ones, and the clock of another machine may be behind.
    """
    if not limit or limit < 0:
        return
    found = [Path(path) for path in sort_checkpoints(str(folder)) if CHECKPOINT.fullmatch(Path(path).name)]
    kept = {f"checkpoint-{step}", Path(best or "").name}
    others = [path for path in found if path.name not in kept]
    others.sort(key=lambda path: int(path.name.removeprefix("checkpoint-")) < step)
    for path in others[: max(len(found) - limit, 0)]:
        shutil.rmtree(path, ignore_errors=True)


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
