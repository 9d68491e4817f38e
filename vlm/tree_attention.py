"""Attention over rows of message trees that leaves out what the mask would throw away.

In a row of trees (see `vlm.data.trees`) a token attends to its trunk and to its own branch, a small part of the row.
SDPA with a mask computes the whole square. Here each trunk attends to itself, and each branch to its trunk and itself:

    trunks    [T, Lt]  causal
    branches  [N, Lb]  over [N, Lt + Lb]

A decoder whose attention is SDPA takes this in its place through transformers' registry of attention functions, and
`tree_layout`, which says where trunks and branches are, comes to it as a keyword argument of `forward`.

Letters: B rows of L tokens, T trunks, N branches, S = T * Lt + N * Lb places for tokens in both, H heads, K heads of
keys and values, D width of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm.attention import changes_scores, own_attention

NAME = "vlm_tree"
PADDING = -1
TRUNK = 0
"""The branch id of a trunk's tokens, see `vlm.data.trees`."""


def tree_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tree_layout: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`query [B, H, L, D]`, `key` and `value [B, K, L, D]` to `[B, L, H, D]`, as SDPA does with the mask of the trees.

    What has no `tree_layout`, or changes the scores by more than a factor, is left to SDPA.
    """
    if tree_layout is None or changes_scores(kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    batch, heads, length, width = query.shape
    device = query.device.type
    scaling = width**-0.5 if scaling is None else scaling
    attention = _products if device == "cpu" and not dropout else _sdpa
    token, place = tree_layout["token"], tree_layout["place"]
    shapes = _shapes(tree_layout)

    def segments(states: Tensor) -> list[Tensor]:
        """`[B, K, L, D]` to `[T, K, Lt, D]` and `[N, K, Lb, D]`."""
        if torch.is_autocast_enabled(device):  # now, not in the products: so there is less to rearrange
            states = states.to(torch.get_autocast_dtype(device))
        flat = _Rearrange.apply(states.transpose(1, 2).flatten(0, 1), token, place)
        parts = flat.split([rows * tokens for rows, tokens in shapes])
        return [part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)]

    (trunk_query, query), (trunk_key, key), (trunk_value, value) = map(segments, (query, key, value))
    found = [attention(trunk_query, trunk_key, trunk_value, tree_layout["trunk_mask"], dropout, scaling)]
    if len(query):
        trunk_of_branch = tree_layout["trunk_of_branch"]
        key = torch.cat([_Repeat.apply(trunk_key, trunk_of_branch), key], dim=2)
        value = torch.cat([_Repeat.apply(trunk_value, trunk_of_branch), value], dim=2)
        found.append(attention(query, key, value, tree_layout["branch_mask"], dropout, scaling))
    output = torch.cat([states.transpose(1, 2).flatten(0, 1) for states in found])
    return _Rearrange.apply(output, place, token).view(batch, length, heads, width), None


def _shapes(tree_layout: Mapping[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    """`(T, Lt)` and `(N, Lb)`, from shapes alone: a number in device memory would have to be waited for."""
    branches, tokens_per_branch = tree_layout["branch_mask"].shape[:2]
    tokens_per_trunk = tree_layout["trunk_mask"].shape[1]
    trunks = (len(tree_layout["token"]) - branches * tokens_per_branch) // tokens_per_trunk
    return (trunks, tokens_per_trunk), (branches, tokens_per_branch)


class _Rearrange(torch.autograd.Function):
    """`states[index]`, where no two of `index` are equal and `inverse` undoes it. -1 in either: nothing belongs there.

    The gradient of an index is a sum into places, slow on a CPU (7 % of a step), since they might be equal.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return states.index_select(0, index.clamp(min=0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (inverse,) = ctx.saved_tensors
        found = gradient.index_select(0, inverse.clamp(min=0))
        found.masked_fill_((inverse < 0).view(-1, *[1] * (found.ndim - 1)), 0)
        return found, None, None


class _Repeat(torch.autograd.Function):
    """`states[index]`. The gradient is summed slice by slice, which torch's own does element by element on a CPU, and
    always in the same order."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(states)
        return states.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return sum_by_index(gradient, index, ctx.rows), None


def sum_by_index(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """Return `[rows, ...]`, the sums of those `values [N, ...]` that have the same `index [N]`.

    The sums are deterministic. On a GPU `index_add_` adds in any order; `index_put_` sorts the index first.
    """
    sums = values.new_zeros(rows, *values.shape[1:])
    if values.device.type == "cpu":
        return sums.index_add_(0, index, values)
    return sums.index_put_((index,), values, accumulate=True)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float) -> Tensor:
    """`query [N, H, Q, D]` over `key`, `value [N, K, M, D]` with the boolean `mask [N or 1, Q, M]`."""
    return F.scaled_dot_product_attention(query, key, value, mask[:, None], dropout, scale=scaling, enable_gqa=True)


def _products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float) -> Tensor:
    """As [`_sdpa`] without dropout, by matrix products. On a CPU the backward pass of SDPA gains nothing from short
    segments: it took as long for the branches of four rows as for the four rows whole."""
    grouped = (query * scaling).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [N, K, H / K * Q, D]
    return _Products.apply(grouped, key, value, mask).view(query.shape)


class _Products(torch.autograd.Function):
    """Softmax of `query [N, K, R, D]` times `key [N, K, M, D]`, masked, times `value`, with a backward pass that does
    not go through the mask again, where the probabilities are zero."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2)
        rows = scores.view(*scores.shape[:2], -1, *mask.shape[1:])  # the heads that share a key are by themselves
        rows.masked_fill_(~mask[:, None, None], torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        return weights @ value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, weights = ctx.saved_tensors
        of_weights = gradient @ value.transpose(-1, -2)
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        transposed = of_scores.transpose(-1, -2)
        return of_scores @ key, transposed @ query, weights.transpose(-1, -2) @ gradient, None


AttentionInterface.register(NAME, tree_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for rows that bring no mask of their own


def tree_layout(rows: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """Where trunks and branches are in rows of trees (`vlm.data.trees.Tree`). Branches that share nothing stand among
    the trunks.

    `token [S]` is the number, in the flattened `[B * L]`, of the token at each place of trunks and branches, and
    `place [B * L]` the place of each token; -1 is padding. `trunk_mask [1, Lt, Lt]` is the same for all trunks,
    `branch_mask` is `[N, Lb, Lt + Lb]`, and `trunk_of_branch [N]`. No tensor overlaps itself: it could not be pinned.
    """
    length = max(sum(map(len, row)) for row in rows)
    trunks: list[Tensor] = []
    branches: list[Tensor] = []
    trunk_of_branch: list[int] = []
    for number, row in enumerate(rows):
        start = number * length
        for tree in row:
            _, sizes = torch.tensor(tree.branch_ids).unique_consecutive(return_counts=True)
            first, *rest = torch.arange(start, start + len(tree)).split(sizes.tolist())
            trunks.append(first)
            if tree.branch_ids[0] == TRUNK:
                branches += rest
                trunk_of_branch += [len(trunks) - 1] * len(rest)
            else:
                trunks += rest
            start += len(tree)
    trunk_tokens, branch_tokens = _padded(trunks), _padded(branches)
    token = torch.cat([trunk_tokens.flatten(), branch_tokens.flatten()])
    place = torch.full((len(rows) * length,), PADDING)
    real = token != PADDING
    place[token[real]] = real.nonzero()[:, 0]
    trunk_mask, own = (
        torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() for x in (trunk_tokens, branch_tokens)
    )
    of_branch = torch.tensor(trunk_of_branch, dtype=torch.long)
    of_trunk = (trunk_tokens[of_branch] != PADDING)[:, None].expand(-1, len(own), -1)
    return {
        "token": token,
        "place": place,
        "trunk_mask": trunk_mask[None],
        "branch_mask": torch.cat([of_trunk, own.expand(len(branches), -1, -1)], dim=2),
        "trunk_of_branch": of_branch,
    }


def _padded(segments: list[Tensor]) -> Tensor:
    if not segments:
        return torch.zeros(0, 0, dtype=torch.long)
    return pad_sequence(segments, batch_first=True, padding_value=PADDING)


def tree_attention(model: Any) -> AbstractContextManager[None]:
    """Within it the decoder of `model` heeds `tree_layout`, if it [supports][`supports_own_attention`] that."""
    return own_attention(model, NAME)
