"""Cross-attention fusion: gated blocks put between the layers of any decoder that forwards keyword arguments.

Flamingo's and Idefics' blocks come at regular distances, Llama 3.2 Vision's at given positions. Each is put in with the
decoder layer that follows it, so that caches and masks, which count the decoder's own layers, need not know.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm.adapters import (
    FlamingoCrossAttention,
    GatedCrossAttention,
    IdeficsCrossAttention,
    MllamaCrossAttention,
    VisionStates,
)


class FlamingoBlock(GradientCheckpointingLayer, FlamingoCrossAttention):
    """[`FlamingoCrossAttention`] that takes part in the model's gradient checkpointing."""


class MllamaBlock(GradientCheckpointingLayer, MllamaCrossAttention):
    """[`MllamaCrossAttention`] that takes part in the model's gradient checkpointing."""


class IdeficsBlock(GradientCheckpointingLayer, IdeficsCrossAttention):
    """[`IdeficsCrossAttention`] that takes part in the model's gradient checkpointing."""


class FusedDecoderLayer(nn.Module):
    """A decoder layer with a gated cross-attention block before it (Flamingo's order)."""

    def __init__(self, layer: nn.Module, cross_attention: GatedCrossAttention) -> None:
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
        states = None if vision_states is None else vision_states.states
        return self.layer(self.cross_attention(hidden_states, vision_states, states), *args, **kwargs)


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
    if not _takes_kwargs(language_model.forward):
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


def insert_cross_attention(
    language_model: PreTrainedModel,
    every: int,
    cross_attention_layers: Sequence[int] | Literal["mllama"] | None = None,
    block: Literal["flamingo", "idefics"] = "flamingo",
    states_size: int | None = None,
) -> None:
    """Put a block of Flamingo before every `every`-th decoder layer, those of Idefics (`block`) before the first and
    every `every` layers from there, or those of Mllama where `cross_attention_layers` says, in place.

    `cross_attention_layers` are positions as in `MllamaTextConfig`: in the list of all layers, those that attend to
    images among them. `states_size` is the width of the visual tokens, which only Idefics' take if it is not the
    decoder's. Raises ValueError for places that there are not, and for a decoder whose layers do not get the
    keyword arguments of its `forward` (Bloom, Falcon), or that has no attention (Mamba 2).
    """
    layers = decoder_layers(language_model)
    if not passes_kwargs_to_layers(language_model):
        raise ValueError(
            f"{type(language_model).__name__} does not pass keyword arguments to its layers, which cross-attention "
            "needs. Use fusion: prefix, or another language model."
        )
    config = language_model.config
    if not hasattr(config, "num_attention_heads"):
        raise ValueError(
            f"{type(language_model).__name__} has no attention, whose number of heads cross-attention takes. Use "
            "fusion: prefix, or another language model."
        )
    hidden_size, eps = config.hidden_size, getattr(config, "rms_norm_eps", 1e-6)
    # Where heads and width are independent (Qwen3, Gemma 3) the one need not divide the other.
    heads = math.gcd(hidden_size, config.num_attention_heads)
    key_value_heads = math.gcd(heads, getattr(config, "num_key_value_heads", None) or heads)
    intermediate_size = getattr(config, "intermediate_size", None) or 4 * hidden_size
    made: GatedCrossAttention
    for index in _places(len(layers), every, cross_attention_layers, first=0 if block == "idefics" else every - 1):
        if cross_attention_layers is not None:
            made = MllamaBlock(hidden_size, heads, key_value_heads, intermediate_size, index, eps)
        elif block == "idefics":
            made = IdeficsBlock(hidden_size, heads, intermediate_size, index, eps, states_size)
        else:
            made = FlamingoBlock(hidden_size, heads, index, eps)
        layers[index] = FusedDecoderLayer(layers[index], made)
    _plan_fused_layers(language_model, layers)


def _plan_fused_layers(language_model: PreTrainedModel, layers: nn.ModuleList) -> None:
    """Let a decoder's plans of tensor and expert parallelism find the layers that blocks were put before."""
    name = next(name for name, module in language_model.named_modules() if module is layers)
    fused = [isinstance(layer, FusedDecoderLayer) for layer in layers]
    for plan in (language_model._tp_plan, language_model._ep_plan):
        for rule, style in list((plan or {}).items()):
            if plan is not None and rule.startswith(f"{name}.*."):
                plan[rule.replace(f"{name}.*.", f"{name}.*.layer.", 1)] = style
                if all(fused):
                    del plan[rule]


def _places(
    depth: int, every: int, cross_attention_layers: Sequence[int] | Literal["mllama"] | None, first: int
) -> Sequence[int]:
    """The decoder's own layers, of which there are `depth`, that a block stands before."""
    if cross_attention_layers is None:
        if not 1 <= every <= depth:
            raise ValueError(f"cross_attention_every is {every}; this language model has {depth} layers")
        return range(first, depth, every)
    if cross_attention_layers == "mllama":
        if depth < 4:
            raise ValueError(f"cross_attention_layers mllama needs 4 layers; this language model has {depth}")
        return range(3, depth, 4)  # every fifth of all layers is every fourth of the decoder's own
    places = [layer - earlier for earlier, layer in enumerate(sorted(cross_attention_layers))]
    if not places or min(places) < 0 or max(places) >= depth or places != sorted(set(places)):
        raise ValueError(
            f"cross_attention_layers is {list(cross_attention_layers)}; this language model has {depth} layers of its "
            f"own, and one of them must follow each of these: positions from 0 to {depth + len(places) - 2}, no two of "
            "them neighbours"
        )
    return places
