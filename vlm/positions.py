"""How many tokens a language model reads at the most, and what is said of prompts that are longer."""

from __future__ import annotations

import logging
import re
from typing import Any
from weakref import WeakSet

from torch import nn

from vlm.errors import UserError

logger = logging.getLogger(__name__)

_warned: WeakSet[Any] = WeakSet()
"""Models of which it was said that a prompt goes beyond their positions."""


def learned_positions(model: Any) -> int | None:
    """Return how many tokens a decoder with learned positions (GPT-2, OPT) reads at the most; None for other decoders,
    whose positions do not end."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    modules = decoder.named_modules()
    if not any(isinstance(module, nn.Embedding) and re.search("wpe|position", name) for name, module in modules):
        return None
    return _positions(model)


def room(places: int | None, length: int, max_new_tokens: int) -> int:
    """Return how many tokens, up to `max_new_tokens`, an answer to a prompt of `length` tokens may have: a decoder
    fails after the last of its [learned positions][`learned_positions`], `places`.

    Raises UserError for a prompt that is too long.
    """
    if places is not None and length >= places:
        raise UserError(
            f"{over_positions(length, places)}; ask something shorter (vlm chat: /reset forgets what was said)"
        )
    return max_new_tokens if places is None else min(max_new_tokens, places - length)


def over_positions(length: int, places: int) -> str:
    """Return what is wrong with a prompt of `length` tokens."""
    return (
        f"the prompt has {length:,} tokens, with its images and what was said before, and the model has {places:,} "
        "positions"
    )


def warn_beyond(model: Any, length: int) -> None:
    """Log a warning, once for each model, if a prompt of `length` tokens leaves no room for an answer within its
    positions (`max_position_embeddings`). Those that are computed, such as rotary ones, do not end, but the model was
    not trained on so long a text."""
    places = _positions(model)
    if places is None or length < places or model in _warned:
        return
    _warned.add(model)
    logger.warning(
        "%s (max_position_embeddings). They do not end there, but it was not trained on so long a text, and its "
        "answers may be wrong: ask something shorter, or show fewer or smaller images",
        over_positions(length, places),
    )


def _positions(model: Any) -> int | None:
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
