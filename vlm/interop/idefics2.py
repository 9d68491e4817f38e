"""Idefics2 (arXiv 2405.02246): SigLIP for images of any proportions, a resampler, any decoder. Into ours alone, and all
images of a batch are of one size."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

from vlm.errors import UserError
from vlm.interop.family import Family, as_config, rename

RESAMPLER_LAYER = {
    "norm_latents.": "input_latents_norm.",
    "norm_features.": "input_context_norm.",
    "attention.": "self_attn.",
    "feed_forward.0.": "post_attention_layernorm.",
    "feed_forward.1.": "mlp.",
}


class Idefics2(Family):
    architecture = "Idefics2ForConditionalGeneration"
    into_ours_only = True
    vision = "model.vision_model"
    connector = "model.connector"
    language = "model.text_model"

    def check_stock(self, config: Any) -> None:
        super().check_stock(config)
        for key, part in (("text_config", config.text_config), ("perceiver_config", config.perceiver_config)):
            if part.hidden_act != "silu":
                raise UserError(f"hidden_act of {key} is {part.hidden_act!r}; only 'silu' can be taken over")

    def own_vision_config(self, config: Any) -> PreTrainedConfig:
        """That of Idefics3, which is the same."""
        return as_config(Idefics3VisionConfig, config.vision_config)

    def bridge(self, config: Any) -> dict[str, Any]:
        perceiver = config.perceiver_config
        return {
            "projector": {
                "type": "resampler",
                "variant": "idefics2",
                "num_image_tokens": perceiver.resampler_n_latents,
                "depth": perceiver.resampler_depth,
                "num_heads": perceiver.resampler_n_heads,
                "head_dim": perceiver.resampler_head_dim,
                "num_key_value_heads": perceiver.num_key_value_heads,
                "intermediate_size": config.text_config.intermediate_size,
                "rms_norm_eps": perceiver.rms_norm_eps,
            },
            "image_seq_length": perceiver.resampler_n_latents,
        }

    def connector_name(self, name: str) -> str:
        if name.startswith("proj_in."):
            return name.replace("proj_in", "modality_projection")
        if not name.startswith("layers."):
            return f"perceiver_resampler.{name}"
        _, number, inner = name.split(".", 2)
        return f"perceiver_resampler.layers.{number}.{rename(inner, RESAMPLER_LAYER)}"
