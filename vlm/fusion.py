"""Cross-attention fusion: gated blocks put between the layers of any decoder that forwards keyword arguments."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm.adapters import GatedCrossAttention, VisionStates


class CrossAttentionBlock(GradientCheckpointingLayer, GatedCrossAttention):
    """[`GatedCrossAttention`] that takes part in the model's gradient checkpointing."""


class FusedDecoderLayer(nn.Module):
    """A decoder layer with a gated cross-attention block before it (Flamingo's order)."""

    def __init__(self, layer: nn.Module, cross_attention: CrossAttentionBlock) -> None:
        super().__init__()
        self.layer = layer
        self.cross_attention = cross_attention

    def __getattr__(self, name: str) -> Any:
        # Decoders read attributes of their layers (`attention_type`, ...): answer with the original layer's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(
        self, hidden_states: Tensor, *args: Any, vision_states: VisionStates | None = None, **kwargs: Any
    ) -> Any:
        if vision_states is not None:
            hidden_states = self.cross_attention(hidden_states, vision_states)
        return self.layer(hidden_states, *args, **kwargs)


def decoder_layers(language_model: PreTrainedModel) -> nn.ModuleList:
    """The list of a language model's decoder layers. Raises ValueError if there is none of the configured length."""
    depth = language_model.config.num_hidden_layers
    for module in language_model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    name = type(language_model).__name__
    raise ValueError(f"{name} has no list of {depth} decoder layers: no place for cross-attention")


class _Reached(Exception):  # noqa: N818 - no error: it ends a run of the decoder at its first layer
    pass


class _Probe(FusedDecoderLayer):
    """In place of a decoder's first layer, tells whether keyword arguments come this far."""

    def __init__(self, layer: nn.Module) -> None:
        nn.Module.__init__(self)
        self.layer = layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise _Reached("vision_states" in kwargs)


@torch.no_grad()
def passes_kwargs_to_layers(language_model: PreTrainedModel) -> bool:
    """Whether a decoder hands the keyword arguments of its `forward` to its layers. Tried: signatures do not tell."""
    if not all(_takes_kwargs(forward) for forward in (language_model.forward, language_model.base_model.forward)):
        return False
    if language_model.device.type == "meta":  # being loaded: it passed when it was built
        return True
    layers = decoder_layers(language_model)
    first, layers[0] = layers[0], _Probe(layers[0])
    token = torch.zeros(
        1, 1, language_model.config.hidden_size, device=language_model.device, dtype=language_model.dtype
    )
    try:
        language_model(inputs_embeds=token, vision_states=None, use_cache=False)
    except _Reached as reached:
        return reached.args[0]
    finally:
        layers[0] = first
    return False


def _takes_kwargs(function: Any) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def insert_cross_attention(language_model: PreTrainedModel, every: int) -> None:
    """Put a gated block before every `every`-th decoder layer, in place.

    Raises ValueError for a decoder whose layers do not get the keyword arguments of its `forward` (Bloom, Falcon).
    """
    layers = decoder_layers(language_model)
    if not passes_kwargs_to_layers(language_model):
        raise ValueError(
            f"{type(language_model).__name__} does not pass keyword arguments to its layers, which cross-attention "
            "needs. Use fusion: prefix, or another language model."
        )
    if not 1 <= every <= len(layers):
        raise ValueError(f"cross_attention_every is {every}; this language model has {len(layers)} layers")
    config = language_model.config
    eps = getattr(config, "rms_norm_eps", 1e-6)
    # Where heads and width are independent (Qwen3, Gemma 3) the one need not divide the other.
    heads = math.gcd(config.hidden_size, config.num_attention_heads)
    for index in range(every - 1, len(layers), every):
        block = CrossAttentionBlock(config.hidden_size, heads, index, eps)
        layers[index] = FusedDecoderLayer(layers[index], block)
