"""Which keyword arguments a model's `forward` knows."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

from vlm.adapters import unknown_name

REMOVED = ("cache_position",)
"""Arguments that older programs pass, and that transformers' models ignore: they follow from the cache."""

OF_GENERATE = ("tokenizer", "assistant_tokenizer")
"""Arguments of `generate` that it hands on to `forward`, with `stop_strings` and with an assistant."""

OF_LOSS = ("shift_labels",)
"""Labels that are already shifted, which the loss functions of transformers take."""

OF_ATTENTION = ("tree_layout",)
"""What our attention reads of a decoder's keyword arguments (`vlm.tree_attention`)."""


def known_arguments(language_model: PreTrainedModel) -> frozenset[str]:
    """The names that a decoder's `forward` gives to its arguments, and those that every model of transformers takes."""
    modules: Iterable[Any] = (language_model, language_model.base_model)
    named = (name for module in modules for name in inspect.signature(module.forward).parameters)
    return frozenset(named) | TransformersKwargs.__optional_keys__ | {*REMOVED, *OF_GENERATE, *OF_LOSS, *OF_ATTENTION}


def refuse_unknown(given: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError for an argument of `forward` that is not `known`: decoders drop such arguments silently."""
    for name in given:
        if name not in known:
            raise TypeError(str(unknown_name("argument of forward", name, known)))
