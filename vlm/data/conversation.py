"""Conversations to token ids and labels, by the processor's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vlm.data.example import Branch, Message

IGNORE = -100
"""The label of a token that is not supervised, as everywhere in transformers."""


@dataclass
class TokenizedBranch:
    """One conversation as the model sees it.

    Attributes:
        input_ids: token ids, image tokens expanded.
        labels: the same where an assistant's answer, with its end token, is supervised; else, and at first, -100.
        inputs: what else the processor made of the images (`pixel_values`, ...), unless they come separately.
    """

    input_ids: list[int]
    labels: list[int]
    inputs: dict[str, Any] = field(default_factory=dict)


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
    *,
    add_generation_prompt: bool = False,
) -> dict[str, Any]:
    """What the processor makes of one conversation, as lists and tensors of one row.

    `images=None` asks for the ids alone, which our own processor can give without looking at a pixel.
    """
    conversation = list(messages) if images is None else with_images(messages, images)
    options: dict[str, Any] = {"pixels": False} if images is None else {"return_tensors": "pt"}
    return processor.apply_chat_template(
        conversation,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=add_generation_prompt,
        sanitize_control_tokens=True,
        processor_kwargs=options,
    )


def tokenize_branch(processor: Any, branch: Branch, images: Sequence[Image.Image] | None = None) -> TokenizedBranch:
    """Token ids and labels of `branch`.

    What an assistant says is found by rendering the conversation up to it, with and without it. Raises ValueError if
    the chat template does not allow that: a turn must leave the text before it as it is.
    """

    def ids(messages: Sequence[Message], add_generation_prompt: bool) -> tuple[list[int], dict[str, Any]]:
        encoded = dict(encode_conversation(processor, messages, images, add_generation_prompt=add_generation_prompt))
        return _row(encoded.pop("input_ids")), encoded

    whole, inputs = ids(branch.messages, False)
    labels = [IGNORE] * len(whole)
    for turn, message in enumerate(branch.messages):
        if message["role"] != "assistant":
            continue
        before, _ = ids(branch.messages[:turn], True)
        last = turn == len(branch.messages) - 1
        after = whole if last else ids(branch.messages[: turn + 1], False)[0]
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise ValueError(
                f"{branch.where}: the chat template changes earlier turns when later ones are added, so that answers "
                "cannot be told from questions; use another chat template (model.chat_template: chatml)"
            )
        labels[len(before) : len(after)] = whole[len(before) : len(after)]
    labels = _without_trailing_space(processor, whole, labels)
    return TokenizedBranch(whole, labels, {k: v for k, v in inputs.items() if k != "attention_mask"})


def _without_trailing_space(processor: Any, ids: list[int], labels: list[int]) -> list[int]:
    """ChatML ends a turn with `<|im_end|>` and a line break; nobody generates past the end token, so the line break
    after the last one is not supervised."""
    end = len(ids)
    while end and labels[end - 1] != IGNORE and not processor.tokenizer.decode(ids[end - 1 : end]).strip():
        end -= 1
    return labels[:end] + [IGNORE] * (len(ids) - end)


def _row(ids: Any) -> list[int]:
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return list(ids[0]) if ids and isinstance(ids[0], list) else list(ids)
