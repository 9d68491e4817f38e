"""LLaVA (arXiv 2310.03744): any encoder with a class token or none, an MLP, any decoder."""

from __future__ import annotations

from typing import Any

from transformers import LlavaProcessor

from vlm.errors import UserError
from vlm.interop.family import Family, Image
from vlm.modeling import VLMForConditionalGeneration


class Llava(Family):
    architecture = "LlavaForConditionalGeneration"
    projector = "mlp"
    tensors = {f"linear_{i}.{kind}": f"linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}  # noqa: RUF012
    fields = {"image_token_id": "image_token_index", "image_seq_length": "image_seq_length"}  # noqa: RUF012
    fixed = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}  # noqa: RUF012

    def bridge(self, config: Any) -> dict[str, Any]:
        return {
            "projector": {"type": "mlp"},
            "vision_feature_layer": config.vision_feature_layer,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
        }

    def settings(self, model: VLMForConditionalGeneration, image: Image) -> dict[str, Any]:
        return {
            "vision_feature_layer": self._layer(model.config),
            "vision_feature_select_strategy": self._strategy(model.config, image),
        }

    def stock_processor(self, config: Any, processor: Any, image: Image) -> Any:
        return LlavaProcessor(
            processor.image_processor,
            processor.tokenizer,
            chat_template=processor.chat_template,
            image_token=processor.image_token,
            **self.counts(config, image),
        )

    def counts(self, config: Any, image: Image) -> dict[str, Any]:
        """By what the processor counts an image's tokens. Raises UserError if it would count wrongly."""
        patch = getattr(config.vision_config, "patch_size", None)
        if not isinstance(patch, int) or (image.size[0] // patch, image.size[1] // patch) != image.grid:
            raise UserError(
                "LLaVA's processor counts an image's tokens by the encoder's patch size, "
                f"and {config.vision_config.model_type} does not cut images into patches of one size"
            )
        return {
            "patch_size": patch,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "num_additional_image_tokens": image.num_prefix,
        }

    def _layer(self, config: Any) -> int | list[int]:
        """LLaVA reads a hidden state, and cannot read what comes after the final norm."""
        if config.vision_feature_layer is not None:
            return config.vision_feature_layer
        if config.vision_config.model_type == "clip_vision_model":
            return -1  # its output has no final norm
        raise UserError(
            "LLaVA reads the encoder before its final norm, and this model after it; "
            "only a model trained with vision_feature_layer (-1, or -2 as in LLaVA) can become one"
        )

    def _strategy(self, config: Any, image: Image) -> str:
        """LLaVA's `default` takes one token off, whatever it is."""
        if config.vision_feature_select_strategy == "full" or image.num_prefix == 0:
            return "full"
        if image.num_prefix == 1:
            return "default"
        raise UserError(
            f"LLaVA drops one class token or none, and this encoder has {image.num_prefix} class and register tokens; "
            "only a model trained with vision_feature_select_strategy: full can become one"
        )
