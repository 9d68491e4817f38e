"""LLaVA-NeXT (llava-vl.github.io/blog/2024-01-30-llava-next): LLaVA on tiles, whose tokens are put together again."""

from __future__ import annotations

from typing import Any

from transformers import LlavaNextImageProcessor, LlavaNextProcessor

from vlm.errors import UserError
from vlm.interop.family import Image
from vlm.interop.llava import Llava
from vlm.modeling import VLMForConditionalGeneration


class LlavaNext(Llava):
    architecture = "LlavaNextForConditionalGeneration"
    fields = {"image_token_id": "image_token_index"}  # noqa: RUF012
    tilings = ("anyres",)
    others = {"model.anyres_merger.image_newline": "model.image_newline"}  # noqa: RUF012
    older = {**Llava.older, "model.image_newline": "image_newline"}  # noqa: RUF012

    def bridge(self, config: Any) -> dict[str, Any]:
        side, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
        patches = side // config.vision_config.patch_size
        grids = [[height // side, width // side] for height, width in pinpoints]
        if [1, 1] in grids or any(pixels % side for pinpoint in pinpoints for pixels in pinpoint):
            raise UserError(
                f"image_grid_pinpoints are {pinpoints}; only multiples of the encoder's {side} pixels, of several "
                "tiles, can be taken over"
            )
        return super().bridge(config) | {
            "image_seq_length": patches * patches,
            "tiling": {
                "type": "anyres",
                "max_tiles": max(rows * columns for rows, columns in grids),
                "tile_size": [side, side],
                "token_grid": [patches, patches],
                "grids": grids,
            },
        }

    def settings(self, model: VLMForConditionalGeneration, image: Image) -> dict[str, Any]:
        assert model.tiler is not None
        height, width = image.size
        side = getattr(model.config.vision_config, "image_size", None)
        if image.size != (side, side):
            raise UserError(
                f"{self.architecture} takes tiles of the size that its encoder was made for, {side} x {side} pixels, "
                f"and this model's are {height} x {width}"
            )
        if (1, 1) in model.tiler.all_grids():
            raise UserError(
                f"{self.architecture} cuts every image, and this model shows small ones whole; only a model trained "
                "with grids of several tiles alone can become one, such as those of `preset: llava_next`"
            )
        return super().settings(model, image) | {
            "image_seq_length": model.config.image_seq_length,
            "image_grid_pinpoints": [[rows * height, columns * width] for rows, columns in model.tiler.all_grids()],
        }

    def image_processor(self, stock_processor: Any) -> Any:
        side = stock_processor.image_processor.crop_size["height"]
        return self.resizing(stock_processor.image_processor, side, side)

    def stock_processor(self, config: Any, processor: Any, image: Image) -> Any:
        side, _ = image.size
        image_processor = LlavaNextImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=config.image_grid_pinpoints,
            **self.pixels_of(processor.image_processor),
        )
        return LlavaNextProcessor(
            image_processor, processor.tokenizer, chat_template=processor.chat_template, **self.counts(config, image)
        )
