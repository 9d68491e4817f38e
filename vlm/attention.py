"""Attention of our own in a decoder of transformers, through its registry, in the place of SDPA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def supports_own_attention(model: Any) -> bool:
    """Whether `model`'s decoder computes attention by SDPA, and through transformers' registry."""
    decoder = model.get_decoder()
    return bool(decoder._supports_attention_backend) and model.config.get_text_config()._attn_implementation == "sdpa"


@contextmanager
def own_attention(model: Any, name: str) -> Iterator[None]:
    """Within it the decoder of `model` computes attention by what is registered as `name`, if it
    [supports][`supports_own_attention`] that."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if supports_own_attention(model):
        config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def changes_scores(options: Mapping[str, Any]) -> bool:
    """Whether the options of an attention function do more to the scores than multiply them."""
    return any(options.get(name) is not None for name in ("position_bias", "softcap"))
