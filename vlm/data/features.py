"""A frozen encoder's features on disk, read through a memory map.

The cache is a folder for each encoder, preprocessing, feature layer and precision (`cache_key`), holding shards:

    <cache>/<key>/<shard>.safetensors   features [images, N, D], float16, or float32 if the encoder ran in float32;
                                        in its header the SHA-256 of each image's bytes, and the grid
    <cache>/<key>/about.json            the same key for people: encoder, image size, layer, precision

A shard is one file, written under another name and renamed when it is whole: a crash loses at most one, and processes
that write the same images at once only do work twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vlm.errors import UserError


class FeaturesTooLarge(UserError):  # noqa: N818 - named for what it says
    """Numbers that float16 cannot hold."""


class FeatureCache:
    """The features in `folder` by the SHA-256 of an image's bytes: those that were there, and those that are written.

    A file that is cut off is not read, and counted in `damaged`. Read files stay readable when the folder is cleared.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.grid: tuple[int, int] | None = None
        self.damaged: set[Path] = set()
        self._read: set[Path] = set()
        self._rows: dict[str, Tensor] = {}
        self.refresh()

    def __reduce__(self) -> tuple[type[FeatureCache], tuple[Path]]:
        return FeatureCache, (self.folder,)  # a worker process maps the files anew, rather than be sent what is in them

    def refresh(self) -> None:
        """Find what other processes have written since."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._read - self.damaged):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as shard:
                header, features = shard.metadata(), shard.get_tensor("features")
        except SafetensorError:
            self.damaged.add(path)
            return
        except FileNotFoundError:  # cleared meanwhile
            return
        height, width = json.loads(header["grid"])
        self.grid = (height, width)
        self._rows.update(zip(json.loads(header["images"]), features, strict=True))
        self._read.add(path)

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
        beside = path.with_suffix(f".writing-{os.getpid()}")
        header = {"grid": json.dumps(grid), "images": json.dumps(list(images))}
        with beside.open("wb") as file:  # `save_file` would let nobody else read it
            file.write(save({"features": stored.contiguous()}, metadata=header))
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
        self._open(path)
        return path

    def describe(self, about: Mapping[str, Any]) -> None:
        """Say for people what is kept here, and by the time of that file that it is in use."""
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / f"about.writing-{os.getpid()}"
        beside.write_text(json.dumps(about, indent=1), encoding="utf-8")
        beside.rename(self.folder / "about.json")


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
