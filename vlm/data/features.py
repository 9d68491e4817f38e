"""A frozen encoder's features on disk, read through a memory map.

The cache is a folder for each encoder, preprocessing, feature layer and precision (`cache_key`), holding shards:

    <cache>/<key>/<shard>.safetensors   features [images, N, D], float16, or float32 if the encoder ran in float32;
                                        in its header the SHA-256 of each image's bytes, the grid, and the SHA-256
                                        of all that
    <cache>/<key>/about.json            the same key for people: encoder, image size, layer, precision

A shard is one file, written under another name and renamed when it is whole: a crash loses at most one, and processes
that write the same images at once only do work twice. Its checksum is compared by `FeatureCache.verify`, which a run
calls once, before it trains: a disk or a copy may change bits without an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlm.errors import UserError
from vlm.files import atomic_write, remove_leftovers, write_text

CHECKSUM = "sha256"
"""In the header of a shard, the SHA-256 of what it holds."""


class FeaturesTooLarge(UserError):  # noqa: N818 - named for what it says
    """Numbers that float16 cannot hold."""


@dataclass(frozen=True, eq=False)
class _Shard:
    """What a file holds: `grid` and the SHA-256 of `images` in JSON, `features [images, N, D]`, and their checksum."""

    grid: str
    images: str
    features: Tensor
    checksum: str = ""

    def digest(self) -> str:
        shape = [str(self.features.dtype), *self.features.shape]
        digest = hashlib.sha256(json.dumps([self.grid, self.images, shape]).encode())
        digest.update(self.features.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def is_intact(self) -> bool:
        return self.digest() == self.checksum


class FeatureCache:
    """The features in `folder` by the SHA-256 of an image's bytes: those that were there, and those that are written.

    Files that are cut off or changed are in `damaged`, and those of an earlier version, without a checksum, in
    `outdated`; neither are read. Read files stay readable when the folder is cleared.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.grid: tuple[int, int] | None = None
        self.damaged: set[Path] = set()
        self.outdated: set[Path] = set()
        self._shards: dict[Path, _Shard] = {}
        self._rows: dict[str, Tensor] = {}
        self._shard_of: dict[str, Path] = {}
        self.refresh()

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path]]:
        return FeatureCache, (self.folder,)  # a worker process maps the files anew, rather than be sent what is in them

    def refresh(self) -> None:
        """Find what other processes have written since."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - {*self._shards} - self.damaged - self.outdated):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as opened:
                header, features = opened.metadata(), opened.get_tensor("features")
            if CHECKSUM not in header:
                self.outdated.add(path)
                return
            shard = _Shard(header["grid"], header["images"], features, header[CHECKSUM])
            height, width = json.loads(shard.grid)
            rows = dict(zip(json.loads(shard.images), features, strict=True))
        except (SafetensorError, KeyError, TypeError, ValueError):
            self.damaged.add(path)
            return
        except FileNotFoundError:  # cleared meanwhile
            return
        self.grid = (height, width)
        self._rows |= rows
        self._shard_of |= dict.fromkeys(rows, path)
        self._shards[path] = shard

    def verify(self, images: Iterable[str]) -> None:
        """Compare the shards that hold `images` with their checksums. Features of one that was changed are not in the
        cache afterwards, and the shard is in `damaged`.

        Reads all of them: about 0.8 s per GB and core, and what the disk takes.
        """
        paths = sorted({self._shard_of[image] for image in images if image in self._shard_of})
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing frees Python's lock
            intact = pool.map(lambda path: self._shards[path].is_intact(), paths)
            self.drop([path for path, good in zip(paths, intact, strict=True) if not good])

    def drop(self, paths: Iterable[Path]) -> None:
        """Take the features of damaged shards out of the cache."""
        for path in paths:
            self.damaged.add(path)
            if self._shards.pop(path, None) is not None:
                for image in [image for image, shard in self._shard_of.items() if shard == path]:
                    del self._rows[image], self._shard_of[image]

    def remove_unusable(self) -> None:
        """Remove the files in `damaged` and `outdated`."""
        for path in self.damaged | self.outdated:
            path.unlink(missing_ok=True)

    def __contains__(self, sha: str) -> bool:
        return sha in self._rows

    def __getitem__(self, sha: str) -> Tensor:
        """`[N, D]` features of one image, not yet read from the disk: to be copied, not written to."""
        return self._rows[sha]

    def write(self, images: Sequence[str], features: Tensor, grid: tuple[int, int]) -> Path:
        """Keep the `features [images, N, D]` of images with these SHA-256 as a new shard, and give its path.

        Raises FeaturesTooLarge if they do not fit into float16, in which all but float32 are kept.
        """
        stored = _as_stored(features.cpu())
        if not torch.isfinite(stored).all():
            raise FeaturesTooLarge(
                "this encoder's features do not fit into float16, in which they would be kept; "
                "set data.cache_features: false, or train in float32"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        stored = stored.contiguous()
        shard = _Shard(json.dumps(grid), json.dumps(list(images)), stored)
        header = {"grid": shard.grid, "images": shard.images, CHECKSUM: shard.digest()}
        with atomic_write(path, "wb") as file:  # `save_file` would let nobody else read it
            file.write(save({"features": stored}, metadata=header))
        self._open(path)
        return path

    def describe(self, about: Mapping[str, Any]) -> None:
        """Say for people what is kept here, and by the time of that file that it is in use."""
        write_text(self.folder / "about.json", json.dumps(about, indent=1))
        remove_leftovers(self.folder)


def stored_bytes(features: Tensor) -> int:
    """How many bytes an image takes, of `features [images, N, D]`."""
    return _as_stored(features[:1]).nbytes


def _as_stored(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float32 else features.half()


_SAME_FEATURES = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""What may change in an encoder's configuration as it is saved and loaded, though its features do not."""


def cache_key(vision_tower: torch.nn.Module, image_processor: Any, *parts: Any) -> str:
    """A name that changes with the encoder's weights and configuration, its preprocessing and what else is in
    `parts`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vision_tower.state_dict().items()):
        digest.update(name.encode())
        # Flat, since a batch norm's counter, a single number, cannot be seen as bytes.
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    # Weights alone do not tell GELU from its approximation in CLIP.
    config = vision_tower.config.to_dict() if hasattr(vision_tower, "config") else {}  # type: ignore[union-attr, operator]
    computed = {key: value for key, value in config.items() if key not in _SAME_FEATURES}
    preprocessing = image_processor.to_dict() if hasattr(image_processor, "to_dict") else repr(image_processor)
    digest.update(json.dumps([computed, preprocessing, *parts], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]
