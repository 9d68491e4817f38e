"""Attention of several rows to the keys and values of one beginning, which is kept once for all of them.

A cache as transformers has it repeats what rows begin with for each row, and copies it whole for every token that is
written. Here a layer of the cache holds the beginnings by themselves, and each row the rest:

    shared  [G, K, P, D]   one for each beginning
    own     [R, K, L, D]   one for each row

A softmax over both is exact. The queries of all rows with the same beginning meet it in one matrix product, as in
Hydragen (arXiv 2402.05099).

Letters: G beginnings of P tokens, R rows with L tokens of their own, at most N rows with the same beginning, Q queries
a row, H heads, K heads of keys and values, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm.attention import changes_scores, own_attention, supports_own_attention
from vlm.vision_cache import VisionLayer

NAME = "vlm_shared_prefix"
_cache: ContextVar[Any] = ContextVar("cache")


class SharedPrefixLayer(DynamicLayer):
    """A layer of a cache whose rows begin with one of some beginnings: `update` gives what each row has of its own.

    Args:
        layer: holds the beginnings, `[G, K, P, D]`.
        prefix_of_row: `[R]`, which of them each row has.
    """

    def __init__(self, layer: DynamicLayer, prefix_of_row: Tensor) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.shared_keys, self.shared_values = layer.keys, layer.values
        self.prefix_of_row = prefix_of_row = prefix_of_row.to(layer.keys.device)
        same = prefix_of_row[:, None] == prefix_of_row
        nth = same.tril(-1).sum(dim=1)
        self.rows_of_prefix = prefix_of_row.new_zeros(len(layer.keys), int(same.sum(dim=1).max()))
        """`[G, N]`, the rows of each beginning; for fewer than N of them, row 0 stands in."""
        self.rows_of_prefix[prefix_of_row, nth] = torch.arange(len(prefix_of_row), device=prefix_of_row.device)
        self.place_of_row = prefix_of_row * self.rows_of_prefix.shape[1] + nth
        """`[R]`, where a row is in the flattened `rows_of_prefix`."""

    def get_seq_length(self) -> int:
        return self.shared_keys.shape[-2] + super().get_seq_length()

    def by_prefix(self, states: Tensor) -> Tensor:
        """`[R, K, M, D]` of rows to `[G, K, N * M, D]` of beginnings."""
        return states[self.rows_of_prefix].transpose(1, 2).flatten(2, 3)

    def by_row(self, states: Tensor) -> Tensor:
        """The other way."""
        parts = states.unflatten(2, (self.rows_of_prefix.shape[1], -1)).transpose(1, 2)
        return parts.flatten(0, 1)[self.place_of_row]


def shared_prefix_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`query [R, H, Q, D]` over what the layer of the cache shares and `key`, `value [R, K, L, D]`, to `[R, Q, H, D]`.

    With a bias by position, or what SDPA refuses, it is left to SDPA, over all of it.
    """
    layer: SharedPrefixLayer = _cache.get().layers[module.layer_idx]
    if changes_scores(kwargs):
        key, value = (
            torch.cat([shared[layer.prefix_of_row], own], dim=2)
            for shared, own in ((layer.shared_keys, key), (layer.shared_values, value))
        )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    length, width = query.shape[2:]
    shared_length, own_length = layer.shared_keys.shape[2], key.shape[2]
    scaling = width**-0.5 if scaling is None else scaling
    grouped = (query * scaling).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [R, K, H / K * Q, D]
    to_shared = layer.by_row(layer.by_prefix(grouped) @ layer.shared_keys.transpose(-1, -2))
    to_own = grouped @ key.transpose(-1, -2)
    if attention_mask is None:  # nothing is padded
        own_mask = torch.ones(length, own_length, dtype=torch.bool, device=key.device).tril(own_length - length)
    else:
        own_mask = attention_mask[:, :, None, :, shared_length:]  # [R, 1, 1, Q, L]
    by_head = to_own.unflatten(2, (-1, length))
    to_own = by_head.masked_fill(~own_mask, torch.finfo(by_head.dtype).min).flatten(2, 3)
    weights = torch.cat([to_shared, to_own], dim=-1).softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    of_shared, of_own = weights.split([shared_length, own_length], dim=-1)
    output = layer.by_row(layer.by_prefix(of_shared) @ layer.shared_values) + of_own @ value
    return output.reshape(query.shape).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, shared_prefix_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def can_share_prefix(model: nn.Module, cache: Any) -> bool:
    """Whether the decoder of `model` computes attention by SDPA, through transformers' registry, over all tokens of
    `cache`."""
    plain = isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, VisionLayer) for layer in cache.layers
    )
    return plain and supports_own_attention(model)


def share_prefix(cache: DynamicCache, prefix_of_row: Tensor) -> None:
    """Make of a `cache` whose rows are beginnings one of rows that begin so, `prefix_of_row [R]`, in place."""
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer):
            cache.layers[number] = SharedPrefixLayer(layer, prefix_of_row)
        elif isinstance(layer, VisionLayer):
            layer.batch_select_indices(prefix_of_row)


@contextmanager
def shared_prefix(model: Any, cache: DynamicCache | None) -> Iterator[None]:
    """Within it the decoder of `model` attends to a `cache` of [`SharedPrefixLayer`]s; to any other as ever."""
    shared = cache is not None and isinstance(cache.layers[0], SharedPrefixLayer)
    token = _cache.set(cache)
    try:
        with own_attention(model, NAME) if shared else nullcontext():
            yield
    finally:
        _cache.reset(token)
