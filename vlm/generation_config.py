"""What a model's generation config says, and how far answers in batches and conversations heed it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, GenerationMixin

from vlm.errors import UserError

FILE = "generation_config.json"

WITHOUT_EFFECT = (
    "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "is_assistant", "prefill_chunk_size",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
)  # fmt: skip
"""Keys that change how fast an answer comes, or what else comes with it, but not the answer: they are not heeded."""

ONE_ANSWER = "each request has one answer"
OTHER_CODE = "transformers has moved this way of decoding out of the library"
REFUSED: dict[str, tuple[Any, str]] = {
    "num_return_sequences": (1, ONE_ANSWER),
    "guidance_scale": (1, "it needs the model a second time, without the prompt and its images"),
    "token_healing": (False, "it changes the prompt"),
    "penalty_alpha": (0, OTHER_CODE),
    "dola_layers": (None, OTHER_CODE),
    "num_beam_groups": (1, OTHER_CODE),
    "constraints": (None, OTHER_CODE),
    "force_words_ids": (None, OTHER_CODE),
    "assistant_model": (None, "it drafts for one prompt at a time"),
    "streamer": (None, "it shows one answer at a time; use vlm.session.Session"),
}
"""Keys that cannot be heeded: the value without effect, besides None, and the reason."""

READ_THE_PROMPT: dict[str, Any] = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "sequence_bias": None,
    "bad_words_ids": None,
}
"""Keys that look at the whole row, padding too, so that a row must not have any: the value without effect."""


def has_plain_generate(model: Any) -> bool:
    return type(model).generate is GenerationMixin.generate


def writer(model: Any) -> Any:
    """The module whose `generate` writes: the model, or its decoder where `generate` hands over to that (BLIP-2)."""
    if has_plain_generate(model):
        return model
    return model.text_decoder if model.config.model_type == "blip" else model.language_model


def setting(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """The value of a key: that of the `options` of a call, else that of the model's generation config, or None."""
    given = options.get(name)
    return getattr(writer(model).generation_config, name, None) if given is None else given


def require_honoured(model: Any, options: Mapping[str, Any], *, streams: bool = False) -> None:
    """Raise UserError for a key that answers cannot heed, in `options` of a call or in the model's generation config.
    Answers that are shown as they are written (`streams`) have no beams."""
    refused = {**REFUSED}
    if streams:
        del refused["streamer"]
        refused["num_beams"] = (1, "an answer that is shown as it is written cannot come from a beam search")
    for name, (without_effect, reason) in refused.items():
        if (value := setting(model, options, name)) not in (None, without_effect):
            where = "option" if options.get(name) is not None else f"{FILE} of the model:"
            raise UserError(f"{where} {name}: {value!r} is not supported here, since {reason}; remove it")
    if setting(model, options, "cache_implementation") == "paged":
        raise UserError("cache_implementation: 'paged' is not supported here, since it takes texts alone; remove it")


def reads_the_prompt(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether an answer depends on the tokens of the prompt's row, padding too."""
    found = {name: setting(model, options, name) for name in READ_THE_PROMPT}
    return any(value not in (None, READ_THE_PROMPT[name]) for name, value in found.items())


@contextmanager
def answering(model: Any, options: Mapping[str, Any], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Within it the model's generation config has no keys `WITHOUT_EFFECT`; gives `options` with the tokenizer that
    `stop_strings` need. Raises UserError for a cache implementation whose package is missing."""
    owner = writer(model)
    before = owner.generation_config
    plain = copy.deepcopy(before)
    for name in WITHOUT_EFFECT:
        setattr(plain, name, None)
    options = {name: value for name, value in options.items() if name not in WITHOUT_EFFECT}
    if setting(model, options, "stop_strings"):
        options["tokenizer"] = tokenizer
    owner.generation_config = plain
    try:
        yield options
    except ImportError as error:
        if (name := setting(model, options, "cache_implementation")) is None:
            raise
        raise UserError(f"cache_implementation: {name!r} cannot be used: {error}") from error
    finally:
        owner.generation_config = before


def make_savable(model: Any) -> str | None:
    """Unset what transformers refuses to save in the generation config of `model`: keys without effect, such as a
    temperature without sampling (Vicuna). Give a sentence about it, or None if there is nothing to unset.

    Raises UserError for a generation config that cannot be saved for another reason.
    """
    config: GenerationConfig | None = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        return None
    unset = {}
    while reason := _why_not_savable(config):
        names = [name for name in re.findall(r"^- `(\w+)`:", reason, re.MULTILINE) if getattr(config, name) is not None]
        if not names:
            raise UserError(f"the generation config of the model ({FILE}) cannot be saved: {reason}")
        for name in names:
            unset[name] = getattr(config, name)
            setattr(config, name, None)
    if not unset:
        return None
    listed = ", ".join(f"{name} {value}" for name, value in unset.items())
    return f"generation config: removed what has no effect, and what transformers refuses to save: {listed}"


def _why_not_savable(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None
