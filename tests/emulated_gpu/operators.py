"""Operators that only CUDA has, on CPU tensors: its three attention kernels, cuDNN's batch norm, and others.

Each function takes the arguments of its operator. Attention has no dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _seed() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def _probabilities(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = query.float() @ key.float().transpose(-1, -2) * scale
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.float()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def _attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float | None):
    """Return the output and zeros as log-sum-exp: the backward pass computes the probabilities again."""
    groups = query.shape[-3] // key.shape[-3]
    key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output = _probabilities(query, key, bias, causal, scale) @ value.float()
    return output.to(query.dtype), output.new_zeros(output.shape[:-1])


def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Any, causal: bool, scale: float | None):
    """Return the gradients of query, key, value and bias."""
    heads, groups = key.shape[-3], query.shape[-3] // key.shape[-3]
    k, v = (x.repeat_interleave(groups, -3).float() for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    p = _probabilities(query, k, bias, causal, scale)
    grad = grad.float()
    of_p = grad @ v.transpose(-1, -2)
    of_scores = p * (of_p - (of_p * p).sum(-1, keepdim=True))
    of_query = of_scores @ k * scale
    of_key = of_scores.transpose(-1, -2) @ query.float() * scale
    of_value = p.transpose(-1, -2) @ grad
    of_key, of_value = (x.unflatten(-3, (heads, groups)).sum(-3) for x in (of_key, of_value))
    of_bias = None
    if bias is not None and bias.is_floating_point():
        of_bias = of_scores.to(bias.dtype).sum_to_size(bias.shape)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype), of_bias


def _heads_inside(output: Tensor) -> Tensor:
    """Return `[B, H, L, D]` in the memory layout `[B, L, H, D]`, like the Flash and memory-efficient kernels."""
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def flash(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    output, lse = _attention(query, key, value, None, is_causal, scale)
    lengths = query.shape[2], key.shape[2]
    seed = torch.zeros(2, dtype=torch.int64)
    return _heads_inside(output), lse, None, None, *lengths, seed, _seed(), query.new_empty(0)


def efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    output, lse = _attention(query, key, value, attn_bias, is_causal, scale)
    return _heads_inside(output), lse, _seed(), _seed()


def cudnn(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, debug=False, *, scale=None):
    output, lse = _attention(query, key, value, attn_bias, is_causal, scale)
    if output.shape == query.shape:
        output = torch.empty_like(query).copy_(output)  # in the memory layout of the query
    lengths = query.shape[2], key.shape[2]
    return output, lse.unsqueeze(-1), None, None, *lengths, _seed(), _seed(), query.new_empty(0)


def flash_backward(grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, p, causal, seed, offset, *, scale=None):
    return _backward(grad, query, key, value, None, causal, scale)[:3]


def efficient_backward(grad, query, key, value, bias, out, lse, seed, offset, p, mask, causal=False, *, scale=None):
    *grads, of_bias = _backward(grad, query, key, value, bias, causal, scale)
    return *grads, of_bias if mask[3] else None


def cudnn_backward(
    grad, query, key, value, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, p, causal, *, scale=None
):
    return _backward(grad, query, key, value, bias, causal, scale)[:3]


def rms_norm_backward(grad, x, shape, rstd, weight, mask):
    normed = x.float() * rstd.float()
    scaled = grad.float() * (1.0 if weight is None else weight.float())
    last = tuple(range(-len(shape), 0))
    of_x = rstd.float() * (scaled - normed * (scaled * normed).mean(last, keepdim=True))
    of_weight = None
    if weight is not None:
        of_weight = (grad.float() * normed).flatten(0, -len(shape) - 1).sum(0).to(weight.dtype)
    return of_x.to(x.dtype), of_weight


def batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    results = aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return *results, torch.empty(0, dtype=torch.uint8)


def batch_norm_backward(x, grad, weight, mean, var, save_mean, save_rstd, eps, reserve):
    return aten.native_batch_norm_backward(grad, x, weight, mean, var, save_mean, save_rstd, True, eps, [True] * 3)


def softmax(x, dim, half_to_float):
    return aten._softmax(x.float() if half_to_float else x, dim, False)


def log_softmax(x, dim, half_to_float):
    return aten._log_softmax(x.float() if half_to_float else x, dim, False)


def softmax_backward(grad, output, dim, dtype):
    return aten._softmax_backward_data(grad, output, dim, grad.dtype).to(dtype)


def log_softmax_backward(grad, output, dim, dtype):
    return aten._log_softmax_backward_data(grad, output, dim, grad.dtype).to(dtype)


OPERATORS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": flash,
    "_scaled_dot_product_efficient_attention": efficient,
    "_scaled_dot_product_cudnn_attention": cudnn,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
    "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
    "_fused_rms_norm_backward": rms_norm_backward,
    "cudnn_batch_norm": batch_norm,
    "cudnn_batch_norm_backward": batch_norm_backward,
    "_softmax": softmax,
    "_log_softmax": log_softmax,
    "_softmax_backward_data": softmax_backward,
    "_log_softmax_backward_data": log_softmax_backward,
}
