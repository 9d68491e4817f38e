"""What tells a checkpoint from another that is saved under the same name."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vlm.hashes import hashes
from vlm.loading import READ_BY_TRANSFORMERS, checkpoint_of
from vlm.paths import existing_folder

DIGITS = 16
"""Hexadecimal digits of a fingerprint."""

READ = {
    *READ_BY_TRANSFORMERS,
    "chat_template.json",
    "chat_template.jinja",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
}
"""Small files of a checkpoint that its answers depend on."""

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def fingerprint(name_or_path: str) -> str:
    """Return a text that changes with the weights, the configuration and the processor of a run folder, a checkpoint
    folder or a Hub name: of files their SHA-256, of a Hub name the commit that is in the cache. Reads all the files.

    Raises UserError for a run folder without a model.
    """
    source = checkpoint_of(name_or_path)
    folder = existing_folder(source)
    if folder is None:
        return _commit(source)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_read(path))
    digests = hashes(folder, [path.relative_to(folder).as_posix() for path in files])
    named = (f"{name} {digest}" for name, digest in digests.items())
    return hashlib.sha256("\n".join(named).encode("utf-8", "surrogateescape")).hexdigest()[:DIGITS]


def _is_read(path: Path) -> bool:
    return path.name in READ or any(path.match(pattern) for pattern in WEIGHTS)


def _commit(name: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name[:DIGITS] if isinstance(found, str) else ""
