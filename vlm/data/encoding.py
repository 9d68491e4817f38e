"""Images through a frozen encoder, each once: files are read and pixels prepared by workers, batches encoded here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from vlm.data.example import ImageSource
from vlm.data.features import FeatureCache
from vlm.data.image_inputs import naming_refused
from vlm.data.images import ImageError, RefusedImages, image_sha256, open_image
from vlm.tiling import Size, size_of

BATCH_IMAGES = 16
SHARD_IMAGES = 256

Encode = Callable[[Tensor], tuple[Tensor, tuple[int, int]]]
"""`pixel_values [B, 3, H, W]` to features `[B, N, D]` and their grid."""


@dataclass
class EncodedBatch:
    """The names of `images`, mostly their SHA-256 or the keys of their tiles, and their `features [B, N, D]` on the
    encoder's device."""

    images: list[str]
    features: Tensor
    grid: tuple[int, int]

    @property
    def num_images(self) -> int:
        return len({key.partition(":")[0] for key in self.images})


def hash_images(sources: Sequence[ImageSource]) -> list[str | ImageError]:
    """The SHA-256 of each image's bytes, or why there is none."""
    found: list[str | ImageError] = []
    files: dict[str, str | ImageError] = {}  # the same file is often named by many rows
    for source in sources:
        known = files.get(source) if isinstance(source, str) else None
        if known is None:
            try:
                known = image_sha256(source)
            except ImageError as error:
                known = error
            if isinstance(source, str):
                files[source] = known
        found.append(known)
    return found


def encode_images(
    images: Mapping[str, ImageSource],
    processor: Any,
    encode: Encode,
    *,
    broken: dict[str, ImageError],
    num_workers: int = 0,
    hashed: bool = False,
) -> Iterator[EncodedBatch]:
    """Run `images`, by their names, through `encode` in batches, in order; those that do not open go to `broken`.

    `num_workers` processes open images and prepare them (0: this process). They hold neither the model nor anything on
    its device. With `hashed` the names are those of [`hash_images`], and a file that has changed since goes to
    `broken`: its features would be those of another image. With tiling each tile counts as an image, under a
    [key of its own][`tile_keys`].
    """
    loader: DataLoader[Any] = DataLoader(
        list(images.items()),  # type: ignore[arg-type]  # a list is a data set
        batch_size=images_per_batch(processor),
        num_workers=num_workers,
        collate_fn=partial(_prepare, processor, hashed),
        generator=torch.Generator(),  # nothing is drawn from the one that training draws from
    )
    for opened, pixels, failed in loader:
        broken |= failed
        if opened:
            yield EncodedBatch(opened, *encode(pixels))


def images_per_batch(processor: Any) -> int:
    """How many images are encoded together: as many as make about `BATCH_IMAGES` of the encoder's inputs."""
    return BATCH_IMAGES if processor.tiler is None else max(1, BATCH_IMAGES // (processor.tiler.max_tiles + 1))


def _prepare(
    processor: Any, hashed: bool, batch: list[tuple[str, ImageSource]]
) -> tuple[list[str], Tensor | None, dict[str, ImageError]]:
    opened: dict[str, Image.Image] = {}
    failed: dict[str, ImageError] = {}
    for sha, source in batch:
        try:
            opened[sha] = open_image(source, sha256=sha if hashed else None)
        except ImageError as error:
            failed[sha] = error
    try:
        pixels = _pixel_values(processor, opened)
    except RefusedImages as refused:
        for sha, source in batch:
            why = refused.of(opened[sha], source) if sha in opened else None
            if why is not None:
                failed[sha] = why
                del opened[sha]
        pixels = _pixel_values(processor, opened)
    return [key for sha, image in opened.items() for key in tile_keys(processor, sha, size_of(image))], pixels, failed


def _pixel_values(processor: Any, opened: Mapping[str, Image.Image]) -> Tensor | None:
    images = list(opened.values())
    with naming_refused(processor, images):
        return processor.prepare_images(images)["pixel_values"] if images else None


def tile_keys(processor: Any, sha: str, image_size: Size) -> tuple[str, ...]:
    """The keys under which the features of an image are kept: its SHA-256, with tiling one for each tile."""
    if processor.tiler is None:
        return (sha,)
    return tuple(f"{sha}:{number}" for number in range(processor.tiler.num_tiles(image_size)))


def first_key(processor: Any, sha: str) -> str:
    """The key that is there if those of the whole image are, since a batch is kept whole or not at all."""
    return sha if processor.tiler is None else f"{sha}:0"


def keep(cache: FeatureCache, batches: Iterable[EncodedBatch]) -> list[Path]:
    """Write what is encoded into `cache`, a shard whenever there is enough for one. Gives the paths of the shards."""
    paths: list[Path] = []
    shard: list[EncodedBatch] = []
    for batch in batches:
        shard.append(replace(batch, features=batch.features.cpu()))
        if sum(len(b.images) for b in shard) >= SHARD_IMAGES:
            paths.append(_write(cache, shard))
            shard = []
    return [*paths, _write(cache, shard)] if shard else paths


def _write(cache: FeatureCache, batches: list[EncodedBatch]) -> Path:
    features = torch.cat([batch.features for batch in batches])
    return cache.write([sha for batch in batches for sha in batch.images], features, batches[0].grid)
