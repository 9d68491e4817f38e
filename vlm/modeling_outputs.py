"""What the model returns.

Shapes: B rows, L tokens, M visual tokens of an image, D_t width of the decoder, V size of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


@dataclass
class VLMModelOutput(BaseModelOutputWithPast):
    """Output of [`VLMModel`].

    Attributes:
        last_hidden_state: `[B, L, D_t]`, after the decoder's final norm.
        vision_states: with cross-attention, what the next tokens look at.
        image_hidden_states: the visual tokens `[M, D_t]` of each image.
        image_outputs: what `get_image_features` returned of the images.
        decoder_outputs: all that the decoder returned, for the head of its causal language model.
    """

    vision_states: Any = None
    image_hidden_states: Any = None
    image_outputs: Any = None
    decoder_outputs: Any = None

    @property
    def router_logits(self) -> Any:
        """Those of a mixture of experts, if they were asked for."""
        return getattr(self.decoder_outputs, "router_logits", None)


@dataclass
class VLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with what [`VLMModelOutput`] has of the images."""

    vision_states: Any = None
    image_hidden_states: Any = None
    image_outputs: Any = None
