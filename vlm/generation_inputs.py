"""Inputs of the steps of `generate`: images for the steps that read them, rows repeated with their images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from vlm.cache_state import has_read
from vlm.image_rows import OF_IMAGES, OF_TILES


def images_of_step(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the image arguments of a step of `generate`: after the first step the images are in the cache, without a
    cache every step reads them again."""
    if not model_kwargs.get("use_cache", True):
        return {"vision_states": None}
    if model_kwargs.get("is_first_iteration"):
        return {}
    # A model that drafts for another begins without an iteration that is called the first.
    unread = not has_read(model_kwargs.get("cache"))
    return {name: model_kwargs.get(name) if unread else None for name in OF_IMAGES}


def repeat_images(
    given: dict[str, Tensor], image_mask: Tensor, image_tokens: Sequence[int], tiles: Sequence[int], times: int
) -> dict[str, Tensor]:
    """Repeat the images of each row, for beams and samples; a row's images stay together and in order.

    Args:
        given: arguments of `forward` with a row per image or tile, by name.
        image_mask: `[B, L]`, where the image tokens are.
        image_tokens: the number of tokens of each image.
        tiles: the number of tiles of each image.
    """
    ends = [0, *accumulate(image_tokens)]
    last = [ends.index(end) for end in accumulate(image_mask.sum(dim=1).tolist(), initial=0)]
    repeated: dict[str, Tensor] = {}
    for name, value in given.items():
        parts = tiles if name in OF_TILES else [1] * len(tiles)
        counts = [sum(parts[start:end]) for start, end in pairwise(last)]
        rows = [row.repeat(times, *[1] * (row.ndim - 1)) for row in value.split(counts)]
        repeated[name] = torch.cat(rows)
    return repeated
