"""`vlm index`: images by their vectors, for `vlm search`; a second time only what has changed is encoded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vlm.data.features import cache_key
from vlm.data.image_files import find_images
from vlm.embedding import Embedder, load_embedder
from vlm.errors import UserError
from vlm.locks import locked_folder
from vlm.paths import existing
from vlm.retrieval.index import ImageIndex, holds_content_only
from vlm.retrieval.update import update


def run(patterns: Sequence[str], *, encoder: str | None, output: Path, console: Console) -> None:
    """Make the index `output` of the images in `patterns`, or bring it up to date.

    Raises UserError for an index of another encoder, a new one without `encoder`, and if no image opens, and InUse if
    another process writes it.
    """
    with locked_folder(output, "Wait until it ends, or choose another --output."):
        _run(patterns, encoder=encoder, output=output, console=console)


def _run(patterns: Sequence[str], *, encoder: str | None, output: Path, console: Console) -> None:
    index = ImageIndex.open(output) if (output / "index.json").exists() else None
    if encoder is None and index is None:
        raise UserError(f"{output} is no index yet; --encoder says which encoder it is to be made with")
    if index is None and not holds_content_only(output):
        raise UserError(f"{output} is there and is no index; choose another --output")
    found = find_images(patterns)
    found.show_left_out(console)
    images = found.paths
    with console.status("loading the encoder"):
        embedder = load_encoder(index, encoder)
    if index is None:
        index = ImageIndex(output, embedder.name, key_of(embedder))
    index.remove_others()
    try:
        changes = update(index, images, embedder, console=console)
    except KeyboardInterrupt:
        kept = f"{len(index):,} images are in {output}; run it again to go on"
        console.print(kept, markup=False, highlight=False, soft_wrap=True)
        raise
    for error in changes.broken:
        console.print(f"could not be opened: {error}", markup=False, highlight=False, soft_wrap=True)
    if not (output / "index.json").exists():
        raise UserError(f"no image could be opened, of {len(images)}; {output} was not written")
    console.print(f"{changes}: {output}, {len(index):,} images", markup=False, highlight=False, soft_wrap=True)


def load_encoder(index: ImageIndex | None, encoder: str | None = None) -> Embedder:
    """`encoder`, or else the one of `index`. Raises UserError if `index` has vectors of another."""
    name = encoder or (index.encoder if index is not None else "")
    folder = existing(name)
    embedder = load_embedder(os.path.abspath(folder) if folder else name)
    if index is not None and key_of(embedder) != index.encoder_key:
        other = "which has other weights now" if embedder.name == index.encoder else f"not of {embedder.name}"
        raise UserError(
            f"{index.folder} has vectors of {index.encoder}, {other}; those of two encoders cannot be compared: make "
            "another index (vlm index --output)"
        )
    return embedder


def key_of(embedder: Embedder) -> str:
    """Changes with the encoder's weights, configuration and preprocessing."""
    return cache_key(embedder.model, embedder.image_processor)
