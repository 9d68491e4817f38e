"""Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): SigLIP, pixel shuffle, tiles."""

from __future__ import annotations

from typing import Any

from transformers import Idefics3ImageProcessor, Idefics3Processor, PreTrainedConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

from vlm.errors import UserError
from vlm.interop.family import Family, Image, as_config
from vlm.modeling import VLMForConditionalGeneration


class Idefics3(Family):
    architecture = "Idefics3ForConditionalGeneration"
    projector = "pixel_shuffle"
    towers = ("siglip_vision_model", "idefics3_vision", "smolvlm_vision")  # the same at the size they are made for
    tower = "SigLIP"
    vision = "model.vision_model"
    connector = "model.connector"
    language = "model.text_model"
    tensors = {"proj.weight": "modality_projection.proj.weight"}  # noqa: RUF012
    older = {}  # noqa: RUF012
    tower_config: type[PreTrainedConfig] = Idefics3VisionConfig
    image_markers = ("<fake_token_around_image><global-img>", "<fake_token_around_image>")
    tilings = (None, "idefics3")

    def bridge(self, config: Any) -> dict[str, Any]:
        vision, scale = config.vision_config, config.scale_factor
        return {
            "projector": {"type": "pixel_shuffle", "scale_factor": scale},
            "image_seq_length": (vision.image_size // vision.patch_size // scale) ** 2,
        }

    def settings(self, model: VLMForConditionalGeneration, image: Image) -> dict[str, Any]:
        self.check_output_is_read(model.config)
        self.check_own_size(model.config, image)
        return {"scale_factor": model.config.projector.get("scale_factor", 2)}

    def markers(self, tiling: Any) -> tuple[str, str]:
        return ("", "") if tiling else self.image_markers  # tiles bring their own

    def tiling(self, stock_processor: Any) -> dict[str, Any] | None:
        images = stock_processor.image_processor
        longest, tile = images.size.get("longest_edge"), images.max_image_size["longest_edge"]
        if not images.do_image_splitting:
            return None
        if not longest or longest % tile:
            raise UserError(
                f"images of size {images.size} are cut into tiles of {tile} pixels, which have to divide it"
            )
        return {"type": "idefics3", "max_tiles": (longest // tile) ** 2, "tile_size": [tile, tile]}

    def image_processor(self, stock_processor: Any) -> Any:
        side = stock_processor.image_processor.max_image_size["longest_edge"]
        return self.resizing(stock_processor.image_processor, side, side)

    def vision_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        return as_config(self.tower_config, config)

    def stock_processor(self, config: Any, processor: Any, image: Image) -> Any:
        side, tiler = config.vision_config.image_size, processor.tiler
        image_processor = Idefics3ImageProcessor(
            size={"longest_edge": tiler.tiles_a_side * side} if tiler else {"height": side, "width": side},
            max_image_size={"longest_edge": side},
            do_image_splitting=tiler is not None,
            **self.pixels_of(processor.image_processor),
        )
        return Idefics3Processor(
            image_processor,
            processor.tokenizer,
            image_seq_len=processor.image_seq_length,
            chat_template=self.chat_template(processor, processor.image_token),
        )


class SmolVLM(Idefics3):
    """Its own processor differs in videos alone, and needs another package."""

    architecture = "SmolVLMForConditionalGeneration"
    tower_config = SmolVLMVisionConfig
