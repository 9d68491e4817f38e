"""What the tokens of a cache see of their images: kept in the cache itself, as Mllama keeps an image's keys and values.

A further layer of the cache holds it, so that it follows whatever is done to the cache: rows that are reordered, chosen
or repeated, tokens that are dropped, a deep copy.

Shapes: B rows, L tokens, S visual tokens of a row's images, all as in `vlm.adapters.VisionStates`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from vlm.adapters import VisionStates


class VisionLayer(DummyLayer):
    """A layer of a cache with the images that its tokens see.

    Args:
        counter: the layer of the cache that counts its tokens; None for recurrent decoders, whose caches cannot drop
            tokens.
    """

    def __init__(self, counter: CacheLayerMixin | None) -> None:
        super().__init__()
        self.counter = counter
        self.vision: VisionStates | None = None
        """What the last token sees, its mask `[B, 1, S]`; None if no token sees an image."""
        self.changes: list[tuple[int, Tensor]] = []
        """The tokens, by number, that see something else than the token before, and the mask `[B, S]` of each."""
        self.group: Tensor | None = None
        """`[B]`: equal for neighbouring rows that see the same, as the beams of a prompt do."""

    def record(self, vision: VisionStates, first: int) -> None:
        """Keep what tokens see, the first of which is number `first` of the cache."""
        masks = vision.mask
        changed = (masks[:, 1:] != masks[:, :-1]).any(dim=2).any(dim=0).nonzero().flatten() + 1
        width = masks.shape[2]
        self.changes = [(place, F.pad(mask, (0, width - mask.shape[1]))) for place, mask in self.changes]
        self.changes += [(first + place, masks[:, place]) for place in [0, *changed.tolist()]]
        self.vision = VisionStates(vision.states, masks[:, -1:], vision.keys_values)
        self.group = _groups(vision.states, *(mask for _, mask in self.changes))

    def crop(self, tokens_to_remove: int) -> None:
        """After the other layers: forget what only the tokens saw that they have dropped."""
        if self.counter is None or self.vision is None:
            return
        length = int(self.counter.get_seq_length())
        self.changes = [(place, mask) for place, mask in self.changes if place < length]
        seen = torch.stack([mask for _, mask in self.changes]).any(dim=0).any(dim=0) if self.changes else None
        if seen is None or not seen.any():
            self.reset()
            return
        width = int(seen.nonzero().max()) + 1
        self.changes = [(place, mask[:, :width]) for place, mask in self.changes]
        states, kept = self.vision.states[:, :width], self.vision.keys_values
        keys_values = {block: (keys[:, :, :width], values[:, :, :width]) for block, (keys, values) in kept.items()}
        self.vision = VisionStates(states, self.changes[-1][1][:, None], keys_values)

    def reset(self) -> None:
        self.vision, self.changes, self.group = None, [], None

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.vision is not None:
            self.vision = self.vision.select(indices)
            self.changes = [(place, mask[indices.to(mask.device)]) for place, mask in self.changes]
            self.group = None if self.group is None else self.group[indices.to(self.group.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Copy nothing if each row gets one that sees the same: beams are reordered in each step, within a prompt."""
        if self.group is not None and not torch.equal(self.group[beam_idx.to(self.group.device)], self.group):
            self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.vision is not None:
            rows = torch.arange(len(self.vision.states), device=self.vision.states.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


def _groups(*rows: Tensor) -> Tensor:
    """`[B]`, a number that goes up where one of the tensors `[B, ...]` differs from the row before."""
    same = [(each[1:] == each[:-1]).flatten(1).all(dim=1).to(rows[0].device) for each in rows]
    return F.pad((~torch.stack(same).all(dim=0)).long(), (1, 0)).cumsum(dim=0)


def _layer(cache: Any) -> VisionLayer | None:
    return next((layer for layer in getattr(cache, "layers", ()) if isinstance(layer, VisionLayer)), None)


def kept_vision(cache: Cache | None) -> VisionStates | None:
    """What the last token in `cache` sees; None if it sees no image."""
    layer = _layer(cache)
    return None if layer is None else layer.vision


def keep_vision(cache: Cache | None, vision: VisionStates) -> None:
    """Keep in `cache` what its newest tokens see, once the decoder has read them."""
    if cache is None:
        return
    layer = _layer(cache)
    if layer is None:
        counter = next((each for each in cache.layers if isinstance(each, CacheLayerMixin)), None)
        layer = VisionLayer(counter)
        cache.layers.append(layer)
    if layer.vision is not None and layer.vision.keys_values is vision.keys_values:
        return  # the new tokens see what the last one saw
    length = 0 if layer.counter is None else int(layer.counter.get_seq_length())
    layer.record(vision, length - vision.mask.shape[1])
