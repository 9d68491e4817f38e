"""The perceiver resampler: a fixed number of learned latents read an image of any size.

Shapes: B images, N features of an image, M latents, D_v encoder width, D_t language model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm.adapters.projector import Grid, Projector


class ResamplerLayer(nn.Module):
    """Latents `[B, M, D_t]` attend to the features `[B, N, D_t]` and to themselves, then a feed-forward (Flamingo,
    arXiv 2204.14198, figure 5)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm_latents = nn.LayerNorm(hidden_size)
        self.norm_features = nn.LayerNorm(hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(),
            nn.Linear(4 * hidden_size, hidden_size),
        )

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        query = self.norm_latents(latents)
        memory = torch.cat([self.norm_features(features), query], dim=1)
        latents = latents + self.attention(query, memory, memory, need_weights=False)[0]
        return latents + self.feed_forward(latents)


class ResamplerProjector(Projector):
    """Perceiver resampler: `num_image_tokens` learned latents, refined over `depth` layers (Flamingo, Idefics).

    The number of visual tokens is the same for any grid, so images may differ in size between batches.
    """

    output = "norm"

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        num_image_tokens: int = 64,
        depth: int = 2,
        num_heads: int = 8,
    ) -> None:
        super().__init__(vision_hidden_size)
        self.latents = nn.Parameter(torch.randn(num_image_tokens, text_hidden_size) * 0.02)
        self.proj_in = nn.Linear(vision_hidden_size, text_hidden_size)
        heads = max(n for n in range(1, num_heads + 1) if text_hidden_size % n == 0)
        self.layers = nn.ModuleList([ResamplerLayer(text_hidden_size, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(text_hidden_size)

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
