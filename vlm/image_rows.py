"""The rows of image inputs: an image is one row, or with tiling one row per tile; a text of a Q-Former comes with it.

Shapes: T tiles of all images, M visual tokens per tile, D_t width of the decoder, W words of a Q-Former's text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm.tiling import Size, Tiler

OF_TILES = ("pixel_values", "vision_features")
OF_IMAGES = (*OF_TILES, "image_sizes", "qformer_input_ids", "qformer_attention_mask")
"""Arguments of `forward` with a row per image, the first two with one per tile."""


def image_sizes_of(tiler: Tiler | None, image_sizes: Tensor | None, num_images: int) -> list[Size]:
    """Return `image_sizes [images, 2]` as a list; without tiling, where they say nothing, one for each image.

    Raises ValueError if there are tiles and no sizes.
    """
    if tiler is None:
        return [(0, 0)] * num_images
    if image_sizes is None:
        raise ValueError("images that come in tiles need image_sizes, which the processor gives with pixel_values")
    return [(height, width) for height, width in image_sizes.tolist()]


def texts_of_tiles(config: Any, ids: Tensor | None, mask: Tensor | None, tiles: Sequence[int]) -> dict[str, Tensor]:
    """Return what a Q-Former reads with each tile: of texts `ids [images, W]` that of the tile's image.

    Raises ValueError unless there is one for each image.
    """
    if not config.use_qformer_text_input:
        return {}
    if ids is None or len(ids) != len(tiles):
        given = "none" if ids is None else str(len(ids))
        raise ValueError(
            f"the Q-Former reads a text with each image: {len(tiles)} images need as many rows of "
            f"qformer_input_ids, and there are {given}. Let the processor prepare text and images together"
        )
    texts = {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids) if mask is None else mask}
    if config.tiling is None:
        return texts
    repeats = torch.tensor(tiles, device=ids.device)
    return {name: value.repeat_interleave(repeats, dim=0) for name, value in texts.items()}


def join_tiles(
    visual_tokens: Tensor,
    sizes: Sequence[Size],
    tiler: Tiler,
    tile_positions: nn.Module | None,
    anyres_merger: nn.Module | None,
) -> list[Tensor]:
    """Return the tokens `[tokens, D_t]` of each image, from those of all tiles `[T, M, D_t]`.

    Raises ValueError unless there are as many tiles as images of these sizes have.
    """
    tiles = [tiler.num_tiles(size) for size in sizes]
    if sum(tiles) != len(visual_tokens):
        raise ValueError(
            f"{len(tiles)} images of these image_sizes have {sum(tiles)} tiles, and {len(visual_tokens)} came. "
            "Let the processor cut the images."
        )
    if tile_positions is not None:
        places = [place for size in sizes for place in tiler.places(size)]
        visual_tokens = tile_positions(visual_tokens, torch.tensor(places, device=visual_tokens.device))
    images = visual_tokens.split(tiles)
    if anyres_merger is None:
        return [image.flatten(0, 1) for image in images]
    return [
        anyres_merger(image, tiler.grid(size), tiler.token_grid, tiler.unpadded(size))
        for image, size in zip(images, sizes, strict=True)
    ]
