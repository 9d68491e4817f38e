"""Gated cross-attention: text tokens look at visual tokens from inside the decoder.

Shapes: B rows, L text tokens, M visual tokens an image, S those of a row's images (padded), D hidden size, H heads, K
heads of keys and values, d width of a head.
Follows Flamingo (arXiv 2204.14198, section 3.2): tanh gates that start at zero, so that an untouched language model's
output is unchanged, and each text token sees the latest image before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

NOBODY = -2
"""The image that padding belongs to; nobody looks at it."""


@dataclass
class VisionStates:
    """What the rows of a batch can look at.

    Attributes:
        states: `[B, S, D]` visual tokens of each row's images, one image after the other.
        mask: `[B, L, S]` boolean, which of them each text token sees.
        keys_values: keys and values of `states` by block, kept while generating so that an image's are computed once.
        read_by: the blocks that have looked, so that a decoder that drops keyword arguments is noticed.
    """

    states: Tensor
    mask: Tensor
    keys_values: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    read_by: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, visual_tokens: Sequence[Tensor], image_index: Tensor) -> VisionStates:
        """From `visual_tokens`, `[M, D]` of each image, all rows' in order, and `image_index [B, L]`, which of them
        (-1: none) each text token sees."""
        per_row = [row[row >= 0].unique().tolist() for row in image_index]
        rows = [torch.cat([visual_tokens[i] for i in images]) if images else visual_tokens[0][:1] for images in per_row]
        numbers = [[i for i in images for _ in range(len(visual_tokens[i]))] or [NOBODY] for images in per_row]
        owner = pad_sequence([torch.tensor(n) for n in numbers], batch_first=True, padding_value=NOBODY)
        owner = owner.to(image_index.device)
        return cls(pad_sequence(rows, batch_first=True), image_index[:, :, None] == owner[:, None, :])

    def for_next_tokens(self, length: int) -> VisionStates:
        """For `length` tokens generated after these: they see what the last token saw."""
        latest = self.mask[:, -1:].expand(-1, length, -1)
        return VisionStates(self.states, latest, self.keys_values)

    def followed_by(self, later: VisionStates) -> VisionStates:
        """For the tokens of `later`, which come after these: those before their first image see what the last token
        here saw."""
        earlier = self.to(later.states.device)
        sees_later = later.mask.any(dim=-1, keepdim=True)
        mask = torch.cat([earlier.mask[:, -1:] & ~sees_later, later.mask], dim=2)
        return VisionStates(torch.cat([earlier.states, later.states], dim=1), mask)

    def select(self, rows: Tensor) -> VisionStates:
        """The rows with the numbers `rows [R]`, which may repeat; what is computed of their images comes along."""

        def chosen(states: Tensor) -> Tensor:
            return states[rows.to(states.device)]

        keys_values = {index: (chosen(keys), chosen(values)) for index, (keys, values) in self.keys_values.items()}
        return VisionStates(chosen(self.states), chosen(self.mask), keys_values)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> VisionStates:
        """On `device`, for models spread over several: accelerate moves a layer's arguments by this method."""
        if {self.states.device, self.mask.device} == {torch.device(device)}:
            return self
        states, mask = (t.to(device, non_blocking=non_blocking) for t in (self.states, self.mask))
        return replace(self, states=states, mask=mask)


class GatedCrossAttention(nn.Module):
    """`hidden [B, L, D]` plus tanh-gated attention to the visual tokens and a tanh-gated feed-forward.

    A token that sees no image stays as it is, in every row and whatever the other tokens see; with
    `feeds_every_token` it has the feed-forward alone.
    """

    feeds_every_token = False
    states_norm: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    feed_forward: nn.Module

    def __init__(self, hidden_size: int, num_heads: int, num_key_value_heads: int, index: int, norm_eps: float) -> None:
        super().__init__()
        self.head_dim, self.groups, self.index = hidden_size // num_heads, num_heads // num_key_value_heads, index
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.states_norm = self.q_norm = self.k_norm = nn.Identity()
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def reset_own(self) -> None:
        nn.init.zeros_(self.attention_gate)
        nn.init.zeros_(self.feed_forward_gate)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _keys_values(self, vision: VisionStates) -> tuple[Tensor, Tensor]:
        """`[B, K, S, d]` each."""
        if self.index in vision.keys_values:
            return vision.keys_values[self.index]
        states = self.states_norm(vision.states)
        keys_values = self.k_norm(self._heads(self.k_proj(states))), self._heads(self.v_proj(states))
        # Not while training: checkpointing may run this without gradients first, to run it again with them.
        if not (self.training or torch.is_grad_enabled()):
            vision.keys_values[self.index] = keys_values
        return keys_values

    def forward(self, hidden: Tensor, vision: VisionStates | None, states: Tensor | None = None) -> Tensor:
        """`vision` is None where no token has an image to see. `states` are those of `vision`, as an argument of their
        own because reentrant gradient checkpointing only follows tensors."""
        if vision is not None:
            vision = vision if states is None else replace(vision, states=states)
            hidden, sees_any = self._attend(hidden, vision)
        elif not self.feeds_every_token:
            return hidden
        added = self.feed_forward_gate.tanh() * self.feed_forward(hidden)
        return hidden + (added if self.feeds_every_token else added * sees_any)

    def _attend(self, hidden: Tensor, vision: VisionStates) -> tuple[Tensor, Tensor]:
        """`hidden` and what was attended to, and `[B, L, 1]` which tokens see an image."""
        vision.read_by.add(self.index)
        keys, values = (states.repeat_interleave(self.groups, dim=1) for states in self._keys_values(vision))
        # A softmax over nothing is NaN: tokens before the first image attend to anything and the result is dropped.
        sees_any = vision.mask.any(dim=-1, keepdim=True)
        mask = (vision.mask | ~sees_any).unsqueeze(1)
        query = self.q_norm(self._heads(self.q_proj(self.norm(hidden))))
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        attended = self.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.attention_gate.tanh() * attended * sees_any, sees_any


class FlamingoCrossAttention(GatedCrossAttention):
    """Flamingo's: the visual tokens are normalised too, and the feed-forward is GELU between two linear layers."""

    def __init__(self, hidden_size: int, num_heads: int, index: int, norm_eps: float = 1e-6) -> None:
        super().__init__(hidden_size, num_heads, num_heads, index, norm_eps)
        self.states_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.feed_forward = nn.Sequential(
            nn.RMSNorm(hidden_size, eps=norm_eps),
            nn.Linear(hidden_size, 4 * hidden_size, bias=False),
            nn.GELU(),
            nn.Linear(4 * hidden_size, hidden_size, bias=False),
        )


class SwiGLU(nn.Module):
    """A feed-forward with a gate (arXiv 2002.05202), as in Llama; to another width with `output_size`."""

    def __init__(self, hidden_size: int, intermediate_size: int, output_size: int | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, output_size or hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class MllamaCrossAttention(GatedCrossAttention):
    """Llama 3.2 Vision's (`MllamaCrossAttentionDecoderLayer` of transformers): a decoder layer of Llama that attends to
    the image in place of the text, with norms on queries and keys and with heads in groups."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        intermediate_size: int,
        index: int,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_key_value_heads, index, norm_eps)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=norm_eps)
        self.feed_forward = nn.Sequential(nn.RMSNorm(hidden_size, eps=norm_eps), SwiGLU(hidden_size, intermediate_size))


class IdeficsCrossAttention(MllamaCrossAttention):
    """That of Idefics (arXiv 2306.16527; `IdeficsGatedCrossAttentionLayer` of transformers): as Llama 3.2 Vision's, but
    with a gate for each channel, visual tokens that may be of another width (`states_size`), and the feed-forward for
    every token."""

    feeds_every_token = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        index: int,
        norm_eps: float = 1e-6,
        states_size: int | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_heads, intermediate_size, index, norm_eps)
        self.k_proj = nn.Linear(states_size or hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(states_size or hidden_size, hidden_size, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(hidden_size))
        self.feed_forward_gate = nn.Parameter(torch.zeros(hidden_size))
