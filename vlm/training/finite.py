"""Whether weights are finite numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlm.errors import UserError


class NonFiniteWeights(UserError):  # noqa: N818 - named for what happened
    """A weight is NaN or infinite."""


def own_share(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor: all of it, unless it is sharded by FSDP or DeepSpeed."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def not_finite(model: nn.Module, *, trained_only: bool = False) -> list[str]:
    """Return the names of parameters, and of batch statistics, with a NaN or an infinity, as far as this process holds
    them. With `trained_only` the parameters that are frozen are left out."""
    return [name for name, tensor in _numbers(model, trained_only) if not _is_finite(tensor)]


def _numbers(model: nn.Module, trained_only: bool) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trained_only:
            yield name, own_share(parameter)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):  # others are constants, and masks have infinities
            yield name, own_share(buffer)


@torch.no_grad()
def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    if tensor.element_size() == 1:  # float8
        tensor = tensor.float()
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # in one pass and without a copy


def require_finite(model: nn.Module, what: str) -> None:
    """Raise NonFiniteWeights if `what`, a model that one process holds whole, is not made of finite numbers."""
    if names := not_finite(model):
        raise NonFiniteWeights(f"{what} has weights that are not finite: {some(names)}")


def some(names: Iterable[str]) -> str:
    """Return the first three names, and how many there are besides."""
    names = list(names)
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
