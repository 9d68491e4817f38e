"""Llama 3.2 Vision (arXiv 2407.21783): an encoder of its own, one linear layer, layers of the decoder that attend to
images. Into ours alone, an image as one tile.

A token that no image stands before attends in transformers to all images of its row, and to padding; in Meta's code,
and in ours, to none. Where an image stands first, logits are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from vlm.errors import UserError
from vlm.interop.family import Family, as_config, rename

BLOCK = {
    "norm.": "input_layernorm.",
    "q_norm.": "cross_attn.q_norm.",
    "k_norm.": "cross_attn.k_norm.",
    "q_proj.": "cross_attn.q_proj.",
    "k_proj.": "cross_attn.k_proj.",
    "v_proj.": "cross_attn.v_proj.",
    "o_proj.": "cross_attn.o_proj.",
    "attention_gate": "cross_attn_attn_gate",
    "feed_forward.0.": "post_attention_layernorm.",
    "feed_forward.1.": "mlp.",
    "feed_forward_gate": "cross_attn_mlp_gate",
}


ADDED_TOKENS = 8
"""Rows that the table of words has more than the output layer."""


class Mllama(Family):
    architecture = "MllamaForConditionalGeneration"
    into_ours_only = True
    vision = "model.vision_model"
    fields = {"image_token_id": "image_token_index"}  # noqa: RUF012
    tensors = {"linear.weight": "weight", "linear.bias": "bias"}  # noqa: RUF012

    def check_stock(self, config: Any) -> None:
        super().check_stock(config)
        text, vision = config.text_config, config.vision_config
        places = sorted(text.cross_attention_layers)
        if any(layer + 1 in places or layer + 1 >= text.num_hidden_layers for layer in places):
            raise UserError(
                f"cross_attention_layers is {places} of {text.num_hidden_layers} layers; after each of them a layer "
                "that attends to the text has to follow"
            )
        if [1, 1] not in vision.supported_aspect_ratios:
            raise UserError("this encoder takes no image as one tile: [1, 1] is not in its supported_aspect_ratios")

    def own_text_config(self, config: Any) -> PreTrainedConfig:
        """The decoder's own layers, which are Llama's."""
        text = config.text_config
        depth = text.num_hidden_layers - len(text.cross_attention_layers)
        return as_config(
            LlamaConfig,
            text,
            num_hidden_layers=depth,
            vocab_size=text.vocab_size + ADDED_TOKENS,
            tie_word_embeddings=False,
        )

    def bridge(self, config: Any) -> dict[str, Any]:
        return {
            "projector": {"type": "linear"},
            "fusion": "cross_attention",
            "cross_attention_layers": sorted(config.text_config.cross_attention_layers),
            "image_seq_length": 1,
            "vision_feature_select_strategy": "full",
            "vision_hidden_size": config.vision_config.vision_output_dim,
        }

    def whole(self, weights: Mapping[str, Tensor], config: Any) -> Mapping[str, Tensor]:
        """Tokens that can be read and not written, such as the image token, get the mean of the others' rows in the
        output layer: their logits are then never the largest, and their probability is at most theirs in the mean."""
        head = weights["lm_head.weight"]
        return {**weights, "lm_head.weight": torch.cat([head, head.mean(dim=0, keepdim=True).expand(ADDED_TOKENS, -1)])}

    def decoder_name(self, name: str, config: Any) -> str:
        if not name.startswith("layers."):
            return name
        _, number, inner = name.split(".", 2)
        ours = set(config.cross_attention_layers or ())
        own = [n for n in range(config.text_config.num_hidden_layers + len(ours)) if n not in ours]
        place = own[int(number)]
        if inner.startswith("cross_attention."):
            return f"layers.{place - 1}.{rename(inner.removeprefix('cross_attention.'), BLOCK)}"
        return f"layers.{place}.{inner.removeprefix('layer.')}"
