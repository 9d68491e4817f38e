"""Conversations in the layouts that are common, as turns with their images in place.

    messages             [{"role": "user", "content": "text, or a list of parts"}]    Hugging Face's chat format
    conversations        [{"from": "human", "value": "text"}]                         ShareGPT's, which LLaVA uses
    prompt, completion   text, or messages                                            TRL's

The place of an image is an image part, or `<image>` in a text, as in LLaVA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vlm.data.example import Branch, Message, count_image_parts, question_and_answer
from vlm.data.readers_text import IMAGE_PLACEHOLDER, NO_IMAGE_IN_ANSWER, RowError, is_null, whole
from vlm.errors import shown

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
_IMAGE_PARTS = ("image", "image_url")


def conversation_branch(turns: Any, num_images: int, key: str, where: str, question_id: str) -> Branch:
    """Return a branch from the turns of a conversation: an optional system message, then user and assistant in turn.

    Where nothing says where the images go, they go before the first user message, except in ShareGPT's format. An
    answer before the first question is left out, as LLaVA's own code does it. `key` is what holds the turns.

    Raises:
        RowError: the conversation is not of that form, or names more or fewer images than there are.
    """
    if not isinstance(turns, list) or not turns:
        raise RowError(key, f"expected a list of turns, found {shown(turns)}")
    messages = [_message(turn, f"{key}[{index}]") for index, turn in enumerate(turns)]
    names = [f"{key}[{index}]" for index in range(len(messages))]
    for message, name in zip(messages, names, strict=True):
        if message["role"] == "assistant" and count_image_parts([message]):
            raise RowError(name, NO_IMAGE_IN_ANSWER)
        if message["role"] == "system" and count_image_parts([message]):
            raise RowError(name, "the system message contains an image; images are only allowed in questions")
    found = count_image_parts(messages)
    first = int(messages[0]["role"] == "system")
    if len(messages) > first + 1 and messages[first]["role"] == "assistant":
        del messages[first], names[first]
    says_where = key == "conversations" and "role" not in turns[0]
    if not found and num_images and not says_where:
        asked = next((message for message in messages if message["role"] == "user"), messages[0])
        asked["content"][:0] = [{"type": "image"} for _ in range(num_images)]
    elif found != num_images:
        places = (
            f"{IMAGE_PLACEHOLDER} placeholders" if says_where else f"image parts or {IMAGE_PLACEHOLDER} placeholders"
        )
        raise RowError(key, f"{found} {places} but {num_images} image(s)")
    _require_turns(messages[first:], names[first:], key)
    return Branch(tuple(messages), where=where, question_id=question_id)


def _require_turns(body: Sequence[Message], names: Sequence[str], key: str) -> None:
    for index, (turn, name) in enumerate(zip(body, names, strict=True)):
        expected = "user" if index % 2 == 0 else "assistant"
        if turn["role"] != expected:
            raise RowError(name, f"a turn of the {expected} is expected here, found one of the {turn['role']}")
        if expected == "assistant" and not any(part["text"].strip() for part in turn["content"]):
            raise RowError(name, "empty answer")
    if not body or body[-1]["role"] != "assistant":
        raise RowError(key, "the last turn must be an answer, since that is what is learned")


def completed_branch(row: Mapping[str, Any], num_images: int, where: str, question_id: str) -> Branch:
    """Return a branch from `prompt` and `completion`, each a text or messages.

    Raises:
        RowError: they are neither, or no conversation together.
    """
    turns: list[Any] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(key)
        if is_null(value):
            raise RowError(key, "missing: 'prompt' and 'completion' go together")
        turns += value if isinstance(value, list) else [{"role": role, "content": value}]
    return conversation_branch(turns, num_images, "prompt and completion", where, question_id)


def _message(turn: Any, key: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(key, f"expected an object with 'role' and 'content', found {shown(turn)}")
    by, said = ("role", "content") if "role" in turn or "content" in turn else ("from", "value")
    if by not in turn or is_null(turn.get(said)):
        raise RowError(key, f"expected an object with '{by}' and '{said}', found {shown(turn)}")
    role = turn[by]
    if not isinstance(role, str) or role not in _ROLES:
        raise RowError(key, f"{by} {shown(role)} is not one of {', '.join(_ROLES)}")
    content = turn[said].strip() if by == "from" and isinstance(turn[said], str) else turn[said]
    if isinstance(content, str):
        return {"role": _ROLES[role], "content": parts_of(content, key)}
    if not isinstance(content, list):
        raise RowError(key, f"{said} is text or a list of parts, found {shown(content)}")
    return {"role": _ROLES[role], "content": [made for part in content for made in _parts(part, key)]}


def _parts(part: Any, key: str) -> list[dict[str, str]]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _IMAGE_PARTS:
        return [{"type": "image"}]
    if kind == "text" and isinstance(part.get("text"), str):
        return parts_of(part["text"], key)
    raise RowError(key, f"a part is {{type: image}} or {{type: text, text: ...}}, found {shown(part)}")


def parts_of(text: str, key: str) -> list[dict[str, str]]:
    """Return a text as parts: `<image>` is the place of an image, and line breaks around it belong to it.

    Raises:
        RowError: the text cannot be written as UTF-8.
    """
    if IMAGE_PLACEHOLDER not in whole(text, key):
        return [{"type": "text", "text": text}] if text else []
    # Not by a regular expression, which takes the square of the length of a run of line breaks.
    first, *others = text.strip().split(IMAGE_PLACEHOLDER)
    pieces = [first, *(piece.lstrip("\n") for piece in others)]
    pieces = [*(piece.rstrip("\n") for piece in pieces[:-1]), pieces[-1]]
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(pieces):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def asked_branch(
    question: str,
    answer: str,
    *,
    num_images: int = 1,
    references: Sequence[str] = (),
    where: str = "",
    question_id: str | None = None,
    key: str = "question",
) -> Branch:
    """Return a branch of one question and one answer. The images are where `<image>` is in the question, or before it.

    Raises:
        RowError: `<image>` is there more or less often than there are images; or the question, which is under `key`,
            cannot be written as UTF-8.
    """
    branch = question_and_answer(question, answer, num_images=num_images, references=references, where=where)
    if IMAGE_PLACEHOLDER in whole(question, key):
        content = parts_of(question, key)
        found = count_image_parts([{"content": content}])
        if found != num_images:
            raise RowError(key, f"{found} {IMAGE_PLACEHOLDER} placeholders but {num_images} image(s)")
        branch = replace(branch, messages=({"role": "user", "content": content}, *branch.messages[1:]))
    return replace(branch, question_id=question_id)
