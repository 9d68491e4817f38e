"""Gemma 3 (arXiv 2503.19786): SigLIP, the means of squares of patches, image tokens that see each other."""

from __future__ import annotations

import math
from typing import Any

from transformers import Gemma3ImageProcessor, Gemma3Processor

from vlm.errors import UserError
from vlm.interop.family import Family, Image, Renamed
from vlm.modeling import VLMForConditionalGeneration


class Gemma3(Family):
    architecture = "Gemma3ForConditionalGeneration"
    projector = "average_pool"
    towers = ("siglip_vision_model",)
    tower = "SigLIP"
    image_attention = "bidirectional"
    tensors = {  # noqa: RUF012
        "norm.weight": Renamed("mm_soft_emb_norm.weight", lambda weight: weight - 1, lambda weight: weight + 1),
        "linear.weight": Renamed("mm_input_projection_weight", lambda weight: weight.T, lambda weight: weight.T),
    }
    image_markers = ("\n\n<start_of_image>", "<end_of_image>\n\n")

    def check_stock(self, config: Any) -> None:
        super().check_stock(config)
        patches = config.vision_config.image_size // config.vision_config.patch_size
        side = math.isqrt(config.mm_tokens_per_image)
        if patches % side:
            raise UserError(f"squares of {patches} x {patches} patches cannot be made {side} x {side} tokens evenly")
        self._check_eps(config.vision_config)

    def bridge(self, config: Any) -> dict[str, Any]:
        return {
            "projector": {"type": self.projector, "num_image_tokens": config.mm_tokens_per_image},
            "image_seq_length": config.mm_tokens_per_image,
            "image_attention": self.image_attention,
        }

    def settings(self, model: VLMForConditionalGeneration, image: Image) -> dict[str, Any]:
        config = model.config
        self.check_output_is_read(config)
        self._check_eps(config.vision_config)
        if config.text_config.model_type != "gemma3_text":
            raise UserError(f"the language model is {config.text_config.model_type}; {self.architecture} has Gemma 3's")
        tokens, side = config.image_seq_length, config.vision_config.image_size
        if image.size != (side, side) or image.grid[0] % math.isqrt(tokens):
            raise UserError(
                f"{self.architecture} takes images of {side} x {side} pixels, as its encoder was made for, and as many "
                f"patches a side as {math.isqrt(tokens)} tokens divide; this model's images are {image.size[0]} x "
                f"{image.size[1]}, {image.grid[0]} x {image.grid[1]} patches"
            )
        return {"mm_tokens_per_image": tokens}

    def stock_processor(self, config: Any, processor: Any, image: Image) -> Any:
        height, width = image.size
        image_processor = Gemma3ImageProcessor(
            size={"height": height, "width": width}, **self.pixels_of(processor.image_processor)
        )
        named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": processor.image_token}
        template = self.chat_template(processor, named["boi_token"])
        tokenizer = self.with_named_tokens(processor.tokenizer, named)
        config.boi_token_index, config.eoi_token_index = tokenizer.boi_token_id, tokenizer.eoi_token_id
        return Gemma3Processor(
            image_processor, tokenizer, image_seq_length=processor.image_seq_length, chat_template=template
        )

    def image_processor(self, stock_processor: Any) -> Any:
        images = stock_processor.image_processor
        return self.resizing(images, images.size["height"], images.size["width"])

    def placeholder(self, stock_processor: Any) -> str:
        return stock_processor.boi_token

    def _check_eps(self, vision_config: Any) -> None:
        if vision_config.layer_norm_eps != 1e-6:
            raise UserError(f"layer_norm_eps of the encoder is {vision_config.layer_norm_eps}; only 1e-6 fits")
