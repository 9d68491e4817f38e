"""Readers of LLaVA conversations."""

import pytest

from tests.data.reader_files import images, lines, write
from vlm.data.readers import SourceError, read


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def read_llava(tmp_path, rows, **options):
    images(tmp_path / "i", "a.png", "b.png")
    write(tmp_path / "l.json", rows)
    return read({"format": "llava", "path": "l.json", "images": "i", **options}, base_dir=tmp_path)


def test_llava(tmp_path):
    rows = [
        {"id": "1", "image": "a.png", "conversations": turns("<image>\nQ1?", "A1", "Q2?", "A2")},
        {
            "id": "2",
            "image": ["a.png", "b.png"],
            "conversations": turns("<image>\nx", "y", "see <image> here", "z"),
        },
        {"id": "3", "conversations": [{"from": "system", "value": "S"}, *turns("Q?", "A")]},
        {"id": "4", "image": "a.png", "conversations": turns("<image>\nQ4?", "A4")},
        {"id": "5", "image": "a.png", "conversations": turns("Q5?\n<image>", "A5")},
    ]
    examples, problems = read_llava(tmp_path, rows)
    assert problems == []
    assert [len(e.images) for e in examples] == [1, 2, 0, 1]
    # Row 4 asks about row 1's image in the same place and joins it; in row 5 the image stands behind the question.
    assert [[b.where for b in e.branches] for e in examples] == [
        ["l.json:row 0 (id '1')", "l.json:row 3 (id '4')"],
        ["l.json:row 1 (id '2')"],
        ["l.json:row 2 (id '3')"],
        ["l.json:row 4 (id '5')"],
    ]
    first = examples[0].branches[0].messages
    assert [m["role"] for m in first] == ["user", "assistant", "user", "assistant"]
    assert first[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Q1?"}]
    later = examples[1].branches[0].messages[2]["content"]
    assert later == [{"type": "text", "text": "see "}, {"type": "image"}, {"type": "text", "text": " here"}]
    assert examples[2].branches[0].messages[0] == {"role": "system", "content": [{"type": "text", "text": "S"}]}
    assert examples[0].image_id == examples[3].image_id == "a.png"


def test_llava_json_lines_beside_their_images(tmp_path):
    images(tmp_path / "d", "a.png")
    write(tmp_path / "d" / "l.jsonl", [{"image": "a.png", "conversations": turns("<image>", "A")}, "oops"])
    examples, problems = read({"format": "llava", "path": "d/l.jsonl"}, base_dir=tmp_path)
    assert examples[0].images == (str(tmp_path / "d" / "a.png"),)
    assert [p.where for p in problems] == ["d/l.jsonl:2"]


LLAVA_FAULTS = [
    ({"image": "a.png", "conversations": turns("Q?", "A")}, "conversations: 0 <image> placeholders but 1 image(s)"),
    ({"image": "a.png", "conversations": turns("<image> <image>", "A")}, "conversations: 2 <image> placeholders but 1"),
    ({"conversations": turns("<image>", "A")}, "conversations: 1 <image> placeholders but 0 image(s)"),
    ({"image": "a.png", "conversations": turns("<image>", "")}, "conversations[1]: empty answer"),
    ({"image": "a.png", "conversations": turns("<image>", "A", "B")}, "conversations: the last turn must be an answer"),
    ({"image": "a.png", "conversations": turns("Q", "<image>")}, "conversations[1]: an answer contains an image"),
    (
        {"image": "a.png", "conversations": [*turns("<image>", "A"), *turns("B", "C")[::-1]]},
        "conversations[2]: a turn of the user is expected",
    ),
    ({"image": "a.png", "conversations": []}, "conversations: expected a list of turns, found []"),
    ({"image": "a.png"}, "conversations: expected a list of turns, found None"),
    (
        {"image": "a.png", "conversation": turns("<image>", "A")},
        "conversation: unknown key, did you mean 'conversations'",
    ),
    (
        {"image": "a.png", "conversations": [{"from": "bot", "value": "x"}]},
        "conversations[0]: from 'bot' is not one of",
    ),
    ({"image": "a.png", "conversations": [{"value": "x"}]}, "conversations[0]: expected an object with 'from'"),
    ({"image": "c.png", "conversations": turns("<image>", "A")}, "image: no such image: "),
    ({"image": 3, "conversations": turns("<image>", "A")}, "image: expected the name of an image"),
    ({"video": "a.mp4", "conversations": turns("<video>", "A")}, "video: videos are not supported"),
]


@pytest.mark.parametrize(("row", "fault"), LLAVA_FAULTS, ids=[fault for _, fault in LLAVA_FAULTS])
def test_llava_faults(tmp_path, row, fault):
    examples, problems = read_llava(tmp_path, [{"id": 0, "conversations": turns("Q", "A")}, {"id": 7, **row}])
    assert len(examples) == 1
    assert len(problems) == 1
    assert str(problems[0]).startswith(f"l.json:row 1 (id 7): {fault}")


def test_llava_row_that_is_no_object(tmp_path):
    _, problems = read_llava(tmp_path, [3])
    assert lines(problems) == ["l.json:row 0: expected an object {...}, found 3"]


def test_llava_file_that_is_no_list(tmp_path):
    with pytest.raises(SourceError, match=r"l\.json: expected a list of rows, or rows on a line each .*, found {}"):
        read_llava(tmp_path, {})
