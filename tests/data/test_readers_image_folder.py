"""Readers of image folders with a `metadata.jsonl`."""

import json
import os
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.reader_files import images, lines, qa, write
from vlm.data.readers import read


def read_folder(tmp_path, rows, **options):
    images(tmp_path / "f", "a.png", "b.png", "c.png")
    write(tmp_path / "f" / "metadata.jsonl", rows)
    return read({"format": "image_folder", "path": "f", **options}, base_dir=tmp_path)


def test_image_folder_every_key(tmp_path):
    rows = [
        {"file_name": "a.png", "caption": " One. "},
        {"file_name": "b.png", "captions": ["Two.", {"prompt": "Auf Deutsch?", "caption": "Zwei."}], "license": "MIT"},
        {"file_name": "c.png", "prompt": "Name it.", "caption": "Three."},
        {"file_name": "a.png", "question": "Q1?", "answer": "x", "answers": ["x", "y"]},
        {
            "file_name": "a.png",
            "qa": [{"question": "Q2?", "answers": ["n", "m", "m"]}, {"user": "Q3?", "assistant": "z"}],
        },
    ]
    examples, problems = read_folder(tmp_path, rows)
    assert problems == []
    assert [e.image_id for e in examples] == ["a.png", "b.png", "c.png"]
    a, b, c = examples
    assert [qa(x) for x in a.branches] == [("Describe the image.", "One."), ("Q1?", "x"), ("Q2?", "m"), ("Q3?", "z")]
    assert [x.all_references for x in a.branches] == [("One.",), ("x", "y"), ("n", "m", "m"), ("z",)]
    assert [qa(x) for x in b.branches] == [("Describe the image.", "Two."), ("Auf Deutsch?", "Zwei.")]
    assert [qa(x) for x in c.branches] == [("Name it.", "Three.")]
    assert a.branches[2].where == "f/metadata.jsonl:5 qa[0]"
    assert a.images == (str(tmp_path / "f" / "a.png"),)
    assert a.branches[0].messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "Describe the image."}]


def test_image_folder_prompts(tmp_path):
    rows = [{"file_name": "a.png", "caption": "C", "question": "Q?", "answer": "A"}]
    examples, _ = read_folder(tmp_path, rows, prompt="", question_prompt="{question} Be brief.")
    assert [qa(b) for b in examples[0].branches] == [("", "C"), ("Q? Be brief.", "A")]
    assert examples[0].branches[0].messages[0]["content"] == [{"type": "image"}]


def test_captions_with_one_prompt_are_references_of_each_other(tmp_path):
    captions = ["A.", "B.", {"prompt": "In French?", "caption": "C."}]
    examples, _ = read_folder(tmp_path, [{"file_name": "a.png", "captions": captions}])
    assert [b.all_references for b in examples[0].branches] == [("A.", "B."), ("A.", "B."), ("C.",)]


def test_several_images_and_messages(tmp_path):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": "Two."},
    ]
    plain = [{"role": "user", "content": "Same?"}, {"role": "assistant", "content": "No."}]
    names = ["a.png", "b.png"]
    rows = [{"file_names": names, "messages": chat}, {"file_names": names, "messages": plain}]
    examples, problems = read_folder(tmp_path, rows)
    assert problems == []
    # The images stand in different places, so the two cannot share what comes before their answers.
    assert [len(e.branches) for e in examples] == [1, 1]
    assert examples[0].branches[0].messages[1]["content"][1] == {"type": "text", "text": "and"}
    assert [p["type"] for p in examples[1].branches[0].messages[0]["content"]] == ["image", "image", "text"]


def test_rows_of_text_alone(tmp_path):
    chat = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}]
    rows = [{"file_names": [], "messages": chat}, {"file_names": [], "messages": chat}]
    examples, problems = read_folder(tmp_path, rows)
    assert problems == []
    assert [(example.images, len(example.branches)) for example in examples] == [((), 1), ((), 1)]
    assert examples[0].image_id != examples[1].image_id


def test_limit_counts_images(tmp_path):
    rows = [{"file_name": n, "caption": c} for n, c in [("a.png", "1"), ("b.png", "2"), ("c.png", "3"), ("a.png", "4")]]
    examples, problems = read_folder(tmp_path, rows, limit=2)
    assert [(e.image_id, len(e.branches)) for e in examples] == [("a.png", 2), ("b.png", 1)]
    assert problems == []


ROW_FAULTS = [
    ({"file_name": "a.png", "caption": "  "}, "caption: empty"),
    ({"file_name": "a.png", "caption": {"de": "x"}}, "caption: expected text, found {'de': 'x'}"),
    ({"file_name": "a.png", "caption": ["x"]}, "caption: expected text, found ['x']; a list goes under 'captions'"),
    ({"file_name": "a.png", "captions": []}, "captions: expected a list that is not empty, found []"),
    ({"file_name": "a.png", "captions": "x"}, "captions: expected a list that is not empty, found 'x'"),
    ({"file_name": "a.png", "captoin": "x"}, "captoin: unknown key, did you mean 'caption'?"),
    ({"file_name": "a.png", "words": "x"}, "nothing to answer: none of caption, captions"),
    ({"file_name": "a.png", "caption": None}, "nothing to answer"),
    ({"file_name": "a.png", "question": "Q?"}, "answer: missing: a question needs 'answer' or 'answers'"),
    ({"file_name": "a.png", "question": "Q?", "answer": ""}, "answer: empty"),
    ({"file_name": "a.png", "question": "", "answer": "A"}, "question: empty"),
    ({"file_name": "a.png", "question": "Q?", "answers": ["a", []]}, "answers[1]: expected text, found []"),
    ({"file_name": "a.png", "question": "Q?", "answers": ["", ""]}, "answers: the most common answer is empty"),
    ({"file_name": "no.png", "caption": "x"}, "image: no such image: "),
    ({"caption": "x"}, "file_name: expected the name of an image"),
    ({"file_name": 7, "caption": "x"}, "file_name: expected the name of an image"),
    ({"fil_name": "a.png", "caption": "x"}, "fil_name: unknown key, did you mean 'file_name'?"),
    ("{not json", "not valid JSON: Expecting property name"),
    ("[1]", "expected an object {...}, found [1]"),
    (
        {"file_name": "a.png", "messages": [{"role": "user", "content": "x"}]},
        "messages: the last turn must be an answer",
    ),
    ({"file_name": "a.png", "messages": [{"role": "bot", "content": "x"}]}, "messages[0]: role 'bot' is not one of"),
    (
        {"file_name": "a.png", "messages": [{"by": "user", "content": "x"}]},
        "messages[0]: expected an object with 'role'",
    ),
]


@pytest.mark.parametrize(("row", "fault"), ROW_FAULTS, ids=[fault[:30] for _, fault in ROW_FAULTS])
def test_a_bad_row_is_named_and_the_others_are_kept(tmp_path, row, fault):
    good = {"file_name": "b.png", "caption": "fine"}
    result = read_folder(tmp_path, [good, row, {**good, "file_name": "c.png"}])
    assert len(result.examples) == 2
    assert len(result.problems) == 1
    assert str(result.problems[0]).startswith(f"f/metadata.jsonl:2: {fault}")
    assert result.total == 3


def test_one_bad_answer_leaves_the_rest_of_its_row(tmp_path):
    result = read_folder(tmp_path, [{"file_name": "a.png", "captions": ["x", "", "y"], "qa": [{"question": "Q?"}]}])
    assert lines(result.problems) == [
        "f/metadata.jsonl:1 captions[1]: caption: empty",
        "f/metadata.jsonl:1 qa[0]: answer: missing: a question needs 'answer' or 'answers'",
    ]
    assert [b.answer for b in result.examples[0].branches] == ["x", "y"]
    assert result.total == 4


def test_a_missing_image_loses_all_its_branches(tmp_path):
    result = read_folder(tmp_path, [{"file_name": "no.png", "captions": ["x", "y"]}])
    assert [p.lost for p in result.problems] == [2]
    assert str(tmp_path / "f" / "no.png") in result.problems[0].why


def test_bytes_that_are_not_utf8(tmp_path):
    images(tmp_path, "a.png")
    good = json.dumps({"file_name": "a.png", "caption": "ä"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(
        b"\xef\xbb\xbf" + good.encode() + b"\n\n" + good.encode("latin-1") + b"\n"
    )
    examples, problems = read({"format": "image_folder", "path": "."}, base_dir=tmp_path)
    assert examples[0].branches[0].answer == "ä"
    assert [p.where for p in problems] == ["metadata.jsonl:3"]
    assert "UTF-8" in problems[0].why


text = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=20).filter(lambda t: t.strip())


@given(
    rows=st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(st.tuples(text, text), min_size=1, max_size=3)), min_size=1
    )
)
@settings(max_examples=50, deadline=None)
def test_every_answer_written_is_read(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("round_trip")
    content = [{"file_name": f"{n}.png", "qa": [{"question": q, "answer": a} for q, a in pairs]} for n, pairs in rows]
    examples, problems = read_folder(folder, content)
    assert problems == []
    assert len({e.image_id for e in examples}) == len(examples)
    expected = sorted((f"{n}.png", q.strip(), a.strip()) for n, pairs in rows for q, a in pairs)
    assert sorted((e.image_id, *qa(b)) for e in examples for b in e.branches) == expected


def test_names_as_other_systems_write_them(tmp_path):
    images(tmp_path / "f" / "2024", "a.png", unicodedata.normalize("NFD", "é.png"), "b.PNG")
    rows = [
        {"file_name": name, "caption": name} for name in ("2024\\a.png", unicodedata.normalize("NFC", "2024/é.png"))
    ]
    rows += [{"file_name": name, "caption": name} for name in ("2024/B.png", "x" * 300, "2024/\0.png")]
    examples, problems = read_folder(tmp_path, rows)
    assert [os.path.basename(e.images[0]) for e in examples] == ["a.png", unicodedata.normalize("NFD", "é.png")]
    assert [p.where for p in problems] == [f"f/metadata.jsonl:{line}" for line in (3, 4, 5)]
    assert problems[0].why.endswith("2024/B.png; there is b.PNG, and capitals matter: write the name so")
    assert all(p.why.startswith("no such image: ") for p in problems)


@pytest.mark.parametrize(
    "other",
    [
        "image_idx",
        "img_id",
        "question_ids",
        "conversation_id",
        "prompts",
        "message",
        "filename",
        "caption_1",
        "answer_2",
    ],
)
def test_columns_of_other_people_are_left_alone(tmp_path, other):
    rows = [{"file_name": "a.png", "caption": "x", other: "y"}, {"file_name": "b.png", "promt": "y", "caption": "x"}]
    examples, problems = read_folder(tmp_path, rows)
    assert [e.branches[0].answer for e in examples] == ["x"]
    assert lines(problems) == ["f/metadata.jsonl:2: promt: unknown key, did you mean 'prompt'?"]


def test_web_addresses_and_other_names_of_the_image_column_say_what_to_do(tmp_path):
    write(tmp_path / "metadata.jsonl", [{"file_name": "https://x.y/0.png", "caption": "x"}])
    (problem,) = read({"format": "image_folder", "path": "."}, base_dir=tmp_path).problems
    assert "https://x.y/0.png is an address" in problem.why
    assert problem.why.endswith("download it first")
    write(tmp_path / "metadata.jsonl", [{"picture": "0.png", "caption": "x"}])
    (problem,) = read({"format": "image_folder", "path": "."}, base_dir=tmp_path).problems
    assert str(problem).startswith("metadata.jsonl:1: file_name: expected the name of an image")
    assert str(problem).endswith("found only 'picture', 'caption'")
