"""The features of a frozen encoder for a stage: whether keeping them is worth while, and keeping them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import TrainingArguments

from vlm.data.check import ProblemLog, image_problem
from vlm.data.disk import GB, gigabytes, size_on_disk
from vlm.data.encoding import (
    Encode,
    EncodedBatch,
    encode_images,
    first_key,
    hash_images,
    images_per_batch,
    keep,
    tile_keys,
)
from vlm.data.example import Example, ImageSource
from vlm.data.features import FeatureCache, FeaturesTooLarge, cache_key, stored_bytes
from vlm.data.images import ImageError, image_size, open_image
from vlm.errors import UserError
from vlm.image_processors import image_size_of
from vlm.recipe import Recipe
from vlm.recipe_paths import home
from vlm.training.callbacks import StopOnSignal

TIMED_BATCHES = 4
SHARE_OF_FREE_DISK = 0.9

Keys = dict[int, tuple[str, ...]]
"""For each whole example, by its place, the keys of its images in the cache."""


def kept_features(
    recipe: Recipe,
    groups: Sequence[Sequence[Example]],
    model: Any,
    processor: Any,
    args: TrainingArguments,
    log: ProblemLog,
    console: Console,
    stop: StopOnSignal,
) -> tuple[FeatureCache | None, list[Keys | None]]:
    """The cache, with the features of all images of `groups` in it, and the keys of each group; or None for the cache
    and for each group, if `data.cache_features` is auto and keeping is not worth while.

    Several processes decide alike, each encodes its share, and all find all. Broken images are reported to `log`.
    Raises UserError if features have to be kept and there is no room, and Stopped, with what is encoded kept, if `stop`
    was told.
    """
    processes = PartialState()
    cache = cache_for(model, processor, args, home() / "features")
    sources = [[source for example in group for source in example.images] for group in groups]
    hashes = [hash_images(group) for group in sources]
    pairs = [pair for group in zip(hashes, sources, strict=True) for pair in zip(*group, strict=True)]
    images = {sha: source for sha, source in pairs if isinstance(sha, str)}
    unusable = _verified(cache, [first_key(processor, sha) for sha in images])
    missing = {sha: source for sha, source in images.items() if first_key(processor, sha) not in cache}
    broken: dict[str, ImageError] = {}

    def encoded(some: Mapping[str, ImageSource]) -> Iterator[EncodedBatch]:
        workers = args.dataloader_num_workers
        encode = encoder_of(model, args)
        return encode_images(some, processor, encode, broken=broken, num_workers=workers, hashed=True)

    choice = [Choice(True, "none to encode")]
    if processes.is_main_process and missing:
        trial = dict(islice(missing.items(), (1 + TIMED_BATCHES) * images_per_batch(processor)))
        choice = [
            choose(
                cache,
                encoded(trial),
                len(missing),
                mode=recipe.data.cache_features or "auto",
                max_cache_size=recipe.data.max_cache_size,
                device=args.device,
            )
        ]
    broadcast_object_list(choice)  # of several processes the first one has timed it
    said = [*unusable, f"{len(images) - len(missing):,} of {len(images):,} images found on disk", choice[0].why]
    console.print(f"features: {'; '.join(said)}", highlight=False, markup=False, soft_wrap=True)
    if not choice[0].keep:
        return None, [None] * len(groups)

    cache.refresh()
    left = {sha: source for sha, source in missing.items() if first_key(processor, sha) not in cache}
    mine = {sha: source for sha, source in left.items() if _is_share_of(sha, processes)}
    batches, total = stop.until_told(encoded(mine)), -(-len(mine) // images_per_batch(processor))
    keep(cache, track(batches, "encoding images", total, console=console, transient=True) if mine else [])
    stop.check_all("encoding images; those that are encoded are kept")
    broken = dict(gather_object(list(broken.items())))  # also waits until all have written
    cache.refresh()
    if images and processes.is_main_process:
        cache.describe(about(recipe, model, processor, args))
    return cache, [_keys(group, found, broken, log, processor) for group, found in zip(groups, hashes, strict=True)]


def _verified(cache: FeatureCache, keys: Sequence[str]) -> list[str]:
    """Have one process compare the shards of `keys` with their checksums, and remove what is damaged or of an earlier
    version; all know of it then. Gives what was found, each kind in a line for people."""
    processes = PartialState()
    if processes.is_main_process:
        cache.verify(keys)
        cache.remove_unusable()
    found = [(cache.damaged, cache.outdated)]
    broadcast_object_list(found)
    damaged, outdated = found[0]
    cache.drop(damaged)
    said = []
    if damaged:
        names = ", ".join(sorted(path.name for path in damaged))
        said.append(f"{len(damaged)} damaged files in {cache.folder} were removed ({names})")
    if outdated:
        said.append(f"{len(outdated)} files of an earlier version, without checksums, were removed")
    return said


def _is_share_of(sha: str, processes: PartialState) -> bool:
    """Whether this process is to encode the image: told by its hash, since others may write to the cache meanwhile."""
    return int(sha[:8], 16) % processes.num_processes == processes.process_index


@dataclass
class Choice:
    """Whether features are kept, and why in a line for people."""

    keep: bool
    why: str


def choose(
    cache: FeatureCache,
    batches: Iterator[EncodedBatch],
    count: int,
    *,
    mode: Literal["auto"] | bool,
    max_cache_size: float,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Time the first `batches` of `count` images that are not in `cache`: encoding them, and reading them from the
    cache and copying them to `device`. The first batch, which is slower, gives the size of an image and is not timed.

    Encoding is timed with opening and preparing the images, as far as training would wait for that too. What was
    encoded is kept if all is. Raises UserError if the size is over a limit and `mode` is true.
    """
    first = next(batches, None)
    if first is None:  # not one image opens, which is said elsewhere
        return Choice(True, f"{count:,} images, none of which opens")
    size = count * stored_bytes(first.features) * len(first.images) // first.num_images
    free = shutil.disk_usage(_existing(cache.folder)).free
    if too_large := _too_large(size, free, cache.folder.parent, max_cache_size):
        if mode is True:
            raise UserError(f"data.cache_features is true, but {count:,} images take {too_large}")
        return Choice(False, f"not kept on disk: {count:,} images take {too_large}")
    whole = f"{count:,} images take {gigabytes(size)} of {gigabytes(free)} free"
    _wait_for(device)
    start = clock()
    timed = list(batches)
    _wait_for(device)
    encoding = _rate(timed, clock() - start)
    try:
        shards = keep(cache, [first, *timed])
    except FeaturesTooLarge as error:
        if mode is True:
            raise
        return Choice(False, f"not kept on disk: {error}")
    if not timed:
        return Choice(True, f"kept on disk, too few to time: {whole}")
    start = clock()
    for batch in timed:
        torch.stack([cache[sha] for sha in batch.images]).to(device)
    _wait_for(device)
    reading = _rate(timed, clock() - start)
    rates = f"reading {reading:,.0f} images a second, encoding {encoding:,.0f}"
    if mode is True or reading > encoding:
        return Choice(True, f"kept on disk ({rates}): {whole}")
    for shard in shards:
        shard.unlink()
    return Choice(False, f"not kept on disk, encoded in every step ({rates}): {whole}")


def _too_large(size: float, free: float, folder: Path, max_cache_size: float) -> str | None:
    """What is wrong with writing `size` bytes below `folder`, where `free` bytes are free."""
    kept = size_on_disk(folder)
    if kept + size > max_cache_size * GB:
        return (
            f"{gigabytes(size)}, with the {gigabytes(kept)} that {folder} holds already more than data.max_cache_size "
            f"({max_cache_size:g} GB). Raise it, make room with `vlm cache clear`, or set data.cache_features to false."
        )
    if size > SHARE_OF_FREE_DISK * free:
        return (
            f"{gigabytes(size)}, more than {SHARE_OF_FREE_DISK:.0%} of the {gigabytes(free)} that are free for "
            f"{folder}. Make room, set VLM_HOME to a folder on another disk, or set data.cache_features to false."
        )
    return None


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _rate(batches: Sequence[EncodedBatch], seconds: float) -> float:
    return sum(batch.num_images for batch in batches) / max(seconds, 1e-9)


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def encoder_of(model: Any, args: TrainingArguments) -> Encode:
    """The function that runs pixels through a model's encoder, in the precision of `args` and on their device."""
    device = args.device

    @torch.no_grad()
    def encode(pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        model.get_encoder("image").to(device).eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            features, grid = model.get_vision_features(pixel_values.to(device))
        return (features.half() if args.bf16 or args.fp16 else features), grid

    return encode


def cache_for(model: Any, processor: Any, args: TrainingArguments, folder: Path) -> FeatureCache:
    """The cache of this encoder's features, in this precision, below `folder`."""
    config = model.config
    key = cache_key(
        model.get_encoder("image"),
        processor.image_processor,
        config.vision_feature_layer,
        config.vision_feature_select_strategy,
        _precision(args),
        *([config.tiling] if config.tiling else []),
    )
    return FeatureCache(folder / key)


def _precision(args: TrainingArguments) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def about(recipe: Recipe, model: Any, processor: Any, args: TrainingArguments) -> dict[str, Any]:
    """What `vlm cache ls` says of the features."""
    layer, tiler = model.config.vision_feature_layer, processor.tiler
    image_size = "x".join(map(str, image_size_of(processor.image_processor)))
    return {
        "encoder": " + ".join(recipe.model.encoders) or recipe.model.pretrained,
        "image_size": image_size if tiler is None else f"{image_size} {tiler.type} {tiler.max_tiles}",
        "layer": "last" if layer is None else str(layer),
        "precision": _precision(args),
    }


def _keys(
    examples: Sequence[Example],
    found: Sequence[str | ImageError],
    broken: Mapping[str, ImageError],
    log: ProblemLog,
    processor: Any,
) -> Keys:
    """The keys of each example whose images are whole; the others are reported."""
    keys: Keys = {}
    position = 0
    for index, example in enumerate(examples):
        mine = found[position : position + len(example.images)]
        position += len(example.images)
        seen = [broken.get(value, value) if isinstance(value, str) else value for value in mine]
        errors = [value for value in seen if isinstance(value, ImageError)]
        if errors:
            log.add(image_problem(_with_row(errors[0], example), example))
        else:
            whole = [value for value in seen if isinstance(value, str)]
            if processor.tiler is not None:  # how many tiles an image has follows from its size
                sizes = [image_size(source, where=example.where) for source in example.images]
                whole = [k for sha, size in zip(whole, sizes, strict=True) for k in tile_keys(processor, sha, size)]
            keys[index] = tuple(whole)
    return keys


def _with_row(error: ImageError, example: Example) -> ImageError:
    """The cache knows images by their bytes; several rows may name the same broken one, and each is lost."""
    for source in example.images:
        try:
            open_image(source, where=example.where)
        except ImageError as named:
            return named
    return error
