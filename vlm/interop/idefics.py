"""Idefics (arXiv 2306.16527), after Flamingo: CLIP, a resampler, gated cross-attention, Llama. Into ours alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from vlm.errors import UserError
from vlm.interop import mllama
from vlm.interop.family import Family, as_config, rename

BLOCK = mllama.BLOCK | {
    "q_norm.": "cross_attn.q_layer_norm.",
    "k_norm.": "cross_attn.k_layer_norm.",
    "attention_gate": "alpha_cross_attn",
    "feed_forward_gate": "alpha_dense",
}
RESAMPLER_LAYER = {
    "norm_features.": "0.context_layer_norm.",
    "norm_latents.": "0.latents_layer_norm.",
    "attention.q_norm.": "0.q_layer_norm.",
    "attention.k_norm.": "0.k_layer_norm.",
    "attention.q_proj.": "0.q_proj.",
    "attention.k_proj.": "0.k_proj.",
    "attention.v_proj.": "0.v_proj.",
    "attention.o_proj.": "0.output_proj.",
    "feed_forward.0.": "1.ln.",
    "feed_forward.1.": "1.fc.",
    "feed_forward.3.": "1.c_proj.",
}
GATES = ("alpha_cross_attn", "alpha_dense")


class Idefics(Family):
    architecture = "IdeficsForVisionText2Text"
    into_ours_only = True
    vision = "model.vision_model"
    connector = "model.perceiver_resampler"
    language = "model"
    fields = {}  # noqa: RUF012
    fixed = {"use_resampler": True, "qk_layer_norms": True, "dropout": 0.0}  # noqa: RUF012

    def check_stock(self, config: Any) -> None:
        super().check_stock(config)
        if not config.perceiver_config.qk_layer_norms_perceiver:
            raise UserError("qk_layer_norms_perceiver is False in this checkpoint; only True can be taken over")
        if config.additional_vocab_size < 2:
            raise UserError(
                "this checkpoint has no tokens besides those of its language model, and the second of them stands for "
                f"an image; additional_vocab_size is {config.additional_vocab_size}"
            )

    def own_vision_config(self, config: Any) -> PreTrainedConfig:
        return as_config(CLIPVisionConfig, config.vision_config, hidden_size=config.vision_config.embed_dim)

    def own_text_config(self, config: Any) -> PreTrainedConfig:
        return as_config(LlamaConfig, config, vocab_size=config.vocab_size + config.additional_vocab_size)

    def bridge(self, config: Any) -> dict[str, Any]:
        perceiver = config.perceiver_config
        return {
            "projector": {
                "type": "resampler",
                "variant": "idefics",
                "num_image_tokens": perceiver.resampler_n_latents,
                "depth": perceiver.resampler_depth,
                "num_heads": perceiver.resampler_n_heads,
                "head_dim": perceiver.resampler_head_dim,
            },
            "fusion": "cross_attention",
            "cross_attention_every": config.cross_layer_interval,
            "cross_attention_block": "idefics",
            "image_token_id": config.vocab_size + 1,  # after <fake_token_around_image>
            "image_seq_length": 1,
            "vision_feature_select_strategy": "full",
        }

    def whole(self, weights: Mapping[str, Tensor], config: Any) -> Mapping[str, Tensor]:
        """The tokens that were added have tables of their own, and a block's gate may be one number."""
        whole = {
            name: tensor.flatten().expand(config.hidden_size).clone() if name.endswith(GATES) else tensor
            for name, tensor in weights.items()
        }
        for table, added in (("model.embed_tokens", "additional_embedding"), ("lm_head", "additional_fc")):
            whole[f"{table}.weight"] = torch.cat([whole[f"{table}.weight"], whole.pop(f"{table}.{added}.weight")])
        return whole

    def connector_name(self, name: str) -> str:
        if not name.startswith("layers."):
            return rename(name, {"norm.": "layer_norm."})
        _, number, inner = name.split(".", 2)
        return f"blocks.{number}.{rename(inner, RESAMPLER_LAYER)}"

    def decoder_name(self, name: str, config: Any) -> str:
        if not name.startswith("layers."):
            return name
        _, number, inner = name.split(".", 2)
        if not inner.startswith("cross_attention."):
            return f"layers.{number}.{inner.removeprefix('layer.')}"
        block = int(number) // config.cross_attention_every
        return f"gated_cross_attn_layers.{block}.{rename(inner.removeprefix('cross_attention.'), BLOCK)}"
