"""Gated cross-attention: text tokens look at visual tokens from inside the decoder.

Shapes: B rows, L text tokens, M visual tokens an image, S those of a row's images (padded), D hidden size.
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
        rows = [torch.cat([visual_tokens[i] for i in images or [0]]) for images in per_row]
        numbers = [[i for i in images for _ in range(len(visual_tokens[i]))] or [NOBODY] for images in per_row]
        owner = pad_sequence([torch.tensor(n) for n in numbers], batch_first=True, padding_value=NOBODY)
        states = pad_sequence(rows, batch_first=True)
        owner = F.pad(owner, (0, states.shape[1] - owner.shape[1]), value=NOBODY).to(image_index.device)
        return cls(states, image_index[:, :, None] == owner[:, None, :])

    def for_next_tokens(self, length: int) -> VisionStates:
        """For `length` tokens generated after these: they see what the last token saw."""
        latest = self.mask[:, -1:].expand(-1, length, -1)
        return VisionStates(self.states, latest, self.keys_values)

    def followed_by(self, later: VisionStates) -> VisionStates:
        """For the tokens of `later`, which come after these: those before their first image see what the last token
        here saw."""
        sees_later = later.mask.any(dim=-1, keepdim=True)
        mask = torch.cat([self.mask[:, -1:] & ~sees_later, later.mask], dim=2)
        return VisionStates(torch.cat([self.states, later.states], dim=1), mask)

    def select(self, rows: Tensor) -> VisionStates:
        """The rows with the numbers `rows [R]`, which may repeat; what is computed of their images comes along."""
        keys_values = {index: (keys[rows], values[rows]) for index, (keys, values) in self.keys_values.items()}
        return VisionStates(self.states[rows], self.mask[rows], keys_values)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> VisionStates:
        """On `device`, for models spread over several: accelerate moves a layer's arguments by this method."""
        if self.states.device == torch.device(device):
            return self
        states, mask = (t.to(device, non_blocking=non_blocking) for t in (self.states, self.mask))
        return replace(self, states=states, mask=mask)


class GatedCrossAttention(nn.Module):
    """`hidden [B, L, D]` plus tanh-gated attention to the visual tokens and a tanh-gated feed-forward."""

    def __init__(self, hidden_size: int, num_heads: int, index: int, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads, self.index = num_heads, index
        self.norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.states_norm = nn.RMSNorm(hidden_size, eps=norm_eps)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = nn.Sequential(
            nn.RMSNorm(hidden_size, eps=norm_eps),
            nn.Linear(hidden_size, 4 * hidden_size, bias=False),
            nn.GELU(),
            nn.Linear(4 * hidden_size, hidden_size, bias=False),
        )
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _keys_values(self, vision: VisionStates) -> tuple[Tensor, Tensor]:
        if self.index in vision.keys_values:
            return vision.keys_values[self.index]
        states = self.states_norm(vision.states)
        keys_values = self._heads(self.k_proj(states)), self._heads(self.v_proj(states))
        # Not while training: checkpointing may run this without gradients first, to run it again with them.
        if not (self.training or torch.is_grad_enabled()):
            vision.keys_values[self.index] = keys_values
        return keys_values

    def forward(self, hidden: Tensor, vision: VisionStates) -> Tensor:
        vision.read_by.add(self.index)
        keys, values = self._keys_values(vision)
        # A softmax over nothing is NaN: tokens before the first image attend to anything and the result is dropped.
        sees_any = vision.mask.any(dim=-1, keepdim=True)
        mask = (vision.mask | ~sees_any).unsqueeze(1)
        query = self._heads(self.q_proj(self.norm(hidden)))
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        attended = self.o_proj(attended.transpose(1, 2).flatten(2))
        hidden = hidden + self.attention_gate.tanh() * attended * sees_any
        return hidden + self.feed_forward_gate.tanh() * self.feed_forward(hidden) * sees_any
