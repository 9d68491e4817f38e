"""Number formats chosen from the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

CPU = torch.device("cpu")


def fast_bfloat16(device: str) -> bool:
    """Whether `device` multiplies bfloat16 faster than float32.

    On a CPU without AVX512-BF16 or AMX instructions bfloat16 is emulated, over 100 times slower than float32.
    """
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the number format that `module` computes in, which is not that of quantized weights. A module without
    weights has torch's default."""
    tensors = chain(module.parameters(), module.buffers())
    found = (tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.itemsize > 1)
    return next(found, torch.get_default_dtype())


@contextmanager
def frozen_layers_in(dtype: torch.dtype, model: nn.Module) -> Iterator[None]:
    """Within it the frozen linear layers of `model` have their weights in `dtype`, and afterwards as they were.

    For use under autocast, which casts them to the same numbers, but anew at each call.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    frozen = [
        parameter
        for module in model.modules()
        if isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
        # One that is an embedding too (tied) would change what enters the decoder.
        if not parameter.requires_grad and parameter.dtype == torch.float32 and id(parameter) not in embeddings
        if not parameter.is_meta  # is kept in the computer's memory or on disk, and loaded as it is needed
    ]
    before = [(parameter, parameter.data) for parameter in dict.fromkeys(frozen)]
    try:
        for parameter, weights in before:
            parameter.data = weights.to(dtype)
        yield
    finally:
        for parameter, weights in before:
            parameter.data = weights


@contextmanager
def generation_in_bfloat16(model: Any, enabled: bool | None = None) -> Iterator[None]:
    """Within it `model`, whose weights are frozen, answers in bfloat16 under autocast, as it was trained; by default
    where that is fast."""
    device = input_device(model).type
    if fast_bfloat16(device) if enabled is None else enabled:
        with torch.autocast(device, torch.bfloat16), frozen_layers_in(torch.bfloat16, model):
            yield
    else:
        yield


def devices(model: Any) -> list[torch.device]:
    """The devices that compute `model`, the one that takes its inputs first; several if a device map splits it. Parts
    that are kept in the computer's memory or on disk are loaded to the first as they are needed."""
    places = (getattr(model, "hf_device_map", None) or {"": model.device}).values()
    return [*dict.fromkeys(torch.device(place) for place in places if place not in ("cpu", "disk"))] or [CPU]


def input_device(model: Any) -> torch.device:
    """The device that takes the inputs of `model`."""
    return devices(model)[0]


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator is not None and torch.accelerator.is_available() else "cpu"
