"""The vocabulary of a row, shared by the `image_folder` and `dataset` formats, and conversations as LLaVA writes them.

A row says what is to be answered in one or more of these keys:

    caption         one caption
    captions        several: strings, or {"prompt": ..., "caption": ...} for a prompt of their own
    question        one question, with `answer` and/or `answers`
    qa              several: {"question", "answer" and/or "answers"} (or The Cauldron's {"user", "assistant"})
    messages        one conversation in the Hugging Face chat format
    conversations   one conversation in LLaVA's format
    prompt          what asks for this row's captions, in place of the source's `prompt`
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm.data.example import Branch, Message, Problem, count_image_parts, question_and_answer

DEFAULT_PROMPT = "Describe the image."
DEFAULT_QUESTION_PROMPT = "{question}"
ROW_KEYS = ("caption", "captions", "question", "answer", "answers", "qa", "messages", "conversations", "prompt")
_CONTENT_KEYS = ("caption", "captions", "question", "qa", "messages", "conversations")

IMAGE_PLACEHOLDER = "<image>"
_PLACEHOLDER = re.compile(r"\n*<image>\n*")
_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class RowError(ValueError):
    """One branch of a row is bad: which key, and why."""

    def __init__(self, key: str, why: str) -> None:
        super().__init__(key, why)
        self.key, self.why = key, why


@dataclass(frozen=True)
class RowReader:
    """Turns rows into branches. `question_prompt` is what is asked, with `{question}` where the question goes."""

    prompt: str = DEFAULT_PROMPT
    question_prompt: str = DEFAULT_QUESTION_PROMPT

    def branches(self, row: Mapping[str, Any], *, num_images: int, where: str, problems: list[Problem]) -> list[Branch]:
        """All branches of a row. What is bad goes to `problems`, and the rest of the row is kept."""
        row = {key: value for key, value in row.items() if value is not None}
        if not any(key in row for key in _CONTENT_KEYS):
            problems.append(_nothing_to_answer(row, where))
            return []
        branches: list[Branch] = []

        def attempt(item_where: str, build: Any, *args: Any) -> None:
            try:
                branches.append(build(*args, num_images, item_where))
            except RowError as error:
                problems.append(Problem(item_where, error.key, error.why))

        if "caption" in row:
            attempt(where, self._caption, {"caption": row["caption"], "prompt": row.get("prompt")})
        if "question" in row:
            attempt(where, self._question, {key: row.get(key) for key in ("question", "answer", "answers")})
        for key, build in (("captions", self._caption), ("qa", self._question)):
            if key in row:
                if not isinstance(row[key], list) or not row[key]:
                    problems.append(Problem(where, key, f"expected a list that is not empty, found {_show(row[key])}"))
                    continue
                for index, item in enumerate(row[key]):
                    item_where = f"{where} {key}[{index}]"
                    if key == "captions" and not isinstance(item, dict):
                        item = {"caption": item}
                    if key == "captions" and item.get("prompt") is None:
                        item = {**item, "prompt": row.get("prompt")}
                    attempt(item_where, build, item)
        if "messages" in row:
            attempt(where, chat_branch, row["messages"])
        if "conversations" in row:
            attempt(where, llava_branch, row["conversations"])
        return branches

    def _caption(self, item: Mapping[str, Any], num_images: int, where: str) -> Branch:
        _only_known(item, ("prompt", "caption"))
        prompt = self.prompt if item.get("prompt") is None else required_text(item, "prompt", allow_empty=True)
        return question_and_answer(prompt, required_text(item, "caption"), num_images=num_images, where=where)

    def _question(self, item: Any, num_images: int, where: str) -> Branch:
        if not isinstance(item, dict):
            raise RowError("qa", f"expected an object with a question and an answer, found {_show(item)}")
        if "user" in item and "assistant" in item:
            item = {"question": item["user"], "answer": item["assistant"]}
        _only_known(item, ("question", "answer", "answers"))
        question = required_text(item, "question")
        references: tuple[str, ...] = ()
        if item.get("answers") is not None:
            references = answer_texts(item["answers"])
        if item.get("answer") is not None:
            answer = required_text(item, "answer")
        elif references:  # as VQAv2 does it: the answer most people gave
            answer = Counter(references).most_common(1)[0][0]
            if not answer:
                raise RowError("answers", "the most common answer is empty")
        else:
            raise RowError("answer", "missing: a question needs 'answer' or 'answers'")
        asked = self.question_prompt.replace("{question}", question)
        return question_and_answer(asked, answer, num_images=num_images, references=references, where=where)


def required_text(item: Mapping[str, Any], key: str, *, allow_empty: bool = False) -> str:
    """The text under a key, without white space around it.

    Raises:
        RowError: it is missing, not text, or empty.
    """
    if item.get(key) is None:
        raise RowError(key, f"missing{near_miss(key, [k for k in item if k != key])}")
    value = item[key]
    if not isinstance(value, str):
        hint = f"; a list goes under '{key}s'" if isinstance(value, list) and key in ("caption", "answer") else ""
        raise RowError(key, f"expected text, found {_show(value)}{hint}")
    if not value.strip() and not allow_empty:
        raise RowError(key, "empty")
    return value.strip()


def answer_texts(answers: Any) -> tuple[str, ...]:
    """Acceptable answers, given as strings or in VQAv2's form `{"answer": ...}`.

    Raises:
        RowError: not a list, empty, or holding something else.
    """
    if not isinstance(answers, list) or not answers:
        raise RowError("answers", f"expected a list that is not empty, found {_show(answers)}")
    texts = [a.get("answer") if isinstance(a, dict) else a for a in answers]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise RowError(f"answers[{index}]", f"expected text, found {_show(answers[index])}")
    return tuple(str(text).strip() for text in texts)


def chat_branch(messages: Any, num_images: int, where: str) -> Branch:
    """A branch from messages in the Hugging Face chat format, whose content is text or a list of parts.

    Where no message says where the images go, they go before the first user message.

    Raises:
        RowError: the conversation is not of that form.
    """
    if not isinstance(messages, list) or not messages:
        raise RowError("messages", f"expected a list of messages, found {_show(messages)}")
    turns: list[Message] = []
    for index, message in enumerate(messages):
        key = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("content") is None or "role" not in message:
            raise RowError(key, f"expected an object with 'role' and 'content', found {_show(message)}")
        if message["role"] not in ("system", "user", "assistant"):
            raise RowError(key, f"role {message['role']!r} is not one of system, user, assistant")
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        turns.append({"role": message["role"], "content": _parts(content, key)})
    if count_image_parts(turns) == 0 and num_images:
        first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
        first["content"][:0] = [{"type": "image"} for _ in range(num_images)]
    return _conversation(turns, num_images, "messages", "image parts", where)


def _parts(content: Any, key: str) -> list[dict[str, str]]:
    if not isinstance(content, list):
        raise RowError(key, f"content is text or a list of parts, found {_show(content)}")
    parts: list[dict[str, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise RowError(key, f"a part is {{type: image}} or {{type: text, text: ...}}, found {_show(part)}")
    return parts


def llava_branch(conversations: Any, num_images: int, where: str) -> Branch:
    """A branch from LLaVA's `[{"from": "human" | "gpt", "value": ...}]`. `<image>` stays where it stands.

    Raises:
        RowError: the conversation is not of that form.
    """
    if not isinstance(conversations, list) or not conversations:
        raise RowError("conversations", f"expected a list of turns, found {_show(conversations)}")
    turns: list[Message] = []
    for index, turn in enumerate(conversations):
        key = f"conversations[{index}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            raise RowError(key, f"expected an object with 'from' and 'value', found {_show(turn)}")
        if turn["from"] not in _LLAVA_ROLES:
            raise RowError(key, f"from {turn['from']!r} is not one of {', '.join(_LLAVA_ROLES)}")
        parts: list[dict[str, str]] = []
        for position, text in enumerate(_PLACEHOLDER.split(turn["value"].strip())):
            if position:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
        turns.append({"role": _LLAVA_ROLES[turn["from"]], "content": parts})
    return _conversation(turns, num_images, "conversations", f"{IMAGE_PLACEHOLDER} placeholders", where)


def _conversation(turns: Sequence[Message], num_images: int, key: str, placeholders: str, where: str) -> Branch:
    """A branch of turns that were read: an optional system message, then user and assistant in turn."""
    body = turns[1:] if turns[0]["role"] == "system" else turns
    offset = len(turns) - len(body)
    for index, turn in enumerate(body):
        name = f"{key}[{index + offset}]"
        expected = "user" if index % 2 == 0 else "assistant"
        if turn["role"] != expected:
            raise RowError(name, f"a turn of the {expected} is expected here, found one of the {turn['role']}")
        if expected == "assistant" and count_image_parts([turn]):
            raise RowError(name, "an image stands in an answer; images are only allowed in questions")
        if expected == "assistant" and not any(part["text"].strip() for part in turn["content"]):
            raise RowError(name, "empty answer")
    if not body or body[-1]["role"] != "assistant":
        raise RowError(key, "the last turn must be an answer, since that is what is learned")
    found = count_image_parts(turns)
    if found != num_images:
        raise RowError(key, f"{found} {placeholders} but {num_images} image(s)")
    if offset and count_image_parts(turns[:1]):
        raise RowError(f"{key}[0]", "an image stands in the system message; images are only allowed in questions")
    return Branch(tuple(turns), where=where)


def near_miss(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`, did you mean 'x'?` for the known word that this one nearly is; empty where there is none."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f", did you mean {matches[0]!r}?" if matches else ""


def unknown_near_miss(row: Mapping[str, Any], known: Sequence[str]) -> tuple[str, str] | None:
    """A key that is nearly a known one, and why it is bad. Keys that resemble none are other columns, and are left."""
    for key in row:
        if key not in known and (hint := near_miss(key, known, cutoff=0.85)):
            return key, f"unknown key{hint}"
    return None


def _only_known(item: Mapping[str, Any], known: Sequence[str]) -> None:
    if miss := unknown_near_miss(item, known):
        raise RowError(*miss)


def _nothing_to_answer(row: Mapping[str, Any], where: str) -> Problem:
    hint = next((f" ({key!r}{h})" for key in row if (h := near_miss(key, _CONTENT_KEYS))), "")
    found = ", ".join(map(repr, row)) or "nothing"
    return Problem(where, "", f"nothing to answer: none of {', '.join(_CONTENT_KEYS)} among {found}{hint}")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
