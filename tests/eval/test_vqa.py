"""VQA accuracy and exact match against values worked out by hand from the official script's rules."""

import pytest

from vlm.eval.vqa import exact_match, normalize_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)]
)
def test_ten_answers(matches: int, accuracy: float) -> None:
    answers = ["cat"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert vqa_accuracy(["cat"], [answers])[0] == pytest.approx(accuracy, abs=1e-12)


def test_a_unanimous_answer_is_compared_as_written() -> None:
    assert vqa_accuracy(["Yes", "yes"], [["yes"] * 10] * 2).tolist() == [0.0, 1.0]
    # one annotator who disagrees, and both sides are normalised: nine matches
    assert vqa_accuracy(["Yes."], [["yes"] * 9 + ["no"]]).tolist() == [1.0]


def test_newlines_and_tabs_are_cleaned_even_then() -> None:
    assert vqa_accuracy(["\tyes\n"], [["yes"] * 10]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The two dogs.", "2 dogs"),
        ("a dog", "dog"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("t-shirt", "t shirt"),  # a mark between letters becomes a space
        ("yes, it is", "yes it is"),  # beside a space it goes
        ("1,000", "1000"),  # between digits too
        ("3.5", "3.5"),
        ("u.s.", "us"),
        ("black/white", "black white"),
        ("10:30", "10:30"),
        ("it's", "it's"),
        ("", ""),
    ],
)
def test_normalisation(answer: str, normalised: str) -> None:
    assert normalize_answer(answer) == normalised


@pytest.mark.parametrize(
    ("prediction", "answers", "accuracy"),
    [
        ("The Cat!", ["cat"], 1.0),
        ("dog", ["cat"], 0.0),
        ("cat", ["cat", "dog"], 0.5),  # one of the two ways to leave one out keeps the match
        ("cat", ["Cat.", "cat"], 1.0),
        ("cat", ["cat", "dog", "cow"], 1 / 3),  # two of three ways keep it, each worth 1 / 2
        ("cat", ["cat", "cat", "cow"], 2 / 3),  # (1/2 + 1/2 + 1) / 3
        ("cat", ["cat"] * 3, 1.0),
        ("cat", ["cat", "a", "b", "c", "d"], 4 / 15),  # four of five ways keep it, each worth 1 / 3
    ],
)
def test_fewer_than_ten_answers(prediction: str, answers: list[str], accuracy: float) -> None:
    assert vqa_accuracy([prediction], [answers])[0] == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "references", "match"),
    [
        (" Yes. ", ["no", "yes"], 1.0),
        ("a  red\nbus", ["A red bus"], 1.0),
        ("the bus", ["bus"], 0.0),
        ("two", ["2"], 0.0),
        ("yes!", ["yes"], 0.0),
        ("", ["yes"], 0.0),
    ],
)
def test_exact_match(prediction: str, references: list[str], match: float) -> None:
    assert exact_match([prediction], [references]).tolist() == [match]
