"""The parts of a model that a recipe can train: vision, projector, fusion, language, and LoRA on two of them."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from vlm.errors import UserError, nearest

PARTS = ("vision", "projector", "fusion", "language", "lora", "lora_vision")

# Names of our model first; then what stock vision-language models of transformers call the same.
_VISION = ("vision_tower", "vision_model", "visual", "image_encoder")
_PROJECTOR = (
    "multi_modal_projector",
    "anyres_merger",
    "tile_positions",
    "connector",
    "modality_projection",
    "qformer",
    "query_tokens",
    "language_projection",
    "merger",
    "deepstack_merger_list",
    "perceiver_resampler",
    "visual_projection",
    "image_newline",
    "text_projection",
    "logit_scale",
    "logit_bias",
)
_FUSION = ("cross_attention", "gated_cross_attn_layers")


def part_of(name: str) -> str:
    """The part that the parameter `name` belongs to."""
    names = name.split(".")
    if any(n.startswith("lora_") for n in names):
        return "lora_vision" if any(n in _VISION for n in names) else "lora"
    if any(n in _PROJECTOR for n in names):  # whatever is in it, cross-attention too
        return "projector"
    if any(n in _FUSION for n in names):
        return "fusion"
    if any(n in _VISION for n in names):
        return "vision"
    return "language"


def named_parts(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Part, name and parameter, without the untrained copies that peft keeps of the modules it saves."""
    for name, parameter in model.named_parameters():
        if "original_module" not in name.split("."):
            yield part_of(name), name, parameter


def weights_of(parameter: nn.Parameter) -> int:
    """How many weights it holds: several may share a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(parameter.shape if state is None else state.shape)


def set_trainable(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Parameters of the parts in `rates` learn, all others are frozen. Raises UserError for a part without any."""
    require_parts(model, rates)
    model.requires_grad_(False)
    for part, _, parameter in named_parts(model):
        parameter.requires_grad_(part in rates)


def require_parts(model: nn.Module, parts: Iterable[str], lora: Mapping[str, Any] | None = None) -> None:
    """Raise UserError for one of `parts` without parameters in `model`, and for `lora` that [`add_lora`] refuses."""
    if lora is not None:
        _targets(model, lora["target_modules"], lora["parts"])
    found = {part for part, _, _ in named_parts(model)}
    if missing := sorted({*parts} - found):
        raise UserError(
            f"this model has no {' and no '.join(missing)} parameters to train; it has {', '.join(sorted(found))}"
        )


def loose_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Of a model with LoRA what is trained beside it and stands in no module that peft saves, such as the temperature
    of a dual encoder and the queries of a Q-Former, by name."""
    return {
        name: parameter
        for _, name, parameter in named_parts(model)
        if parameter.requires_grad and "lora_" not in name and "modules_to_save" not in name.split(".")
    }


def trains_vision(rates: Mapping[str, float]) -> bool:
    """Whether what the encoder says changes in training."""
    return not rates.keys().isdisjoint(("vision", "lora_vision"))


def freeze_state(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Put frozen vision encoders into evaluation mode: their dropout and batch statistics must not act either."""
    if not trains_vision(rates):
        for name, module in model.named_modules():
            if name.split(".")[-1] in _VISION:
                module.eval()


def _modules_of(model: nn.Module, rates: Mapping[str, float]) -> list[str]:
    """Names of the outermost modules that make up the parts in `rates`, but the language model."""
    found: list[str] = []
    for name, module in model.named_modules():
        last, part = name.split(".")[-1], part_of(name)
        heads = (*_VISION, *_PROJECTOR, *_FUSION)
        if part in rates and last in heads and not any(name.startswith(outer + ".") for outer in found):
            # Of a list, which peft cannot save, each module by itself.
            found += (
                [f"{name}.{n}" for n, _ in module.named_children()] if isinstance(module, nn.ModuleList) else [name]
            )
    return found


def linear_layers(model: nn.Module, part: str) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the linear layers in the numbered layers of a part: without embeddings and output head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and part_of(name) == part and re.search(r"\.\d+\.", name):
            yield name, module


def _targets(model: nn.Module, target_modules: Any, parts: Iterable[str]) -> list[str]:
    """The full names of the layers that get LoRA. Raises UserError as [`add_lora`]."""
    names: list[str] = []
    known: set[str] = set()
    for part in parts:
        layers = {name: name.split(".")[-1] for name, _ in linear_layers(model, part)}
        mine = [name for name, last in layers.items() if target_modules == "all-linear" or last in target_modules]
        if not mine:
            what = "language model" if part == "language" else "vision encoder"
            raise UserError(f"lora.target_modules: the {what} has no linear layer named {target_modules}")
        names += mine
        known |= {*layers.values()}
    for name in target_modules if target_modules != "all-linear" else ():
        if name not in known:
            where = " and ".join(parts)
            raise UserError(f"lora.target_modules: no linear layer named {name!r} in {where}; {nearest(name, known)}")
    return names


def add_lora(model: nn.Module, lora: Mapping[str, Any], rates: Mapping[str, float]) -> PeftModel:
    """LoRA on the parts in `lora`, language or vision; the other parts in `rates` are saved with it.

    `target_modules` are names of linear layers, or `all-linear`: each one in the numbered layers of a part. Raises
    UserError for a part that has none of them, and for a name that no part has.
    """
    names = _targets(model, lora["target_modules"], lora["parts"])
    config = LoraConfig(
        r=lora["r"],
        lora_alpha=lora["lora_alpha"],
        lora_dropout=lora["lora_dropout"],
        use_rslora=lora["use_rslora"],
        target_modules=names,
        modules_to_save=_modules_of(model, rates) or None,
    )
    with warnings.catch_warnings():
        # peft asks by a name that transformers is giving up.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)
