"""The vocabulary of a row, shared by the `image_folder` and `dataset` formats.

A row says what is to be answered in one or more of these keys:

    caption         one caption; also called `text`, where a row has nothing else to answer
    captions        several: strings, or {"prompt": ..., "caption": ...} for a prompt of their own
    question        one question, with `answer` and/or `answers`
    question_id     its id
    qa              several: {"question", "answer" and/or "answers"} (or The Cauldron's {"user", "assistant"})
    messages        one conversation, in Hugging Face's chat format or ShareGPT's
    conversations   the same
    completion      what `prompt` is answered with, in TRL's format
    prompt          what asks for this row's captions, in place of the source's `prompt`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlm.data.example import Branch, Problem
from vlm.data.readers_conversations import asked_branch, completed_branch, conversation_branch
from vlm.data.readers_text import (
    CONTENT_KEYS,
    RowError,
    answer_text,
    answer_texts,
    id_text,
    is_null,
    near_miss,
    required_text,
    unknown_near_miss,
)
from vlm.errors import shown, some

DEFAULT_PROMPT = "Describe the image."
DEFAULT_QUESTION_PROMPT = "{question}"
ROW_KEYS = (
    "caption",
    "captions",
    "question",
    "answer",
    "answers",
    "qa",
    "messages",
    "conversations",
    "prompt",
    "completion",
)
"""What a row may say, and a misspelt key may mean."""
_OTHER_NAMES = {
    "answer": "an answer needs a 'question'",
    "answers": "answers need a 'question'",
    "label": "to learn it as a caption, call it 'caption'",
    "query": "call it 'question'",
    "response": "call it 'answer', with a 'question'",
    "sentences": "call it 'captions'",
}
"""Keys that say something in other formats, and what to change."""


@dataclass(frozen=True)
class RowReader:
    """Turns rows into branches. `question_prompt` is what is asked, with `{question}` where the question goes."""

    prompt: str = DEFAULT_PROMPT
    question_prompt: str = DEFAULT_QUESTION_PROMPT

    def branches(self, row: Mapping[str, Any], *, num_images: int, where: str, problems: list[Problem]) -> list[Branch]:
        """All branches of a row. What is bad goes to `problems`, and the rest of the row is kept."""
        given, row = row, {key: value for key, value in row.items() if not is_null(value)}
        if "text" in row and not any(key in row for key in CONTENT_KEYS):
            row["caption"] = row.pop("text")
        if not any(key in row for key in CONTENT_KEYS):
            problems.append(_nothing_to_answer(given, where))
            return []
        try:
            question_id = id_text(row.get("question_id"), "question_id") or where
        except RowError as error:
            problems.append(Problem(where, error.key, error.why))
            return []
        branches: list[Branch] = []

        def attempt(item_where: str, build: Callable[..., Branch], *args: Any) -> None:
            try:
                branches.append(build(*args))
            except RowError as error:
                problems.append(Problem(item_where, error.key, error.why))

        if "caption" in row:
            item = {"caption": row["caption"], "prompt": row.get("prompt")}
            attempt(where, self._caption, item, num_images, where)
        if "question" in row:
            item = {key: row.get(key) for key in ("question", "answer", "answers")}
            attempt(where, self._question, item, num_images, where, question_id)
        for key in ("captions", "qa"):
            if key in row and (not isinstance(row[key], list) or not row[key]):
                problems.append(Problem(where, key, f"expected a list that is not empty, found {shown(row[key])}"))
                continue
            for index, item in enumerate(row.get(key, ())):
                item_where = f"{where} {key}[{index}]"
                if key == "qa":
                    attempt(item_where, self._question, item, num_images, item_where, item_where)
                    continue
                item = item if isinstance(item, dict) else {"caption": item}
                if is_null(item.get("prompt")):
                    item = {**item, "prompt": row.get("prompt")}
                attempt(item_where, self._caption, item, num_images, item_where)
        for key in ("messages", "conversations"):
            if key in row:
                attempt(where, conversation_branch, row[key], num_images, key, where, question_id)
        if "completion" in row:
            attempt(where, completed_branch, row, num_images, where, question_id)
        return branches

    def _caption(self, item: Mapping[str, Any], num_images: int, where: str) -> Branch:
        _only_known(item, ("prompt", "caption"))
        prompt = self.prompt if is_null(item.get("prompt")) else required_text(item, "prompt", allow_empty=True)
        return asked_branch(prompt, answer_text(item, "caption"), num_images=num_images, where=where, key="prompt")

    def _question(self, item: Any, num_images: int, where: str, question_id: str) -> Branch:
        if not isinstance(item, dict):
            raise RowError("qa", f"expected an object with a question and an answer, found {shown(item)}")
        if "user" in item and "assistant" in item:
            item = {"question": item["user"], "answer": item["assistant"]}
        _only_known(item, ("question", "answer", "answers"))
        question = required_text(item, "question")
        question_id = id_text(item.get("question_id"), "question_id") or question_id
        references: tuple[str, ...] = ()
        if not is_null(item.get("answers")):
            references = answer_texts(item["answers"])
        if not is_null(item.get("answer")):
            answer = answer_text(item, "answer")
        elif references:  # as VQAv2 does it: the answer most people gave
            answer = Counter(references).most_common(1)[0][0]
            if not answer:
                raise RowError("answers", "the most common answer is empty")
            answer = answer_text({"answers": answer}, "answers")
        else:
            raise RowError("answer", "missing: a question needs 'answer' or 'answers'")
        asked = self.question_prompt.replace("{question}", question)
        return asked_branch(
            asked, answer, num_images=num_images, references=references, where=where, question_id=question_id
        )


def _only_known(item: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if miss := unknown_near_miss(item, known):
        raise RowError(*miss)


def _nothing_to_answer(row: Mapping[str, Any], where: str) -> Problem:
    if empty := [key for key in CONTENT_KEYS if key in row]:
        return Problem(where, "", f"nothing to answer: {empty[0]!r} is null")
    hint = next((f" ({key!r}: {_OTHER_NAMES[key]})" for key in row if key in _OTHER_NAMES), "")
    hint = hint or next((f" ({key!r}{h})" for key in row if (h := near_miss(key, CONTENT_KEYS))), "")
    found = some(row)
    return Problem(where, "", f"nothing to answer: none of {', '.join(CONTENT_KEYS)} among {found}{hint}")
