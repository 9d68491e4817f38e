"""Who sees whom besides what is before: the tokens of an image each other, as in Gemma 3 (arXiv 2503.19786), or image
and prompt each other, as in PaliGemma (arXiv 2407.07726), a prefix LM (T5, arXiv 1910.10683)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

from vlm.cache_state import has_read


def image_attention_masks(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Any,
    position_ids: Tensor | None,
    token_type_ids: Tensor,
) -> Any:
    """The decoder's masks `[B, 1, L, L]`, by kind of layer where it has several.

    `token_type_ids [B, L]` are of the tokens behind those in the `cache`. With `image_attention: bidirectional` they
    are 1 at image tokens, a run of which is an image; in layers with a sliding window an image token sees of its image
    what is in the window, as in Gemma 3. With `prefix_lm` they are 0 in the prompt, whose tokens see all of it in every
    layer, as in PaliGemma 2, and 1 behind it. Raises ValueError for attention that takes no such mask.
    """
    text_config = config.get_text_config()
    if "flash" in str(text_config._attn_implementation):
        raise ValueError(
            f"image_attention: {config.image_attention} needs a mask, which flash attention does not take: load the "
            'model with attn_implementation="sdpa"'
        )
    arguments: dict[str, Any] = {
        "config": text_config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "cache": cache,
        "position_ids": position_ids,
    }
    blocks: Tensor
    if config.image_attention == "prefix_lm":
        blocks = torch.where(token_type_ids == 0, 0, -1)
    else:
        blocks = get_block_sequence_ids_for_mask(token_type_ids, device=inputs_embeds.device)
    if cache is not None:  # masks count from the first token ever read
        blocks = F.pad(blocks, (cache.get_seq_length(), 0), value=-1)
    slides = "sliding_attention" in (getattr(text_config, "layer_types", None) or ())
    if slides and config.image_attention == "bidirectional":
        return create_masks_for_vision_model(**arguments, block_sequence_ids=blocks)
    return create_masks_for_generate(**arguments, block_sequence_ids=blocks)


def attention_masks(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Any,
    cache: Cache | None,
    position_ids: Tensor | None,
    token_type_ids: Tensor | None,
    image_mask: Tensor | None,
    has_images: bool,
) -> Any:
    """Return the decoder's masks as [`image_attention_masks`], or `attention_mask` if its own masks will do.

    Args:
        image_mask: `[B, L]`, where the image tokens are.

    Raises ValueError if nothing says where a prompt ends.
    """
    if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.ndim == 4):
        return attention_mask
    types = None
    if config.image_attention == "bidirectional":
        types = image_mask.long() if has_images and config.uses_prefix and image_mask is not None else None
    elif config.image_attention == "prefix_lm" and not has_read(cache):
        types = require_types(token_type_ids)
    if types is None:
        return attention_mask
    return image_attention_masks(config, inputs_embeds, attention_mask, cache, position_ids, types)


def require_types(token_type_ids: Tensor | None) -> Tensor:
    """Return the types of a prefix LM's tokens. Raises ValueError if there are none."""
    if token_type_ids is None:
        raise ValueError(
            "image_attention: prefix_lm needs token_type_ids, 0 in the prompt and 1 after it: let the processor "
            "prepare the text, by its chat template or by itself"
        )
    return token_type_ids
