"""InstructBLIP (arXiv 2305.06500): BLIP-2 whose queries read the question too."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Blip2VisionConfig, InstructBlipProcessor, InstructBlipVisionConfig, PreTrainedConfig

from vlm.interop.blip2 import OPTIONS, Blip2
from vlm.interop.family import Image, as_config
from vlm.modeling import VLMForConditionalGeneration


class InstructBlip(Blip2):
    architecture = "InstructBlipForConditionalGeneration"
    reads_text = True
    options = (*OPTIONS, "vocab_size", "max_position_embeddings")
    norm = "qformer.embeddings.layernorm"

    def own_vision_config(self, config: Any) -> PreTrainedConfig:
        """Its encoder is that of BLIP-2, which the Auto classes know."""
        return as_config(Blip2VisionConfig, config.vision_config)

    def vision_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        return as_config(InstructBlipVisionConfig, config)

    def idle(self, model: VLMForConditionalGeneration) -> dict[str, Tensor]:
        """The last layer's feed-forward of the text, which nobody reads behind it."""
        layers: Any = model.model.multi_modal_projector.layers
        return {
            self._of_projector(f"layers.{len(layers) - 1}.text_{name}"): torch.zeros_like(tensor)
            for name, tensor in layers[-1].state_dict().items()
            if name.startswith("feed_forward")
        }

    def stock_processor(self, config: Any, processor: Any, image: Image) -> Any:
        made = super().stock_processor(config, processor, image)
        words = copy.deepcopy(processor.qformer_tokenizer)
        return InstructBlipProcessor(made.image_processor, made.tokenizer, words, made.num_query_tokens)
