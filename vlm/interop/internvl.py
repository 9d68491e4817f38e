"""InternVL (arXiv 2404.16821): InternViT, pixel shuffle and an MLP, any decoder, tiles."""

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
    tilings = (None, "internvl")

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

    def tiling(self, stock_processor: Any) -> dict[str, Any] | None:
        images = stock_processor.image_processor  # whose crop_to_patches its processor turns on
        if images.min_patches != 1:
            raise UserError(f"min_patches is {images.min_patches} in this image processor; only 1 can be taken over")
        tile = [images.size["height"], images.size["width"]]
        return (
            {"type": "internvl", "max_tiles": images.max_patches, "tile_size": tile} if images.max_patches > 1 else None
        )

    def image_processor(self, stock_processor: Any) -> Any:
        images = stock_processor.image_processor
        return self.resizing(images, images.size["height"], images.size["width"])

    def stock_processor(self, config: Any, processor: Any, image: Image) -> Any:
        height, width = image.size
        image_processor = GotOcr2ImageProcessor(
            size={"height": height, "width": width},
            crop_to_patches=processor.tiler is not None,
            min_patches=1,
            max_patches=processor.tiler.max_tiles if processor.tiler else 1,  # its processor turns cropping on
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
