"""Each format as its own tools write it, and each fault in it named with file and row."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm.data.example import Branch, Example
from vlm.data.images import open_image
from vlm.data.readers import READERS, SourceError, parse_source, read


def write(path: Path, content) -> None:
    """Text as it is; for `.jsonl` one line a row; anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        content = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def png(level: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for level, name in enumerate(names):
        (folder / name).write_bytes(png(level))


def qa(branch: Branch) -> tuple[str, str]:
    return branch.question, branch.answer


def lines(problems) -> list[str]:
    return [str(problem) for problem in problems]


# ---- image_folder


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


def test_limit_counts_images(tmp_path):
    rows = [{"file_name": n, "caption": c} for n, c in [("a.png", "1"), ("b.png", "2"), ("c.png", "3"), ("a.png", "4")]]
    examples, problems = read_folder(tmp_path, rows, limit=2)
    assert [(e.image_id, len(e.branches)) for e in examples] == [("a.png", 2), ("b.png", 1)]
    assert problems == []


ROW_FAULTS = [
    ({"file_name": "a.png", "caption": "  "}, "caption: empty"),
    ({"file_name": "a.png", "caption": 3}, "caption: expected text, found 3"),
    ({"file_name": "a.png", "caption": ["x"]}, "caption: expected text, found ['x']; a list goes under 'captions'"),
    ({"file_name": "a.png", "captions": []}, "captions: expected a list that is not empty, found []"),
    ({"file_name": "a.png", "captions": "x"}, "captions: expected a list that is not empty, found 'x'"),
    ({"file_name": "a.png", "captoin": "x"}, "captoin: unknown key, did you mean 'caption'?"),
    ({"file_name": "a.png", "text": "x"}, "nothing to answer: none of caption, captions"),
    ({"file_name": "a.png", "caption": None}, "nothing to answer"),
    ({"file_name": "a.png", "question": "Q?"}, "answer: missing: a question needs 'answer' or 'answers'"),
    ({"file_name": "a.png", "question": "Q?", "answer": ""}, "answer: empty"),
    ({"file_name": "a.png", "question": "", "answer": "A"}, "question: empty"),
    ({"file_name": "a.png", "question": "Q?", "answers": ["a", 1]}, "answers[1]: expected text, found 1"),
    ({"file_name": "a.png", "question": "Q?", "answers": ["", ""]}, "answers: the most common answer is empty"),
    ({"file_name": "no.png", "caption": "x"}, "image: no such image: "),
    ({"caption": "x"}, "file_name: expected the name of an image"),
    ({"file_name": 7, "caption": "x"}, "file_name: expected the name of an image"),
    ({"filename": "a.png", "caption": "x"}, "filename: unknown key, did you mean 'file_name'?"),
    ("{not json", "not valid JSON: Expecting property name"),
    ("[1]", "expected an object {...}, found list"),
    (
        {"file_name": "a.png", "messages": [{"role": "user", "content": "x"}]},
        "messages: the last turn must be an answer",
    ),
    ({"file_name": "a.png", "messages": [{"role": "bot", "content": "x"}]}, "messages[0]: role 'bot' is not one of"),
    (
        {"file_name": "a.png", "messages": [{"from": "user", "value": "x"}]},
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


# ---- coco_captions


def read_coco(tmp_path, change=lambda content: None, **options):
    images(tmp_path / "val", "1.jpg", "2.jpg")
    content = {
        "info": {},
        "images": [{"id": 10, "file_name": "1.jpg"}, {"id": 20, "file_name": "2.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 20, "caption": "second"},
            {"id": 2, "image_id": 10, "caption": "first\n"},
            {"id": 3, "image_id": 10, "caption": "also first"},
        ],
    }
    change(content)
    write(tmp_path / "c.json", content)
    return read({"format": "coco_captions", "annotations": "c.json", "images": "val", **options}, base_dir=tmp_path)


def test_coco_captions(tmp_path):
    examples, problems = read_coco(tmp_path, prompt="Caption:")
    assert problems == []
    assert [e.image_id for e in examples] == ["10", "20"]
    assert [qa(b) for b in examples[0].branches] == [("Caption:", "first"), ("Caption:", "also first")]
    assert examples[0].branches[1].where == "c.json:annotations row 2 (id 3)"
    assert examples[0].where == "c.json:images row 0 (id 10)"
    assert [e.image_id for e in read_coco(tmp_path, limit=1).examples] == ["10"]
    assert read_coco(tmp_path, limit=1).problems == []


COCO_FAULTS = [
    (lambda c: c["annotations"][0].update(caption=""), "c.json:annotations row 0 (id 1): caption: empty"),
    (lambda c: c["annotations"][0].pop("caption"), "c.json:annotations row 0 (id 1): caption: missing"),
    (lambda c: c["annotations"].append({"id": 9, "image_id": 5, "caption": "x"}),
     "c.json:annotations row 3 (id 9): image_id: no image has the id 5"),
    (lambda c: c["annotations"].append({"id": 9, "caption": "x"}), "c.json:annotations row 3: image_id: expected"),
    (lambda c: c["images"].append({"id": 30, "file_name": "1.jpg"}), "c.json:images row 2 (id 30): no annotation has"),
    (lambda c: c["images"].append({"id": 20, "file_name": "2.jpg"}), "c.json:images row 2 (id 20): id: two images"),
    (lambda c: c["images"].append({"id": 30}), "c.json:images row 2: file_name: expected an object"),
    (lambda c: c["images"][1].update(file_name="no.jpg"), "c.json:images row 1 (id 20): image: no such image"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "fault"), COCO_FAULTS, ids=[fault for _, fault in COCO_FAULTS])
def test_coco_faults(tmp_path, change, fault):
    examples, problems = read_coco(tmp_path, change)
    assert len(problems) == 1
    assert str(problems[0]).startswith(fault)
    assert len(examples[0].branches) == 2


def test_not_a_captions_file(tmp_path):
    with pytest.raises(SourceError, match=r"c\.json: not COCO captions"):
        read_coco(tmp_path, lambda c: c.pop("images"))


# ---- vqav2


def read_vqa(tmp_path, change=lambda questions, annotations: None, **options):
    images(tmp_path / "i", "COCO_val2014_000000000042.jpg", "42.png", "COCO_val2014_000000000007.jpg")
    ids = [(42, 420), (42, 421), (7, 70)]
    questions = {
        "data_subtype": "val2014",
        "questions": [{"image_id": i, "question_id": q, "question": f"Q{q}?"} for i, q in ids],
    }
    answers = [{"answer": "yes" if n < 7 else "no", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    rows = [{"image_id": i, "question_id": q, "multiple_choice_answer": "yes", "answers": answers} for i, q in ids]
    annotations = {"annotations": rows[::-1]}
    change(questions, annotations)
    write(tmp_path / "q.json", questions)
    write(tmp_path / "a.json", annotations)
    source = {"format": "vqav2", "questions": "q.json", "annotations": "a.json", "images": "i", **options}
    return read(source, base_dir=tmp_path)


def test_vqav2_questions_of_an_image_are_branches_of_one_example(tmp_path):
    examples, problems = read_vqa(tmp_path, question_prompt="{question} Briefly.")
    assert problems == []
    assert [(e.image_id, len(e.branches)) for e in examples] == [("42", 2), ("7", 1)]
    assert qa(examples[0].branches[1]) == ("Q421? Briefly.", "yes")
    assert examples[0].branches[1].references == ("yes",) * 6 + ("no",) * 4
    assert examples[0].images == (str(tmp_path / "i" / "COCO_val2014_000000000042.jpg"),)
    assert examples[0].branches[1].where == "q.json:row 1 (question_id 421)"


def test_vqav2_image_pattern_and_limit(tmp_path):
    examples, problems = read_vqa(tmp_path, image_pattern="{image_id}.png", limit=1)
    assert problems == []
    assert [e.images for e in examples] == [(str(tmp_path / "i" / "42.png"),)]


VQA_FAULTS = [
    (lambda q, a: a["annotations"][0].update(multiple_choice_answer=" "),
     "a.json:row 0 (question_id 70): multiple_choice_answer: empty"),
    (lambda q, a: a["annotations"][0].pop("answers"), "a.json:row 0 (question_id 70): answers: expected a list"),
    (lambda q, a: a["annotations"].pop(0), "q.json:row 2 (question_id 70): question_id: no annotation in a.json"),
    (lambda q, a: q["questions"].pop(2), "a.json:row 0 (question_id 70): question_id: no question in q.json"),
    (lambda q, a: q["questions"][2].update(question=None), "q.json:row 2 (question_id 70): question: missing"),
    (lambda q, a: q["questions"][2].update(image_id="7"), "q.json:row 2: image_id: expected an object"),
    (lambda q, a: a["annotations"][0].update(image_id=42),
     "q.json:row 2 (question_id 70): image_id: 7 here but 42 in a.json:row 0 (question_id 70)"),
    (lambda q, a: q["questions"].append(q["questions"][0]), "q.json:row 3 (question_id 420): question_id: two"),
    (lambda q, a: a["annotations"].append(a["annotations"][2]), "a.json:row 3 (question_id 420): question_id: two"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "fault"), VQA_FAULTS, ids=[fault for _, fault in VQA_FAULTS])
def test_vqav2_faults(tmp_path, change, fault):
    examples, problems = read_vqa(tmp_path, change)
    assert str(problems[0]).startswith(fault)
    assert len(examples[0].branches) == 2


def test_vqav2_missing_image(tmp_path):
    _, problems = read_vqa(tmp_path, image_pattern="{image_id}.png")
    assert str(problems[0]).startswith("q.json:row 2 (question_id 70): image: no such image")
    assert "7.png" in problems[0].why


@pytest.mark.parametrize("pattern", ["{x}.jpg", "same.jpg", "{image_id", "{image_id.real.y}", "{0}.jpg"])
def test_vqav2_bad_pattern(tmp_path, pattern):
    with pytest.raises(SourceError, match="image_pattern"):
        read_vqa(tmp_path, image_pattern=pattern)


def test_vqav2_wrong_files(tmp_path):
    with pytest.raises(SourceError, match=r"q\.json: not a VQAv2 question file"):
        read_vqa(tmp_path, lambda q, a: q.pop("questions"))
    with pytest.raises(SourceError, match=r"a\.json: expected an object with a list under 'annotations'"):
        read_vqa(tmp_path, lambda q, a: a.pop("annotations"))
    with pytest.raises(SourceError, match="has no 'data_subtype'; set image_pattern"):
        read_vqa(tmp_path, lambda q, a: q.pop("data_subtype"))


# ---- llava


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
    ({"image": "a.png", "conversations": turns("Q", "<image>")}, "conversations[1]: an image stands in an answer"),
    (
        {"image": "a.png", "conversations": turns("<image>", "A")[::-1]},
        "conversations[0]: a turn of the user is expected",
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
    assert lines(problems) == ["l.json:row 0: expected an object {...}, found int"]


def test_llava_file_that_is_no_list(tmp_path):
    with pytest.raises(SourceError, match=r"l\.json: not LLaVA JSON: expected a list of rows, found dict"):
        read_llava(tmp_path, {})


# ---- dataset


IMAGE_ROWS = {
    "img": [{"bytes": png(n), "path": None} for n in range(3)] + [None],
    "imgs": [[{"bytes": png(i), "path": None} for i in range(n)] for n in (1, 0, 2)] + [None],
    "group": ["x", "y", "x", "z"],
    "text": ["t0", "t1", "t2", "t3"],
    "texts": [[{"user": f"q{n}", "assistant": f"a{n}"}] for n in range(4)],
}
FEATURES = datasets.Features(
    {
        "img": datasets.Image(),
        "imgs": datasets.List(datasets.Image()),
        "group": datasets.Value("string"),
        "text": datasets.Value("string"),
        "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
    }
)


@pytest.fixture
def stored(tmp_path):
    dataset = datasets.Dataset.from_dict(IMAGE_ROWS, features=FEATURES)
    dataset.to_parquet(tmp_path / "p" / "train.parquet")
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "many")
    return tmp_path


def level(source) -> int:
    return open_image(source).getpixel((0, 0))[0]


@pytest.mark.parametrize(
    "where", [{"path": "p"}, {"path": "parquet", "data_files": "p/*.parquet"}, {"path": "one"}, {"path": "many"}]
)
def test_dataset_from_anywhere(stored, where):
    source = {"format": "dataset", **where, "columns": {"image": "img", "caption": "text"}}
    examples, problems = read(source, base_dir=stored)
    assert [level(e.images[0]) for e in examples] == [0, 1, 2]
    assert [e.branches[0].answer for e in examples] == ["t0", "t1", "t2"]
    assert len(problems) == 1
    assert str(problems[0]).endswith("[train]:row 3: image: no image in column 'img'")
    assert len(read({**source, "limit": 2}, base_dir=stored).examples) == 2


def test_dataset_split(stored):
    source = {"format": "dataset", "path": "many", "split": "test", "columns": {"image": "img", "caption": "text"}}
    assert [e.branches[0].answer for e in read(source, base_dir=stored).examples] == ["t1"]
    with pytest.raises(SourceError, match="split 'tset'"):
        read({**source, "split": "tset"}, base_dir=stored)
    with pytest.raises(SourceError, match="leave out 'split'"):
        read({**source, "path": "one"}, base_dir=stored)


def test_dataset_lists_of_images(stored):
    source = {"format": "dataset", "path": "one", "columns": {"images": "imgs", "qa": "texts"}}
    examples, problems = read(source, base_dir=stored)
    assert [[level(i) for i in e.images] for e in examples] == [[0], [], [0, 1]]
    assert [qa(e.branches[0]) for e in examples] == [("q0", "a0"), ("q1", "a1"), ("q2", "a2")]
    assert lines(problems) == ["one[train]:row 3: image: no image in column 'imgs'"]


def test_dataset_rows_of_one_image_are_branches(stored):
    columns = {"image": "img", "caption": "text", "image_id": "group"}
    examples, _ = read({"format": "dataset", "path": "one", "columns": columns}, base_dir=stored)
    assert [(e.image_id, [b.answer for b in e.branches]) for e in examples] == [("x", ["t0", "t2"]), ("y", ["t1"])]
    limited, _ = read({"format": "dataset", "path": "one", "columns": columns, "limit": 1}, base_dir=stored)
    assert [(e.image_id, len(e.branches)) for e in limited] == [("x", 2)]


def test_dataset_of_paths(tmp_path):
    images(tmp_path / "i", "a.png")
    write(tmp_path / "r.jsonl", [{"f": "a.png", "c": "x"}, {"f": "b.png", "c": "y"}, {"f": None, "c": "z"}])
    columns = {"image": "f", "caption": "c"}
    source = {"format": "dataset", "path": "json", "data_files": "r.jsonl", "columns": columns, "images": "i"}
    examples, problems = read(source, base_dir=tmp_path)
    assert [e.images for e in examples] == [(str(tmp_path / "i" / "a.png"),)]
    assert lines(problems) == [
        f"r.jsonl[train]:row 1: image: no such image: {tmp_path / 'i' / 'b.png'}",
        "r.jsonl[train]:row 2: image: no image in column 'f'",
    ]


def test_webdataset_shards(tmp_path):
    with tarfile.open(tmp_path / "s-0.tar", "w") as shard:
        for n in range(3):
            for suffix, data in (("png", png(n)), ("txt", f"caption {n}".encode())):
                member = tarfile.TarInfo(f"{n:04d}.{suffix}")
                member.size = len(data)
                shard.addfile(member, BytesIO(data))
    columns = {"image": "png", "caption": "txt"}
    source = {"format": "dataset", "path": "webdataset", "data_files": "s-*.tar", "columns": columns}
    examples, problems = read(source, base_dir=tmp_path)
    assert problems == []
    assert [(level(e.images[0]), e.branches[0].answer) for e in examples] == [(n, f"caption {n}") for n in range(3)]


def test_reading_decodes_no_image(stored, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", fail)
    monkeypatch.setattr(Image, "open", fail)
    for columns in ({"image": "img", "caption": "text"}, {"images": "imgs", "qa": "texts"}):
        read({"format": "dataset", "path": "one", "columns": columns}, base_dir=stored)


def test_dataset_bad_columns(stored):
    with pytest.raises(SourceError, match=r"'columns\.caption': no column 'txt' in one; did you mean 'text'\?"):
        read({"format": "dataset", "path": "one", "columns": {"image": "img", "caption": "txt"}}, base_dir=stored)
    with pytest.raises(SourceError, match=r"column 'texts' holds .*, not images"):
        read({"format": "dataset", "path": "one", "columns": {"image": "texts", "caption": "text"}}, base_dir=stored)


def test_dataset_that_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=f"tried {tmp_path / 'empty'}"):
        read({"format": "dataset", "path": "empty", "columns": {"caption": "c"}}, base_dir=tmp_path)


# ---- sources


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "needs a 'format': one of image_folder, coco_captions"),
        ({"format": "lava"}, "unknown format 'lava'; did you mean 'llava'?"),
        ({"format": "llava"}, "option 'path' is missing"),
        ({"format": "llava", "path": "x", "image": "y"}, "unknown option 'image'; did you mean 'images'?"),
        ({"format": "llava", "path": "x", "limit": 0}, "option 'limit': Input should be greater than 0"),
        ({"format": "dataset", "path": "x", "columns": {"captoin": "y"}}, "'columns.captoin'; did you mean 'caption'"),
        ({"format": "dataset", "path": "x", "columns": {"image": "y"}}, "option 'columns': give one of caption"),
        ({"format": "dataset", "path": "x", "columns": {"question": "y"}}, "'question' needs 'answer' or 'answers'"),
        ({"format": "dataset", "path": "x", "columns": {"image": "a", "images": "b", "caption": "c"}}, "give either"),
        ("photos", "a data source is a mapping"),
    ],
)  # fmt: skip
def test_wrong_options(source, message):
    with pytest.raises(SourceError) as caught:
        parse_source(source)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        {"format": "image_folder", "path": "no"},
        {"format": "coco_captions", "annotations": "no", "images": "."},
        {"format": "vqav2", "questions": "no", "annotations": "x", "images": "x"},
        {"format": "llava", "path": "no"},
    ],
)
def test_missing_files_name_the_path_tried(tmp_path, source):
    with pytest.raises(SourceError, match=f"no such (file|folder): {tmp_path}/no"):
        read(source, base_dir=tmp_path)


def test_broken_json_names_line_and_column(tmp_path):
    write(tmp_path / "l.json", '[\n{"id": }]')
    with pytest.raises(SourceError, match=r"l\.json: not valid JSON: .* at line 2, column 8"):
        read({"format": "llava", "path": "l.json"}, base_dir=tmp_path)


def test_an_empty_source_is_refused(tmp_path):
    write(tmp_path / "l.json", [])
    with pytest.raises(SourceError, match=r"l\.json: there is not a single row in it"):
        read({"format": "llava", "path": "l.json"}, base_dir=tmp_path)


def test_absolute_paths_need_no_base(tmp_path):
    images(tmp_path, "a.png")
    write(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "caption": "x"}])
    assert len(read({"format": "image_folder", "path": str(tmp_path)}, base_dir="elsewhere").examples) == 1


def test_every_reader_knows_its_name():
    assert {name: source.format_name for name, source in READERS.items()} == {name: name for name in READERS}


def test_an_example_is_checked():
    user = {"role": "user", "content": [{"type": "image"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "x"}]}
    with pytest.raises(ValueError, match="must end with an assistant message"):
        Branch((user,))
    with pytest.raises(ValueError, match=r"f:1: 1 image part\(s\) in the messages but 0 image\(s\)"):
        Example((), (Branch((user, answer)),), "id", "f:1")
    with pytest.raises(ValueError, match="at least one branch"):
        Example((), (), "id", "f:1")
