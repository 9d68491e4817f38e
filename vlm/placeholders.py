"""Image placeholders of a prompt: the tokens in whose place a server (vLLM) puts visual tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from transformers.processing_utils import MultiModalData

from vlm.tiling import FAKE_TOKEN, GLOBAL_TOKEN, Size


def image_types(
    ids: Sequence[int], image_tokens: Collection[int], tiles: Collection[int], whole: int | None
) -> list[int]:
    """Return 1 for each token of an image, and 0 for others; with markers between tiles, an image is all from its first
    tile to its thumbnail.

    Args:
        image_tokens: the image token, and the markers around images.
        tiles: the markers before tiles.
        whole: the marker before a thumbnail, which comes last.
    """
    types, inside = [], False
    for token in ids:
        if token == whole:
            inside = False
        elif token in tiles:
            inside = True
        types.append(int(inside or token == whole or token in image_tokens))
    return types


def types_of(processor: Any, rows: Sequence[Any]) -> list[list[int]]:
    """Return the [types][`image_types`] of rows of ids that a processor has made."""
    markers = processor.tiler.markers() if processor.tiler is not None else {}
    tokens = {marker: processor.tokenizer.convert_tokens_to_ids(marker) for marker in markers}
    whole, around = tokens.pop(GLOBAL_TOKEN, None), tokens.pop(FAKE_TOKEN, processor.image_token_id)
    lists = (row if isinstance(row, list) else row.tolist() for row in rows)
    return [image_types(row, {processor.image_token_id, around}, set(tokens.values()), whole) for row in lists]


def count_tokens(processor: Any, image_sizes: Sequence[Size]) -> MultiModalData:
    """Return how many tokens each image takes in a text, markers included, and how many rows of `pixel_values`.

    Args:
        image_sizes: `(height, width)` of each image in pixels.
    """
    if processor.tiler is None:
        count = len(image_sizes)
        return MultiModalData([processor.image_seq_length] * count, num_image_patches=[1] * count)
    texts = [
        processor.tiler.text(tuple(size), processor.image_token, processor.image_seq_length) for size in image_sizes
    ]
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    tiles = [processor.tiler.num_tiles(tuple(size)) for size in image_sizes]
    return MultiModalData([len(row) for row in ids], num_image_patches=tiles)
