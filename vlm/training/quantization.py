"""QLoRA (arXiv 2305.14314): the language model's layers in 4 or 8 bits while it is trained through, and back again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from vlm.errors import UserError, nearest
from vlm.training.parts import linear_layers

FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")
"""What transformers sets on a quantized model, and peft looks at to choose its LoRA layers."""


def quantize(model: PreTrainedModel, config: BitsAndBytesConfig, device: torch.device) -> tuple[int, int]:
    """Bring the linear layers of the decoder's layers to 4 or 8 bits on `device`; gives how many were, of how many.
    Embeddings and output head, norms, vision encoder, projector and fusion stay as they are.

    Raises UserError without bitsandbytes, and for a language model that has no layers for it (GPT-2's are of another
    kind, and experts are often kept in one tensor), and for a name in `llm_int8_skip_modules` that no layer has.
    """
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise UserError(
            "model.quantization_config needs bitsandbytes: pip install 'vlm-bridge[quantization]'"
        ) from error
    skipped = set(config.llm_int8_skip_modules or ())
    # Its kernel for CPUs gives back wrong numbers where a block of 64 weights runs on into the next row.
    width = 64 if device.type == "cpu" and config.load_in_4bit else 1
    linear = {name: layer for name, layer in linear_layers(model, "language") if type(layer) is nn.Linear}
    known = {part for name in linear for part in name.split(".")}
    for name in skipped - known:
        raise UserError(
            f"model.quantization_config.llm_int8_skip_modules: the language model has no layer {name!r}; "
            f"{nearest(name, known)}"
        )
    layers = {
        name: layer
        for name, layer in linear.items()
        if layer.in_features % width == 0 and not skipped & set(name.split("."))
    }
    if not layers:
        raise UserError(
            "model.quantization_config: the language model has no linear layers that can be quantized"
            + (f" (on a CPU their width has to be a multiple of {width})" if linear and width > 1 else "")
        )
    for name, layer in layers.items():
        shape = (layer.in_features, layer.out_features, layer.bias is not None)
        with torch.device("meta"):
            if config.load_in_4bit:
                new: Any = bnb.nn.Linear4bit(*shape)
                # For inference it would pack weights another way, and not know them again afterwards.
                new.support_avx512bf16_for_cpu = False
            else:
                # It warns at each call that its inputs are cast.
                logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
                new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=config.llm_int8_threshold)
        weight = layer.weight.detach().cpu()  # of 8 bits, bitsandbytes only quantizes what comes from a CPU
        if config.load_in_4bit:
            quantized: Any = bnb.nn.Params4bit(
                weight,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
                module=new,
            )
        else:
            quantized = bnb.nn.Int8Params(weight, requires_grad=False)
        new.weight = quantized.to(device)  # which is when it is rounded
        new.bias = layer.bias
        new.train(layer.training)
        model.set_submodule(name, new)
    setattr(model, FLAGS[0 if config.load_in_4bit else 1], True)
    return len(layers), len(linear)


def is_quantized(model: nn.Module) -> bool:
    """Whether [`quantize`] has been at work."""
    return any(getattr(model, flag, False) for flag in FLAGS)


@contextmanager
def tokens_apart(model: nn.Module) -> Iterator[None]:
    """Within it 8-bit layers round each token by itself. Otherwise an input over `llm_int8_threshold` keeps its channel
    in half precision for all tokens of the batch, so that their losses depend a little on who else is in it."""
    layers: list[Any] = [layer for layer in model.modules() if type(layer).__name__ == "Linear8bitLt"]
    states = [(layer.state, layer.state.threshold) for layer in layers if hasattr(layer, "state")]
    for state, _ in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in states:
            state.threshold = threshold


@torch.no_grad()
def merged(trained: Any) -> PreTrainedModel:
    """The model with LoRA merged into its weights; a model without LoRA as it is. Quantized weights are float32 again.

    LoRA was trained beside the rounded weights, so it is added to those, and the sum is not rounded again. What was
    quantized is on the CPU afterwards, where there is more room.
    """
    model: Any = trained.base_model.model if isinstance(trained, PeftModel) else trained
    if is_quantized(model):
        _dequantize(model)
    return trained.merge_and_unload() if isinstance(trained, PeftModel) else model


def _dequantize(model: PreTrainedModel) -> None:
    """Float32 weights in place of quantized ones, with the LoRA beside them merged in."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    for name, layer in list(model.named_modules()):
        if type(layer).__name__ not in ("Linear4bit", "Linear8bitLt") or isinstance(layer, BaseTunerLayer):
            continue  # peft's own layers are called the same
        weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).float()
        if name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
            lora: Any = model.get_submodule(name)
            weight += lora.get_delta_weight(lora.active_adapters[0])
        new: Any = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new.weight = nn.Parameter(weight.cpu())
        new.bias = None if layer.bias is None else nn.Parameter(layer.bias.float().cpu())
        model.set_submodule(name, new.train(layer.training))
    for flag in FLAGS:
        model.__dict__.pop(flag, None)
