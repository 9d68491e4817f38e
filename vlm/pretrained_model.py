"""What the model, with or without output head, is to transformers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from vlm.adapters import PROJECTORS, GatedCrossAttention
from vlm.configuration import VLMConfig
from vlm.tiling import Size, tiler_of

UNQUANTIZED = ("vision_tower", "multi_modal_projector")
"""Parts that keep their weights in a model that is loaded in 4 or 8 bits."""


class VLMPreTrainedModel(PreTrainedModel):
    """What [`VLMModel`] and [`VLMForConditionalGeneration`] are to transformers."""

    config_class = VLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # as every model of transformers has it
    supports_gradient_checkpointing = True
    _no_split_modules = [  # noqa: RUF012 - the parts add their own
        "FusedDecoderLayer",
        "TilePositions",
        "AnyresMerger",
        *(projector.__name__ for projector in PROJECTORS.values()),
    ]
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: VLMConfig) -> None:
        super().__init__(config)
        self.tiler = tiler_of(config.tiling)

    @torch.no_grad()
    @guard_torch_init_functions()
    def initialize_weights(self) -> None:
        """Initialize what no checkpoint had. Cross-attention comes first: its norms start at 1, those of a decoder that
        it would be taken for a part of may start at 0 (Gemma)."""
        blocks = [module for module in self.modules() if isinstance(module, GatedCrossAttention)]
        for module in chain.from_iterable(block.modules() for block in blocks):
            self._initialize_weights(module, self.is_custom_code())
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "reset_own"):
            module.reset_own()  # type: ignore[operator]  # a method

    def num_tiles(self, image_sizes: Sequence[Size]) -> list[int]:
        """How many rows of `pixel_values` each image is: 1 without tiling."""
        return [1 if self.tiler is None else self.tiler.num_tiles(size) for size in image_sizes]

    def image_tokens(self, image_sizes: Sequence[Size]) -> list[int]:
        """How many tokens of `input_ids` stand for each image. Sizes, `(height, width)`, only matter with tiling."""
        length = self.config.image_seq_length
        return [length if self.tiler is None else self.tiler.num_image_tokens(size, length) for size in image_sizes]
