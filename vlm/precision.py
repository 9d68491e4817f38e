"""Number formats chosen from the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def fast_bfloat16(device: str) -> bool:
    """Whether `device` multiplies bfloat16 faster than float32.

    On a CPU without AVX512-BF16 or AMX instructions bfloat16 is emulated, over 100 times slower than float32.
    """
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


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
    if fast_bfloat16(model.device.type) if enabled is None else enabled:
        with torch.autocast(model.device.type, torch.bfloat16), frozen_layers_in(torch.bfloat16, model):
            yield
    else:
        yield


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator is not None and torch.accelerator.is_available() else "cpu"
