"""Where the images of a batch are among its tokens.

Shapes: B rows, L tokens, D_t width of the decoder. `image_tokens` has the number of tokens of each image, all rows' in
order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from vlm.adapters import VisionStates
from vlm.cache_state import has_read


def find_image_tokens(
    image_token_id: int, input_ids: Tensor | None, inputs_embeds: Tensor | None, embeddings: nn.Module
) -> Tensor:
    """Return `[B, L]`, where the image tokens are: in `input_ids [B, L]`, or without them where `inputs_embeds
    [B, L, D_t]` have the embedding of the image token."""
    if input_ids is not None and input_ids.shape[1]:  # `generate` passes empty ids next to embeddings
        return input_ids == image_token_id
    if inputs_embeds is None:
        raise ValueError("images need input_ids or inputs_embeds, whose image tokens say where they belong")
    token = torch.full((1,), image_token_id, device=inputs_embeds.device)
    return (inputs_embeds == embeddings(token)).all(dim=-1)


def require_whole_images(image_mask: Tensor, image_tokens: Sequence[int], image_seq_length: int) -> None:
    """Raise ValueError unless the image tokens of `image_mask [B, L]` make whole images, each row's its own.

    Args:
        image_seq_length: the tokens of an image that is not cut into tiles.
    """
    counts = image_mask.sum(dim=1).tolist()
    if sum(counts) != sum(image_tokens):
        same = set(image_tokens) or {image_seq_length}
        of = f" of {same.pop()} tokens" if len(same) == 1 else ""
        raise ValueError(
            f"the inputs hold {sum(counts)} image tokens; {len(image_tokens)} images{of} need {sum(image_tokens)}. "
            "Let the processor expand the image tokens, and pass its pixel_values."
        )
    ends = set(accumulate(image_tokens, initial=0))
    for row, end in enumerate(accumulate(counts)):
        if end not in ends:
            image = image_tokens[bisect_left([*accumulate(image_tokens)], end)]
            raise ValueError(f"row {row} of the inputs holds {counts[row]} image tokens, and an image takes {image}")


def latest_image(image_mask: Tensor, image_tokens: Sequence[int], attention_mask: Any, num_read: int = 0) -> Tensor:
    """Return `[B, L]`: the number, over all rows, of the latest image that each token may look at; -1 for none.

    Args:
        attention_mask: as in `forward`; in rows of several conversations it says which images are a token's own.
        num_read: tokens of the cache, which come before these.
    """
    tokens = torch.tensor(image_tokens, device=image_mask.device)
    ordinal = torch.full(image_mask.shape, -1, device=image_mask.device)
    ordinal[image_mask] = torch.arange(len(tokens), device=image_mask.device).repeat_interleave(tokens)
    if isinstance(attention_mask, dict):  # of a decoder that has sliding layers, made for a static cache
        attention_mask = attention_mask["full_attention"]
    if attention_mask is None or attention_mask.ndim == 2:
        return ordinal.cummax(dim=1).values
    # A static cache's mask is wider than what is in it.
    visible = attention_mask[:, 0, :, num_read : num_read + image_mask.shape[1]]
    visible = visible if visible.dtype == torch.bool else visible == 0
    return ordinal[:, None, :].masked_fill(~visible, -1).amax(dim=-1)


def states_without_images(
    length: int, image_mask: Tensor | None, image_seq_length: int, cache: Cache | None, states: VisionStates | None
) -> VisionStates | None:
    """Return what `length` tokens that come without images look at: what the last token of the `cache` sees, `states`.

    Raises ValueError if there are image tokens, and no cache that may hold their images.
    """
    if states is not None:
        return states.for_next_tokens(length)
    if image_mask is not None and not torch.compiler.is_compiling() and not has_read(cache):
        require_whole_images(image_mask, [], image_seq_length)
    return None
