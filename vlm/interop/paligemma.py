"""PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555): SigLIP, a linear layer, Gemma; a prefix LM."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PaliGemmaProcessor, PreTrainedConfig

from vlm.errors import UserError
from vlm.interop.family import Family, Image
from vlm.modeling import VLMForConditionalGeneration

DECODERS = ("gemma", "gemma2")


class PaliGemma(Family):
    architecture = "PaliGemmaForConditionalGeneration"
    projector = "linear"
    towers = ("siglip_vision_model",)
    tower = "SigLIP"
    image_attention = "prefix_lm"
    prompt = "paligemma"
    tensors = {f"linear.{kind}": f"linear.{kind}" for kind in ("weight", "bias")}  # noqa: RUF012

    def check_stock(self, config: Any) -> None:
        super().check_stock(config)
        if config.image_token_id >= config.text_config.vocab_size:
            raise UserError(
                f"image_token_index is {config.image_token_id} in this checkpoint; only a token that has an embedding, "
                f"below {config.text_config.vocab_size}, can be taken over"
            )

    def bridge(self, config: Any) -> dict[str, Any]:
        vision = config.vision_config
        return {
            "projector": {"type": self.projector},
            "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
            "image_attention": self.image_attention,
        }

    def settings(self, model: VLMForConditionalGeneration, image: Image) -> dict[str, Any]:
        text_config = model.config.text_config
        self.check_output_is_read(model.config)
        self.check_own_size(model.config, image)
        if text_config.model_type not in DECODERS:
            raise UserError(
                f"the language model is {text_config.model_type}; {self.architecture} has Gemma's or Gemma 2's"
            )
        width = text_config.hidden_size
        return {"projection_dim": width, "hidden_size": width, "vocab_size": text_config.vocab_size}

    def text_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        return self._with_attention(config, True)

    def own_text_config(self, config: Any) -> PreTrainedConfig:
        return self._with_attention(super().own_text_config(config), None)

    def _with_attention(self, config: PreTrainedConfig, both_ways: bool | None) -> PreTrainedConfig:
        """The architecture makes every mask itself; by itself, a decoder set so would see ahead where it has none."""
        config = copy.deepcopy(config)
        if config.model_type in DECODERS:
            config.use_bidirectional_attention = both_ways
        return config

    def stock_processor(self, config: Any, processor: Any, image: Image) -> Any:
        self.check_prompt(processor)
        if processor.tokenizer.bos_token is None:
            raise UserError("PaliGemmaProcessor writes the token that begins a text, and this tokenizer has none")
        image_processor = copy.deepcopy(processor.image_processor)
        image_processor.image_seq_length = processor.image_seq_length
        tokenizer = self.with_named_tokens(processor.tokenizer, {"image_token": processor.image_token})
        tokenizer.chat_template = None  # the processor writes the prompt
        return PaliGemmaProcessor(image_processor, tokenizer)
