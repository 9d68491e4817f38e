"""The Q-Former: learned queries that attend to each other, in some layers to the image, and in some models to a text.

Shapes: B images, N features of an image, M queries, T tokens of a text, D_v encoder width, D hidden size of the
Q-Former, D_t language model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.adapters.projector import Grid, Projector

NORM_EPS = 1e-12  # BERT's, which BLIP-2 starts from


class QFormerAttention(nn.Module):
    """Queries `[B, M, D]` attend to states `[B, N, D_s]`, all or those that a boolean mask `[B, 1, 1, N]` shows, with a
    layer for each projection, as BERT and checkpoints of BLIP-2 have them."""

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

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        projected = self.q_proj(queries), self.k_proj(states), self.v_proj(states)
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in projected)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class QFormerLayer(nn.Module):
    """A layer of BERT, with norms after the residuals, whose queries `[B, M, D]` may attend to `features [B, N, D_v]`
    between self-attention and feed-forward.

    A text `[B, T, D]` takes part in self-attention, where `mask [B, 1, 1, M + T]` says what of both is seen. It goes on
    through a feed-forward of its own, if `makes_text`, or ends here.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        vision_hidden_size: int | None,
        makes_text: bool = False,
    ) -> None:
        super().__init__()
        self.attention = QFormerAttention(hidden_size, num_attention_heads, hidden_size)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        if vision_hidden_size is not None:
            self.crossattention = QFormerAttention(hidden_size, num_attention_heads, vision_hidden_size)
            self.crossattention_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.attends_to_features = vision_hidden_size is not None
        self.feed_forward = feed_forward(hidden_size, intermediate_size)
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.makes_text = makes_text
        if makes_text:
            self.text_feed_forward = feed_forward(hidden_size, intermediate_size)
            self.text_feed_forward_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)

    def forward(
        self, queries: Tensor, features: Tensor, text: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries and text after this layer."""
        states = queries if text is None else torch.cat([queries, text], dim=1)
        seen_from = states if self.makes_text else queries
        attended = self.attention_norm(seen_from + self.attention(seen_from, states, mask))
        queries, text = attended[:, : queries.shape[1]], attended[:, queries.shape[1] :]
        if self.attends_to_features:
            queries = self.crossattention_norm(queries + self.crossattention(queries, features))
        queries = self.feed_forward_norm(queries + self.feed_forward(queries))
        if not self.makes_text:
            return queries, None
        return queries, self.text_feed_forward_norm(text + self.text_feed_forward(text))


def feed_forward(hidden_size: int, intermediate_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(hidden_size, intermediate_size), nn.GELU(), nn.Linear(intermediate_size, hidden_size)
    )


class QFormerProjector(Projector):
    """Q-Former: `num_image_tokens` learned queries, which attend to the image in every `cross_attention_frequency`-th
    layer (BLIP-2, arXiv 2301.12597, where there are 12 layers, BERT's weights at the start, and dropout).

    With `use_qformer_text_input` they read a text besides, the question about the image (InstructBLIP, arXiv
    2305.06500), in words of its own: `vocab_size` of them, at `max_position_embeddings` places.

    The options are named as in transformers' `Blip2QFormerConfig`.
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
        use_qformer_text_input: bool = False,
        vocab_size: int = 30522,
        max_position_embeddings: int = 512,
    ) -> None:
        super().__init__(vision_hidden_size)
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"qformer: num_attention_heads {num_attention_heads} must divide hidden_size {hidden_size}"
            )
        self.query_tokens = nn.Parameter(torch.empty(num_image_tokens, hidden_size))
        self.reset_own()
        self.reads_text = use_qformer_text_input
        if use_qformer_text_input:
            self.word_embeddings = nn.Embedding(vocab_size, hidden_size)
            self.position_embeddings = nn.Embedding(max_position_embeddings, hidden_size)
            for embedding in (self.word_embeddings, self.position_embeddings):
                nn.init.normal_(embedding.weight, std=0.02)
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.layers = nn.ModuleList(
            QFormerLayer(
                hidden_size,
                num_attention_heads,
                4 * hidden_size,
                None if index % cross_attention_frequency else vision_hidden_size,
                # Nobody reads the text behind the last layer.
                makes_text=use_qformer_text_input and index < num_hidden_layers - 1,
            )
            for index in range(num_hidden_layers)
        )
        self.language_projection = nn.Linear(hidden_size, text_hidden_size)

    def reset_own(self) -> None:
        nn.init.normal_(self.query_tokens, std=0.02)

    def num_tokens(self, num_prefix: int, grid: Grid) -> int:
        return len(self.query_tokens)

    def token_grid(self, grid: Grid) -> None:
        return None

    def forward(
        self,
        features: Tensor,
        grid: Grid,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As in every projector. `qformer_input_ids [B, T]` is the text that the queries read, a text of no words if it
        is not given, and `qformer_attention_mask [B, T]` is 0 where it is padding."""
        return self.project(self.standardize(features, grid), grid, qformer_input_ids, qformer_attention_mask)

    def project(
        self,
        features: Tensor,
        grid: Grid,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> Tensor:
        queries = self.norm(self.query_tokens).expand(len(features), -1, -1)
        text, mask = None, None
        if self.reads_text:
            ids = features.new_zeros(len(features), 0).long() if qformer_input_ids is None else qformer_input_ids
            if ids.shape[1] > self.position_embeddings.num_embeddings:
                raise ValueError(
                    f"a text of {ids.shape[1]} tokens, and the Q-Former has max_position_embeddings "
                    f"{self.position_embeddings.num_embeddings}: let the processor prepare it"
                )
            positions = torch.arange(ids.shape[1], device=ids.device)
            text = self.norm(self.word_embeddings(ids) + self.position_embeddings(positions))
            seen = torch.ones_like(ids) if qformer_attention_mask is None else qformer_attention_mask
            mask = F.pad(seen.bool(), (queries.shape[1], 0), value=True)[:, None, None]
        for layer in self.layers:
            queries, text = layer(queries, features, text, mask)
        return self.language_projection(queries)
