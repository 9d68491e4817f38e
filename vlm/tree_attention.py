"""Attention over rows of message trees that leaves out what the mask would throw away.

In a row of trees (see `vlm.data.trees`) a token attends to its trunk and to its own branch, a small part of the row.
SDPA with a mask computes the whole square. Here each trunk attends to itself, and each branch to its trunk and itself:

    trunks    [T, Lt]  causal
    branches  [S, Lb]  over [S, Lt + Lb]

A decoder whose attention is SDPA takes this in its place through transformers' registry of attention functions, and
`tree_layout`, which says where trunks and branches are, comes to it as a keyword argument of `forward`.

Letters: B rows of L tokens, T trunks, S branches, H heads, K heads of keys and values, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

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
    if tree_layout is None or any(kwargs.get(name) is not None for name in ("position_bias", "softcap")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    batch, heads, length, width = query.shape
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    scaling = width**-0.5 if scaling is None else scaling
    attention = _by_products if query.device.type == "cpu" else _sdpa

    def attend(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (x[i.clamp(min=0)].transpose(1, 2) for x, i in ((query, queries), (key, keys), (value, keys)))
        return attention(q, k, v, mask, dropout, scaling).transpose(1, 2).flatten(0, 1)

    trunks, branches = tree_layout["trunks"], tree_layout["branches"]
    found = [attend(trunks, trunks, tree_layout["trunk_mask"])]
    if len(branches):
        keys = torch.cat([tree_layout["trunk_of_branch"], branches], dim=1)
        found.append(attend(branches, keys, tree_layout["branch_mask"]))
    output = torch.cat(found)[tree_layout["place"]]
    return output.view(batch, length, heads, width), None


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float) -> Tensor:
    """`query [N, H, Q, D]` over `key`, `value [N, K, M, D]` with the boolean `mask [N, Q, M]`."""
    return F.scaled_dot_product_attention(query, key, value, mask[:, None], dropout, scale=scaling, enable_gqa=True)


def _by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float) -> Tensor:
    """As [`_sdpa`], whose backward pass on a CPU gains nothing from short segments: it took as long for the branches of
    four rows as for the four rows whole."""
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [N, K, H / K * Q, D]
    scores = (grouped @ key.transpose(-1, -2)).view(*query.shape[:3], -1) * scaling
    scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), dropout)
    return (weights.view(*grouped.shape[:3], -1) @ value).view(query.shape)


AttentionInterface.register(NAME, tree_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for rows that bring no mask of their own


def tree_layout(rows: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """Where trunks and branches are in rows of trees (`vlm.data.trees.Tree`), as numbers of tokens in the flattened
    `[B * L]`; -1 fills up. Branches that share nothing stand among the trunks.

    `trunks [T, Lt]` and `trunk_mask [T, Lt, Lt]`; `branches [S, Lb]`, `trunk_of_branch [S, Lt']` and
    `branch_mask [S, Lb, Lt' + Lb]`; `place [B * L]`, where each token's result is among those of trunks and branches.
    """
    length = max(sum(map(len, row)) for row in rows)
    trunks: list[Tensor] = []
    branches: list[Tensor] = []
    trunk_of: list[Tensor] = []
    for number, row in enumerate(rows):
        start = number * length
        for tree in row:
            _, sizes = torch.tensor(tree.branch_ids).unique_consecutive(return_counts=True)
            first, *rest = torch.arange(start, start + len(tree)).split(sizes.tolist())
            trunks.append(first)
            if tree.branch_ids[0] == TRUNK:
                branches += rest
                trunk_of += [first] * len(rest)
            else:
                trunks += rest
            start += len(tree)
    layout = {"trunks": _padded(trunks), "branches": _padded(branches), "trunk_of_branch": _padded(trunk_of)}
    causal = torch.ones(1, layout["trunks"].shape[1], layout["trunks"].shape[1], dtype=torch.bool).tril()
    layout["trunk_mask"] = causal.expand(len(trunks), -1, -1)
    own = torch.ones(layout["branches"].shape[1], layout["branches"].shape[1], dtype=torch.bool).tril()
    of_trunk = layout["trunk_of_branch"] != PADDING
    layout["branch_mask"] = torch.cat(
        [of_trunk[:, None].expand(-1, len(own), -1), own.expand(len(branches), -1, -1)], dim=2
    )
    positions = torch.cat([layout["trunks"].flatten(), layout["branches"].flatten()])
    real = positions != PADDING
    place = torch.zeros(len(rows) * length, dtype=torch.long)  # the result of a padding token is any: nobody reads it
    place[positions[real]] = real.nonzero()[:, 0]
    layout["place"] = place
    return layout


def _padded(segments: list[Tensor]) -> Tensor:
    if not segments:
        return torch.zeros(0, 0, dtype=torch.long)
    return pad_sequence(segments, batch_first=True, padding_value=PADDING)


def supports_tree_attention(model: Any) -> bool:
    """Whether `model`'s decoder computes attention by SDPA, and through transformers' registry."""
    decoder = model.get_decoder()
    return bool(decoder._supports_attention_backend) and model.config.get_text_config()._attn_implementation == "sdpa"


@contextmanager
def tree_attention(model: Any) -> Iterator[None]:
    """Within it the decoder of `model` heeds `tree_layout`, if it [supports][`supports_tree_attention`] that."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if supports_tree_attention(model):
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
