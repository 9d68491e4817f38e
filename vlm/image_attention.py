"""Tokens of an image that see each other both ways, as in Gemma 3 (arXiv 2503.19786); words see what is before."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask


def bidirectional_image_masks(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Any,
    position_ids: Tensor | None,
    token_type_ids: Tensor,
) -> Any:
    """The decoder's masks `[B, 1, L, L]`, by kind of layer where it has several.

    `token_type_ids [B, L]`, of the tokens behind those in the `cache`, are 1 at image tokens; a run of them is an
    image. In layers with a sliding window an image token sees of its image what is in the window, as in Gemma 3.
    Raises ValueError for attention that takes no such mask.
    """
    text_config = config.get_text_config()
    if "flash" in str(text_config._attn_implementation):
        raise ValueError(
            "image_attention: bidirectional needs a mask, which flash attention does not take: load the model with "
            'attn_implementation="sdpa"'
        )
    arguments: dict[str, Any] = {
        "config": text_config,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "cache": cache,
        "position_ids": position_ids,
    }
    blocks: Tensor = get_block_sequence_ids_for_mask(token_type_ids, device=inputs_embeds.device)
    if cache is not None:  # masks count from the first token ever read
        blocks = F.pad(blocks, (cache.get_seq_length(), 0), value=-1)
    if "sliding_attention" in (getattr(text_config, "layer_types", None) or ()):
        return create_masks_for_vision_model(**arguments, block_sequence_ids=blocks)
    return create_masks_for_generate(**arguments, block_sequence_ids=blocks)
