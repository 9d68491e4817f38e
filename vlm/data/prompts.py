"""Models whose processors have no chat template: the question is the prompt, and the answer goes on from it.

    BLIP, GIT                [CLS] question answer [SEP]                 the image stands beside the text
    BLIP-2, InstructBLIP     <image>... </s> question answer </s>
    PaliGemma                <image>... <bos> question \\n answer <eos>    image and question see each other both ways
    Idefics                  <s> <fake><image><fake> question answer </s>

What stands before the answer is made by the processor, as for inference; the answer and the token that ends a text come
behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm.data.example import Message
from vlm.errors import UserError

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What the processors of some models give beside each token, for their masks (Gemma 3) or positions (Qwen2-VL)."""

IMAGE_MASKS = ("cross_attention_mask", "image_attention_mask")
"""Which images of its row each token may look at, `[rows, tokens, images, ...]`, in models whose layers attend to
images (Mllama, Idefics). Their pixels come row by row too."""


def _beside(processor: Any, images: Sequence[Image.Image], text: str) -> dict[str, Any]:
    return {"images": list(images) or None, "text": text}


def _before(processor: Any, images: Sequence[Image.Image], text: str) -> dict[str, Any]:
    return {"images": [list(images)], "text": [processor.image_token * len(images) + text]}


def _among(processor: Any, images: Sequence[Image.Image], text: str) -> dict[str, Any]:
    return {"text": [[*images, text]]}


PROMPTS: dict[str, Callable[[Any, Sequence[Image.Image], str], dict[str, Any]]] = {
    "BlipProcessor": _beside,
    "Blip2Processor": _beside,
    "GitProcessor": _beside,
    "IdeficsProcessor": _among,
    "InstructBlipProcessor": _beside,
    "PaliGemmaProcessor": _before,
}
"""By the class of a processor: what it is called with. A processor with a chat template needs no entry."""

ONE_IMAGE = ("BlipProcessor", "Blip2Processor", "GitProcessor", "InstructBlipProcessor")
"""No token says where an image of theirs stands: a prompt has one."""


def is_prefix_lm(processor: Any) -> bool:
    """Whether image and prompt see each other both ways in the processor's model: one more question is another image to
    it. Its token types are 0 in the prompt and 1 behind it."""
    return type(processor).__name__ == "PaliGemmaProcessor" or getattr(processor, "image_attention", "") == "prefix_lm"


def has_chat_template(processor: Any) -> bool:
    return getattr(processor, "chat_template", None) is not None


def require_prompt(processor: Any) -> None:
    """Raise UserError if nothing says how a question and its images become the tokens of `processor`'s model."""
    name = type(processor).__name__
    if not hasattr(processor, "tokenizer"):
        raise UserError(
            f"{name} has no tokenizer: this is no processor of images and text. A model whose processor takes both is "
            "needed, such as LLaVA's"
        )
    if not has_chat_template(processor) and name not in PROMPTS:
        raise UserError(
            f"{name} has no chat template, and no prompt is known for it (one is for {', '.join(PROMPTS)}). Give it "
            "one: `processor.chat_template = ...` and `processor.save_pretrained(FOLDER)`"
        )
    if has_chat_template(processor) and set(getattr(processor, "image_token_ids", [None])) == {None}:
        raise UserError(f"{name} has no image token id: nothing says which tokens of a prompt stand for its images")


def encode_prompt(processor: Any, messages: Sequence[Message], images: Sequence[Image.Image]) -> dict[str, Tensor]:
    """One question with its images, and its answer if the messages hold one, as inputs of one row: `input_ids [1, L]`,
    what belongs to each token, and what the processor makes of the images.

    A space parts the answer from a question that does not end with white space. Raises UserError for a conversation of
    several turns, and for a number of images that the model cannot take.
    """
    require_prompt(processor)
    question, answer = _question_and_answer(processor, messages)
    name = type(processor).__name__
    if (name in ONE_IMAGE and len(images) != 1) or not images:
        raise UserError(f"a prompt of {name} has {'one image' if name in ONE_IMAGE else 'images'}, not {len(images)}")
    options = {"return_tensors": "pt"}
    made = dict(processor(**PROMPTS[name](processor, images, question), **options))
    made = {key: value for key, value in made.items() if key in processor.model_input_names and key != "labels"}
    columns = [key for key in ("input_ids", "attention_mask", *TOKEN_TYPES, *IMAGE_MASKS) if key in made]
    if made["input_ids"][0, -1] == _closing_id(processor.tokenizer):
        made |= {key: made[key][:, :-1] for key in columns}
    if answer is None:
        return made
    parted = not question or processor.tokenizer.decode(made["input_ids"][0])[-1:].isspace()
    ids = torch.tensor([_answer_ids(processor.tokenizer, answer if parted else f" {answer}")])
    for key in columns:
        last = made[key][:, -1:].expand(-1, ids.shape[1], *made[key].shape[2:])
        # The answer has a type of its own, which PaliGemma reads from left to right.
        behind = {"input_ids": ids, "token_type_ids": torch.ones_like(ids)}.get(key, last)
        made[key] = torch.cat([made[key], behind], dim=1)
    return made


def end_token_id(tokenizer: Any) -> int:
    """What ends an answer: the token that the tokenizer puts behind a text, or else the one that ends texts."""
    closing = _closing_id(tokenizer)
    return tokenizer.eos_token_id if closing is None else closing


def _closing_id(tokenizer: Any) -> int | None:
    """The special token that the tokenizer puts behind a text: BERT's `[SEP]`."""
    ids, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return ids[-1] if ids[-1] != bare[-1] else None


def _answer_ids(tokenizer: Any, answer: str) -> list[int]:
    """The tokens of an answer as they are behind a text, and the end token."""
    # Behind something, since some tokenizers begin a text with a space of their own.
    question = ":" if answer.startswith(" ") else "\n"
    before, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, question + answer))
    if both[: len(before)] != before:
        raise ValueError(f"the tokenizer joins the end of a question and the beginning of its answer {answer!r}")
    return [*both[len(before) :], end_token_id(tokenizer)]


def _question_and_answer(processor: Any, messages: Sequence[Message]) -> tuple[str, str | None]:
    if [message["role"] for message in messages] not in (["user"], ["user", "assistant"]):
        raise UserError(
            f"{type(processor).__name__} has no chat template: its model answers one question about its images, and "
            "holds no conversation and no system prompt (in `vlm chat`, /reset forgets what was said)"
        )
    question, *answer = ("".join(part.get("text", "") for part in message["content"]).strip() for message in messages)
    return question, answer[0] if answer else None
