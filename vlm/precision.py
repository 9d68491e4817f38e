"""Number formats chosen from the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def fast_bfloat16(device: str) -> bool:
    """Whether `device` multiplies bfloat16 faster than float32.

    On a CPU without AVX512-BF16 or AMX instructions bfloat16 is emulated, over 100 times slower than float32.
    """
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """Computing as training on `device` does unless its recipe says otherwise: in bfloat16 where that is fast."""
    return torch.autocast(device.type, torch.bfloat16) if fast_bfloat16(device.type) else nullcontext()


def default_device() -> str:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator is not None and torch.accelerator.is_available() else "cpu"
