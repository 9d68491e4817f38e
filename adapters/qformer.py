"""The Q-Former: learned queries that attend to each other and, in some layers, to the image.

Shapes: B images, N features of an image, M queries, D_v encoder width, D hidden size of the Q-Former, D_t language
model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.adapters.projector import Grid, Projector

NORM_EPS = 1e-12  # BERT's, which BLIP-2 starts from


class QFormerAttention(nn.Module):
    """Queries `[B, M, D]` attend to states `[B, N, D_s]`, with a layer for each projection, as BERT and checkpoints of
    BLIP-2 have them."""

    def __init__(self, hidden_size: int, num_attention_heads: int, states_size: int) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_attention_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(states_size, hidden_size)
        self.v_proj = nn.Linear(states_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):  # as in nn.MultiheadAttention
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, queries: Tensor, states: Tensor) -> Tensor:
        projected = self.q_proj(queries), self.k_proj(states), self.v_proj(states)
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in projected)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QFormerLayer(nn.Module):
    """A layer of BERT, with norms after the residuals, whose queries `[B, M, D]` may attend to `features [B, N, D_v]`
    between self-attention and feed-forward."""

    def __init__(
        self, hidden_size: int, num_attention_heads: int, intermediate_size: int, vision_hidden_size: int | None
    ) -> None:
        super().__init__()
        self.attention = QFormerAttention(hidden_size, num_attention_heads, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        if vision_hidden_size is not None:
            self.crossattention = QFormerAttention(hidden_size, num_attention_heads, vision_hidden_size)
            self.crossattention_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.attends_to_features = vision_hidden_size is not None
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_size, intermediate_size), nn.GELU(), nn.Linear(intermediate_size, hidden_size)
        )
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        queries = self.attention_norm(queries + self.attention(queries, queries))
        if self.attends_to_features:
            queries = self.crossattention_norm(queries + self.crossattention(queries, features))
        return self.feed_forward_norm(queries + self.feed_forward(queries))


class QFormerProjector(Projector):
    """Q-Former: `num_image_tokens` learned queries, which attend to the image in every `cross_attention_frequency`-th
    layer (BLIP-2, arXiv 2301.12597, where there are 12 layers, BERT's weights at the start, and dropout).

    The options are named as in transformers' `Blip2QFormerConfig`. The queries do not read the question, as they do in
    InstructBLIP: an image's visual tokens would differ between questions, and could not be shared by them.
    """

    output = "language_projection"

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        num_image_tokens: int = 32,
        hidden_size: int = 768,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 12,
        cross_attention_frequency: int = 2,
    ) -> None:
        super().__init__(vision_hidden_size)
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"qformer: num_attention_heads {num_attention_heads} must divide hidden_size {hidden_size}"
            )
        self.query_tokens = nn.Parameter(torch.randn(num_image_tokens, hidden_size) * 0.02)
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.layers = nn.ModuleList(
            QFormerLayer(
                hidden_size,
                num_attention_heads,
                4 * hidden_size,
                None if index % cross_attention_frequency else vision_hidden_size,
            )
            for index in range(num_hidden_layers)
        )
        self.language_projection = nn.Linear(hidden_size, text_hidden_size)

    def num_tokens(self, num_prefix: int, grid: Grid) -> int:
        return len(self.query_tokens)

    def token_grid(self, grid: Grid) -> None:
        return None

    def project(self, features: Tensor, grid: Grid) -> Tensor:
        queries = self.norm(self.query_tokens).expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        return self.language_projection(queries)
