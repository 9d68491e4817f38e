"""Conversations to token ids and labels, by the processor's own chat template, or the prompt that its model knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from PIL import Image

from vlm.chat_templates import Refused, naming_template
from vlm.data.example import Branch, Message, count_image_parts
from vlm.data.prompts import IMAGE_MASKS, TOKEN_TYPES, encode_prompt, has_chat_template
from vlm.errors import UserError
from vlm.processing import QFORMER_INPUTS

IGNORE = -100
"""The label of a token that is not supervised, as everywhere in transformers."""


OWN_TOKEN = (
    "a message holds one of the model's own tokens, such as <image> or </s>, which this model's processor cannot take "
    "for text; take it out of the message"
)


def template_options(processor: Any, *conversations: Sequence[Message]) -> dict[str, Any]:
    """What a chat template is told, in training and after it: that of a model that can think aloud (Qwen3) then puts
    empty thoughts into the prompt, not into the answer.

    Where someone wrote a token of the model's into a message, it is to stay text. Only then: some processors cannot do
    that (Idefics3's, and those whose tokenizer puts a first token before a text, as LLaVA 1.5's).
    """
    options = {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}
    tokens = _added_tokens(processor.tokenizer)
    if any(token in text for text in map(_whole_text, conversations) for token in tokens):
        options["sanitize_control_tokens"] = True
    return options


def _whole_text(conversation: Sequence[Message]) -> str:
    """All that was written, joined, since a template joins parts: a token in two halves is one in the end."""
    contents = [message["content"] for message in conversation]
    parts = [part for content in contents for part in ([{"text": content}] if isinstance(content, str) else content)]
    return "".join(part.get("text", "") for part in parts)


@lru_cache(maxsize=4)
def _added_tokens(tokenizer: Any) -> list[str]:
    return [text for token in tokenizer.added_tokens_decoder.values() if (text := token.content.strip())]


@dataclass
class TokenizedBranch:
    """One conversation as the model sees it.

    Attributes:
        input_ids: token ids, image tokens expanded.
        labels: the same where an assistant's answer, with its end token, is supervised; else, and at first, -100.
        token_types: by name, those of `TOKEN_TYPES` and `IMAGE_MASKS` that the model is given, as long as `input_ids`.
        qformer_inputs: by name, those of `QFORMER_INPUTS` that the model is given, for each image.
    """

    input_ids: list[int]
    labels: list[int]
    token_types: dict[str, list[Any]] = field(default_factory=dict)
    qformer_inputs: dict[str, list[list[int]]] = field(default_factory=dict)


def with_images(messages: Sequence[Message], images: Sequence[Image.Image]) -> list[Message]:
    """The messages with each image part carrying its image, in order, as `apply_chat_template` wants them."""
    rest = iter(images)
    return [
        {
            **message,
            "content": [
                {**part, "image": next(rest)} if part["type"] == "image" else part for part in message["content"]
            ],
        }
        for message in messages
    ]


def encode_conversation(
    processor: Any,
    messages: Sequence[Message],
    images: Sequence[Image.Image] | None,
    image_sizes: Sequence[tuple[int, int]] = (),
    *,
    add_generation_prompt: bool = False,
) -> dict[str, Any]:
    """What the processor makes of one conversation, as lists and tensors of one row.

    `images=None` asks for the ids alone, which our own processor can give without looking at a pixel: with tiling from
    `image_sizes`, each `(height, width)`. Without a chat template see
    [`encode_prompt`][vlm.data.prompts.encode_prompt].
    """
    if not has_chat_template(processor):
        return encode_prompt(processor, messages, images or [])
    conversation = list(messages) if images is None else with_images(messages, images)
    options: dict[str, Any] = {"return_tensors": "pt"}
    if images is None:
        options = {"pixels": False, "image_sizes": image_sizes}
    with naming_template(processor):
        return processor.apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=add_generation_prompt,
            processor_kwargs=options,
            **template_options(processor, messages),
        )


def tokenize_branch(
    processor: Any,
    branch: Branch,
    images: Sequence[Image.Image] | None = None,
    image_sizes: Sequence[tuple[int, int]] = (),
) -> TokenizedBranch:
    """Token ids and labels of `branch`, up to the end of its last answer; `images` and `image_sizes` as for
    [`encode_conversation`].

    What an assistant says is found by rendering the conversation up to it, with and without it. Raises ValueError if
    the chat template does not allow that: a turn must leave the text before it as it is. And if a message holds a token
    that the processor cannot take for text.
    """

    def encode(messages: Sequence[Message], add_generation_prompt: bool) -> dict[str, Any]:
        try:
            sizes = image_sizes[: count_image_parts(messages)]
            return encode_conversation(processor, messages, images, sizes, add_generation_prompt=add_generation_prompt)
        except Refused:
            raise
        except UserError as error:
            raise UserError(f"{branch.where}: {error}") from None
        except (NotImplementedError, ValueError, StopIteration) as error:
            if "sanitize_control_tokens" not in template_options(processor, messages):
                raise
            raise ValueError(f"{branch.where}: {OWN_TOKEN}") from error

    def ids(messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        return _row(encode(messages, add_generation_prompt)["input_ids"])

    encoded = encode(branch.messages, False)
    whole = _row(encoded["input_ids"])
    given = [name for name in encoded if name in processor.model_input_names]
    types = {name: _row(encoded[name]) for name in given if name in (*TOKEN_TYPES, *IMAGE_MASKS)}
    qformer_inputs = {name: _rows(encoded[name]) for name in given if name in QFORMER_INPUTS}
    labels = [IGNORE] * len(whole)
    for turn, message in enumerate(branch.messages):
        if message["role"] != "assistant":
            continue
        before = ids(branch.messages[:turn], True)
        last = turn == len(branch.messages) - 1
        after = whole if last else ids(branch.messages[: turn + 1], False)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise ValueError(
                f"{branch.where}: the chat template changes earlier turns, or their last token, when later ones are "
                "added, so that answers cannot be told from questions; use another (model.chat_template: chatml)"
            )
        start, end = len(before), _end_of_answer(processor, whole, len(before), len(after))
        labels[start:end] = whole[start:end]
        if last:  # nothing is learnt behind it, and with several answers an image each would pay for it
            for column in (whole, labels, *types.values()):
                del column[end:]
    return TokenizedBranch(whole, labels, types, qformer_inputs)


def _end_of_answer(processor: Any, ids: list[int], start: int, end: int) -> int:
    """Where an answer in `ids[start:end]` ends. ChatML ends a turn with `<|im_end|>` and a line break; nobody generates
    past the end token, so white space behind it is not supervised."""
    tokenizer, last = processor.tokenizer, end
    while last > start and not tokenizer.decode(ids[last - 1 : last]).strip():
        last -= 1
    is_end_token = last > start and ids[last - 1] in _special_ids(tokenizer)
    return last if is_end_token else end


def _special_ids(tokenizer: Any) -> set[int]:
    # Not `all_special_ids`, which lacks the end of a turn where that is not also the end of a text (Gemma).
    return {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}


def _row(ids: Any) -> list[int]:
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return list(ids[0]) if ids and isinstance(ids[0], list) else list(ids)


def _rows(ids: Any) -> list[list[int]]:
    return ids.tolist() if hasattr(ids, "tolist") else ids
