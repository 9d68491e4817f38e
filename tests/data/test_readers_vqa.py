"""Readers of VQAv2 questions and annotations."""

import pytest

from tests.data.reader_files import images, qa, write
from vlm.data.readers import SourceError, read


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
    (lambda q, a: q["questions"][2].update(image_id=[7]), "q.json:row 2: image_id: an id is text"),
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
