"""Layouts of conversations, and the place of images in them."""

import re

import pytest

from tests.data.reader_files import images, write
from vlm.data.example import Problem
from vlm.data.readers import read
from vlm.data.readers_rows import RowReader

IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def chat(*said, names=("role", "content"), roles=("user", "assistant")):
    by, what = names
    return [{by: roles[i % 2], what: words} for i, words in enumerate(said)]


def share_gpt(*said):
    return chat(*said, names=("from", "value"), roles=("human", "gpt"))


def branches(row, num_images=1, **options):
    problems: list[Problem] = []
    made = RowReader(**options).branches(row, num_images=num_images, where="f:1", problems=problems)
    return [[message["content"] for message in branch.messages] for branch in made], [str(p) for p in problems]


FIRST = [[IMAGE, text("What?")], [text("A cat.")]]
AFTER = [[text("What?"), IMAGE], [text("A cat.")]]
ROWS = {
    "content": ({"messages": chat("<image>What?", "A cat.")}, FIRST),
    "content_after": ({"messages": chat("What?\n<image>", "A cat.")}, AFTER),
    "parts_of_text": ({"messages": chat([text("<image>\nWhat?")], [text("A cat.")])}, FIRST),
    "image_parts": ({"messages": chat([text("What?"), IMAGE], "A cat.")}, AFTER),
    "image_url": (
        {"messages": chat([{"type": "image_url", "image_url": {"url": "x"}}, text("What?")], "A cat.")},
        FIRST,
    ),
    "nothing_says_where": ({"messages": chat("What?", "A cat.")}, FIRST),
    "share_gpt": ({"conversations": share_gpt("<image>\nWhat?", "A cat.")}, FIRST),
    "share_gpt_in_messages": ({"messages": share_gpt("What?<image>", "A cat.")}, AFTER),
    "chat_in_conversations": ({"conversations": chat("What?<image>", "A cat.")}, AFTER),
    "completion": ({"prompt": "<image>What?", "completion": "A cat."}, FIRST),
    "completion_of_messages": ({"prompt": chat("What?<image>"), "completion": chat("", "A cat.")[1:]}, AFTER),
    "question": ({"question": "What?\n<image>", "answer": "A cat."}, AFTER),
    "qa": ({"qa": [{"user": "<image>What?", "assistant": "A cat."}]}, FIRST),
    "caption": ({"caption": "A cat.", "prompt": "What?\n<image>"}, AFTER),
    "answer_first": ({"conversations": [*share_gpt("", "Hello!")[1:], *share_gpt("<image>What?", "A cat.")]}, FIRST),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_placeholder_is_the_place_of_an_image(name):
    row, expected = ROWS[name]
    assert branches(row) == ([expected], [])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": chat("<image><image>x", "y")}, "messages: 2 image parts or <image> placeholders but 1 image(s)"),
        ({"messages": chat([IMAGE, text("<image>x")], "y")}, "messages: 2 image parts or <image> placeholders but 1"),
        ({"messages": chat("x", "<image>y")}, "messages[1]: an answer contains an image"),
        (
            {"messages": [{"role": "system", "content": "<image>"}, *chat("x", "y")]},
            "messages[0]: the system message contains an image",
        ),
        (
            {"conversations": [*share_gpt("", "<image>")[1:], *share_gpt("x", "y")]},
            "conversations[0]: an answer contains an image",
        ),
        ({"caption": "a <image>"}, "caption: an answer contains an image"),
        ({"question": "<image> <image>", "answer": "x"}, "question: 2 <image> placeholders but 1 image(s)"),
        ({"question": "x", "answer": "<image>"}, "answer: an answer contains an image"),
        ({"completion": "y"}, "prompt: missing: 'prompt' and 'completion' go together"),
    ],
)
def test_places_that_do_not_go_with_the_images_are_named(row, fault):
    made, problems = branches(row)
    assert made == []
    assert len(problems) == 1
    assert problems[0].startswith(f"f:1: {fault}")


def test_a_row_without_images_has_no_placeholder():
    made, problems = branches({"messages": chat("What does <image> mean?", "A tag.")}, num_images=0)
    assert (made, len(problems)) == ([], 1)


def test_placeholders_of_prompts_in_a_recipe(tmp_path):
    images(tmp_path, "1.png")
    write(tmp_path / "q.json", {"questions": [{"question_id": 1, "image_id": 1, "question": "What?"}]})
    answers = {"question_id": 1, "multiple_choice_answer": "x", "answers": ["x"]}
    write(tmp_path / "a.json", {"annotations": [answers]})
    source = {"format": "vqav2", "questions": "q.json", "annotations": "a.json", "images": "."}
    source |= {"image_pattern": "{image_id}.png", "question_prompt": "{question}\n<image>"}
    examples, problems = read(source, base_dir=tmp_path)
    assert problems == []
    assert examples[0].branches[0].messages[0]["content"] == [text("What?"), IMAGE]


@pytest.mark.parametrize("words", ["a\n\n<image>\n\nb<image>c\n", "\n<image>", "<image> <image>", "a <image>"])
def test_line_breaks_around_an_image_belong_to_it(words):
    parts = branches({"messages": chat(words, "x")}, words.count("<image>"))[0][0][0]
    # By a regular expression, which takes the square of the length of a run of line breaks.
    expected: list[dict[str, str]] = []
    for index, piece in enumerate(re.split(r"\n*<image>\n*", words.strip())):
        expected += [IMAGE] if index else []
        expected += [text(piece)] if piece else []
    assert parts == expected


def test_a_long_run_of_line_breaks_is_read():
    made, problems = branches({"conversations": share_gpt("<image>" + "\n" * 1_000_000 + "x", "y")})
    assert (made, problems) == ([[[IMAGE, text("x")], [text("y")]]], [])
