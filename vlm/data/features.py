"""A frozen encoder runs once per image: its features are kept on disk and read through a memory map.

The cache is a folder for each encoder, preprocessing and feature layer, holding shards of images:

    <cache>/<key>/<shard>.npy     features [images, N, D], float16, or float32 if the encoder ran in float32
    <cache>/<key>/<shard>.json    SHA-256 of each image's bytes, in the order of the rows, and the grid

A shard is written under another name and renamed when it is whole, so that a crash loses at most one, and two processes
that write the same images only do work twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm.data.example import ImageSource
from vlm.data.images import ImageError, image_sha256, open_image

SHARD_IMAGES = 512
BATCH_IMAGES = 16


@dataclass
class FeatureCache:
    """Features by the SHA-256 of an image's bytes. `encode` maps a list of RGB images to `[B, N, D]` and the grid."""

    folder: Path
    encode: Callable[[list[Image.Image]], tuple[Tensor, tuple[int, int]]]
    grid: tuple[int, int] | None = None
    _rows: dict[str, tuple[np.ndarray, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for index in sorted(self.folder.glob("*.json")):
            self._open(index)

    def _open(self, index: Path) -> None:
        entry = json.loads(index.read_text())
        features = np.load(index.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        self.grid = (entry["grid"][0], entry["grid"][1])
        self._rows.update({sha: (features, row) for row, sha in enumerate(entry["images"])})

    def __contains__(self, sha: str) -> bool:
        return sha in self._rows

    def __getitem__(self, sha: str) -> Tensor:
        """`[N, D]` features of one image."""
        features, row = self._rows[sha]
        return torch.from_numpy(np.array(features[row]))

    def add(
        self, sources: Sequence[ImageSource], progress: Callable[[Iterable[int], int], Iterable[int]]
    ) -> dict[int, str | ImageError]:
        """Encode those of `sources` that are not kept yet. Gives for each position its SHA-256, or why it is broken."""
        found: dict[int, str | ImageError] = {}
        missing: dict[str, ImageSource] = {}
        for position, source in enumerate(sources):
            try:
                found[position] = sha = image_sha256(source)
            except ImageError as error:
                found[position] = error
                continue
            if sha not in self:
                missing.setdefault(sha, source)
        broken = self._encode_missing(missing, progress)
        return {p: broken.get(v, v) if isinstance(v, str) else v for p, v in found.items()}

    def _encode_missing(
        self, missing: dict[str, ImageSource], progress: Callable[[Iterable[int], int], Iterable[int]]
    ) -> dict[str, ImageError]:
        broken: dict[str, ImageError] = {}
        shard: dict[str, Tensor] = {}
        items = list(missing.items())
        for start in progress(range(0, len(items), BATCH_IMAGES), -(-len(items) // BATCH_IMAGES)):
            images = {}
            for sha, source in items[start : start + BATCH_IMAGES]:
                try:
                    images[sha] = open_image(source)
                except ImageError as error:
                    broken[sha] = error
            if images:
                features, self.grid = self.encode(list(images.values()))
                shard.update(zip(images, features.cpu(), strict=True))
            if len(shard) >= SHARD_IMAGES:
                self._write(shard)
                shard = {}
        if shard:
            self._write(shard)
        return broken

    def _write(self, shard: dict[str, Tensor]) -> None:
        features = torch.stack(list(shard.values()))
        stored = features.numpy() if features.dtype == torch.float32 else features.to(torch.float16).numpy()
        if not np.isfinite(stored).all():
            raise ValueError(
                "this encoder's features do not fit into float16, in which they would be kept; "
                "set data.cache_features: false, or train in float32"
            )
        name, beside = uuid.uuid4().hex, f".writing-{os.getpid()}"
        data, index = self.folder / f"{name}.npy", self.folder / f"{name}.json"
        with open(data.with_suffix(beside), "wb") as file:
            np.save(file, stored, allow_pickle=False)
        index.with_suffix(beside + ".json.part").write_text(json.dumps({"grid": self.grid, "images": list(shard)}))
        data.with_suffix(beside).rename(data)
        index.with_suffix(beside + ".json.part").rename(index)
        self._open(index)


def cache_key(vision_tower: torch.nn.Module, image_processor: Any, *parts: Any) -> str:
    """A name that changes with the encoder's weights, its preprocessing and whatever else is in `parts`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vision_tower.state_dict().items()):
        digest.update(name.encode())
        # Flat, since a batch norm's counter, a single number, cannot be seen as bytes.
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    preprocessing = image_processor.to_dict() if hasattr(image_processor, "to_dict") else repr(image_processor)
    digest.update(json.dumps([preprocessing, *parts], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]
