"""Features of many images as one safetensors file, written as they come: they need not fit into memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vlm.errors import UserError
from vlm.files import atomic_write

MAX_HEADER = 100_000_000  # safetensors reads no longer one
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class NothingWritten(Exception):  # noqa: N818 - named for what happened
    """No file is to appear."""


class FeatureFile:
    """A file with the tensor `features [images, ...]`, and `images`, a JSON list of their names, in its metadata.

    A context. The file appears when the context ends, whole; after an exception, or without features, there is none.

    Args:
        images: the names of all images that may come. The header, which precedes the features, is given room for them
            (https://github.com/huggingface/safetensors#format: it may end in spaces).
    """

    def __init__(self, path: Path, images: Sequence[str]) -> None:
        self.path = path
        self.shape: tuple[int, ...] = ()
        """Of the features written so far, `[images, ...]`."""
        self._possible = list(images)
        self._written: list[str] = []
        self._writing = atomic_write(path, "wb")
        self._room = 0

    def __enter__(self) -> FeatureFile:
        self._file = self._writing.__enter__()
        return self

    def write(self, images: Sequence[str], features: Tensor, about: Mapping[str, str]) -> None:
        """Add `features [B, ...]` of `images`. `about` is the other metadata, the same in each call.

        Raises UserError if there are so many images that their names do not fit into the header.
        """
        if not self._written:
            self._dtype, self._about = features.dtype, about
            self._room = -(-len(self._header(self._possible, tuple(features.shape[1:]))) // 8) * 8
            if self._room > MAX_HEADER:
                raise UserError(
                    f"the names of {len(self._possible):,} images do not fit into one file; make one of each folder"
                )
            self._file.write(self._room.to_bytes(8, "little") + bytes(self._room))
        self._written += images
        self.shape = (len(self._written), *features.shape[1:])
        self._file.write(features.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def _header(self, images: Sequence[str], shape: tuple[int, ...]) -> bytes:
        size = torch.Size([len(images), *shape]).numel() * self._dtype.itemsize
        features = {"dtype": DTYPES[self._dtype], "shape": [len(images), *shape], "data_offsets": [0, size]}
        metadata = {"format": "pt", "images": json.dumps(images), **self._about}
        return json.dumps({"__metadata__": metadata, "features": features}).encode()

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: TracebackType | None) -> None:
        if kind is None and self._written:
            self._file.seek(8)
            self._file.write(self._header(self._written, self.shape[1:]).ljust(self._room))
        elif kind is None:
            kind, error = NothingWritten, NothingWritten()
        with suppress(NothingWritten):
            self._writing.__exit__(kind, error, traceback)
