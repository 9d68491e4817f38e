"""Which operators give sums on CUDA that may differ from run to run, since their kernels add in no fixed order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

ALWAYS = (
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "_scaled_dot_product_cudnn_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_flash_attention_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "convolution_backward",
    "embedding_dense_backward",
    "grid_sampler_2d_backward",
    "max_pool2d_with_indices_backward",
    "reflection_pad2d_backward",
    "replication_pad2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward",
    "upsample_linear1d_backward",
)
"""Those of the documentation of `torch.use_deterministic_algorithms` that an image or text model may call."""
BY_INDEX = ("index_add", "index_copy", "put", "scatter", "scatter_add", "scatter_reduce")
"""Those that are deterministic only if no two values go to the same place."""


def is_unordered(name: str, args: Any) -> bool:
    """Return whether the operator `name` with arguments `args` on the host is not deterministic on CUDA.

    `index_put` is not listed: CUDA sorts the index before it adds. Whole numbers have the same sum in any order.
    """
    name = name.removesuffix("_")
    if name in ALWAYS:
        return True
    if name in ("cumsum", "cumprod"):
        return args[0].is_floating_point()
    if name not in BY_INDEX or not args[0].is_floating_point():
        return False
    if name.startswith("scatter"):
        return _repeats(args[2], args[1])
    return _repeats((args[1] if name == "put" else args[2]).flatten(), 0)


def _repeats(index: Tensor, dim: int) -> bool:
    """Whether a number is in `index` twice along `dim`."""
    if index.ndim == 0:
        return False
    ordered = index.sort(dim=dim).values
    return bool((ordered.diff(dim=dim) == 0).any())
