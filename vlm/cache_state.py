"""What a cache has read, whether it counts its tokens or not."""

from __future__ import annotations

from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


def has_read(cache: Cache | None) -> bool:
    """Whether there are tokens in a cache."""
    if cache is None or not cache.layers:
        return False
    return cache.has_previous_state() if is_recurrent(cache) else cache.get_seq_length() > 0


def is_recurrent(cache: Cache) -> bool:
    """Whether a cache is of recurrent layers alone (Mamba), and does not count its tokens."""
    return not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def num_read(cache: Cache | None) -> int:
    """How many tokens are in a cache that counts them."""
    return 0 if cache is None or not cache.layers or is_recurrent(cache) else int(cache.get_seq_length())
