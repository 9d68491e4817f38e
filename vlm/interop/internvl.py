"""InternVL (arXiv 2404.16821): InternViT, pixel shuffle and an MLP, any decoder. An image is one tile."""

from __future__ import annotations

from typing import Any

from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

from vlm.errors import UserError
from vlm.interop.family import Family, Image
from vlm.modeling import VLMForConditionalGeneration


class InternVL(Family):
    architecture = "InternVLForConditionalGeneration"
    projector = "pixel_shuffle_mlp"
    towers = ("internvl_vision",)
    tower = "InternViT"
    tensors = {  # noqa: RUF012
        f"proj.{layer}.{kind}": f"{layer}.{kind}"
        for layer in ("layer_norm", "linear_1", "linear_2")
        for kind in ("weight", "bias")
    }
    fields = {"image_token_id": "image_token_id", "image_seq_length": "image_seq_length"}  # noqa: RUF012
    fixed = {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"}  # noqa: RUF012
    image_markers = ("<img>", "</img>")

    def bridge(self, config: Any) -> dict[str, Any]:
        layer = config.vision_feature_layer
        return {
            "projector": {"type": self.projector, "scale_factor": round(1 / config.downsample_ratio)},
            "vision_feature_layer": None if layer == -1 else layer,  # -1 is the output there, after the final norm
        }

    def settings(self, model: VLMForConditionalGeneration, image: Image) -> dict[str, Any]:
        layer = model.config.vision_feature_layer
        if layer == -1 or isinstance(layer, list):
            raise UserError(f"{self.architecture} reads one layer, and means the output by -1; not {layer}")
        return {
            "downsample_ratio": 1 / model.config.projector.get("scale_factor", 2),
            "vision_feature_layer": -1 if layer is None else layer,
        }

    def stock_processor(self, config: Any, processor: Any, image: Image) -> Any:
        height, width = image.size
        image_processor = GotOcr2ImageProcessor(
            size={"height": height, "width": width},
            min_patches=1,  # a limit, since its processor turns crop_to_patches on
            max_patches=1,
            **self.pixels_of(processor.image_processor),
        )
        start, end = self.image_markers
        template = self.chat_template(processor, processor.image_token)
        named = {"start_image_token": start, "end_image_token": end, "context_image_token": processor.image_token}
        # It takes no videos, and its processor wants a word for them.
        tokenizer = self.with_named_tokens(processor.tokenizer, named | {"video_token": "<video>"})
        return InternVLProcessor(
            image_processor,
            tokenizer,
            InternVLVideoProcessor(size={"height": height, "width": width}),
            image_seq_length=processor.image_seq_length,
            chat_template=template,
        )
