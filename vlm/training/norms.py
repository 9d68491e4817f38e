"""How large the parts that learn are, and how large their gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vlm.training.parts import named_parts


def parameter_norms(model: nn.Module) -> dict[str, float]:
    """`param_norm_PART` of each part that learns: the root of the sum of squares of all its weights."""
    return {f"param_norm_{part}": float(norm) for part, norm in _norms(model, gradients=False).items()}


def gradient_norms(model: nn.Module, total: float) -> dict[str, float]:
    """`grad_norm_PART` of each part, before the gradients were clipped: `total` is what all had together then."""
    clipped = _norms(model, gradients=True)
    whole = sum(float(norm) ** 2 for norm in clipped.values()) ** 0.5
    return {f"grad_norm_{part}": float(norm) * total / whole for part, norm in clipped.items()} if whole else {}


def _norms(model: nn.Module, *, gradients: bool) -> dict[str, Tensor]:
    tensors: dict[str, list[Tensor]] = {}
    for part, _, parameter in named_parts(model):
        tensor = parameter.grad if gradients else parameter.detach()
        if parameter.requires_grad and tensor is not None:
            tensors.setdefault(part, []).append(tensor)
    return {part: _norm(each) for part, each in tensors.items()}


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([*tensors], dtype=torch.float32)))
