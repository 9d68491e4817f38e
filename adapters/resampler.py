"""The perceiver resampler: a fixed number of learned latents read an image of any size.

Shapes: B images, N features of an image, M latents, D_v encoder width, D_t language model width.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.adapters.cross_attention import SwiGLU
from vlm.adapters.projector import Grid, Projector

Variant = Literal["flamingo", "idefics", "idefics2"]


class ResamplerAttention(nn.Module):
    """Latents `[B, M, D_t]` attend to `memory [B, N + M, D_t]`, without biases."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int, qk_norm: bool
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else nn.Identity()

    def forward(self, latents: Tensor, memory: Tensor) -> Tensor:
        query, keys, values = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj(latents), self.k_proj(memory), self.v_proj(memory))
        )
        query, keys = self.q_norm(query), self.k_norm(keys)
        attended = F.scaled_dot_product_attention(query, keys, values, enable_gqa=query.shape[1] != keys.shape[1])
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class ResamplerLayer(nn.Module):
    """Latents `[B, M, D_t]` attend to the features `[B, N, D_t]` and to themselves, then a feed-forward (Flamingo,
    arXiv 2204.14198, figure 5)."""

    def __init__(self, hidden_size: int, attention: ResamplerAttention, variant: Variant, rms_norm_eps: float) -> None:
        super().__init__()
        self.norm_latents = _norm(variant, hidden_size, rms_norm_eps)
        self.norm_features = _norm(variant, hidden_size, rms_norm_eps)
        self.attention = attention
        if variant == "idefics2":
            layers: list[nn.Module] = [SwiGLU(hidden_size, 4 * hidden_size)]
        else:
            layers = [
                nn.Linear(hidden_size, 4 * hidden_size, bias=False),
                nn.GELU() if variant == "flamingo" else nn.ReLU(),
                nn.Linear(4 * hidden_size, hidden_size, bias=False),
            ]
        self.feed_forward = nn.Sequential(_norm(variant, hidden_size, rms_norm_eps), *layers)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        query = self.norm_latents(latents)
        latents = latents + self.attention(query, torch.cat([self.norm_features(features), query], dim=1))
        return latents + self.feed_forward(latents)


class ResamplerProjector(Projector):
    """Perceiver resampler: `num_image_tokens` learned latents, refined over `depth` layers.

    The number of visual tokens is the same for any grid, so images may differ in size between batches.

    Args:
        num_heads: heads of width `head_dim`; without `head_dim` at most so many, for they then share the hidden size.
        num_key_value_heads: None is one for each head.
        variant: `flamingo` as in OpenFlamingo (arXiv 2308.01390); `idefics` (arXiv 2306.16527) with norms on queries
            and keys, ReLU, and no layer in front where features are as wide as the tokens; `idefics2` (arXiv
            2405.02246) with RMS norms and gated feed-forwards, one of them in front.
        intermediate_size: of the one in front, with `idefics2`; None is four times the hidden size.
        rms_norm_eps: with `idefics2`.

    Raises ValueError for another variant, and for a number of heads that `num_key_value_heads` does not divide.
    """

    output = "norm"

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        num_image_tokens: int = 64,
        depth: int = 2,
        num_heads: int = 8,
        head_dim: int | None = None,
        num_key_value_heads: int | None = None,
        variant: Variant = "flamingo",
        intermediate_size: int | None = None,
        rms_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(vision_hidden_size)
        if variant not in get_args(Variant):
            raise ValueError(f"resampler: variant is one of {', '.join(get_args(Variant))}, not {variant!r}")
        self.latents = nn.Parameter(torch.empty(num_image_tokens, text_hidden_size))
        self.reset_own()
        self.proj_in: nn.Module = nn.Linear(vision_hidden_size, text_hidden_size)
        if variant == "idefics2":
            self.proj_in = SwiGLU(vision_hidden_size, intermediate_size or 4 * text_hidden_size, text_hidden_size)
        elif variant == "idefics" and vision_hidden_size == text_hidden_size:
            self.proj_in = nn.Identity()
        heads = num_heads if head_dim else max(n for n in range(1, num_heads + 1) if text_hidden_size % n == 0)
        if heads % (num_key_value_heads or heads):
            raise ValueError(f"resampler: num_key_value_heads {num_key_value_heads} must divide the {heads} heads")
        shape = (text_hidden_size, heads, num_key_value_heads or heads, head_dim or text_hidden_size // heads)
        self.layers = nn.ModuleList(
            ResamplerLayer(text_hidden_size, ResamplerAttention(*shape, variant == "idefics"), variant, rms_norm_eps)
            for _ in range(depth)
        )
        self.norm = _norm(variant, text_hidden_size, rms_norm_eps)

    def reset_own(self) -> None:
        nn.init.normal_(self.latents, std=0.02)

    def num_tokens(self, num_prefix: int, grid: Grid) -> int:
        return len(self.latents)

    def token_grid(self, grid: Grid) -> None:
        return None

    def project(self, features: Tensor, grid: Grid) -> Tensor:
        features = self.proj_in(features)
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        return self.norm(latents)


def _norm(variant: Variant, hidden_size: int, rms_norm_eps: float) -> nn.Module:
    return nn.RMSNorm(hidden_size, eps=rms_norm_eps) if variant == "idefics2" else nn.LayerNorm(hidden_size)
