"""What `check` counts in data whose faults are known, and when `ProblemLog` stops a run."""

import json
from io import BytesIO, StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from vlm.data.check import IGNORE_INDEX, ProblemLog, TooManyProblems, check, image_problem, render
from vlm.data.example import Example, Problem, question_and_answer
from vlm.data.images import ImageError

SOURCE = {"format": "image_folder", "path": "."}


@pytest.fixture
def folder(tmp_path):
    """Two images with equal bytes, one other, one cut short and one missing."""
    for name, level in (("a", 0), ("twin", 0), ("b", 9)):
        Image.new("RGB", (64, 64), (level, 0, 0)).save(tmp_path / f"{name}.png")
    buffer = BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:1500])
    rows = [
        {"file_name": "a.png", "captions": ["A red square.", "Red."]},
        {"file_name": "twin.png", "caption": "A red square."},
        {"file_name": "b.png", "question": "Colour?", "answer": "black", "answers": ["black", "dark"]},
        {"file_name": "cut.png", "captions": ["x", "y", "z"]},
        {"file_name": "missing.png", "caption": "x"},
        {"file_name": "b.png", "caption": ""},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def letters(example: Example):
    """A tokenizer of one token a letter, four of number 1 for an image; the answer is learned."""
    rows = []
    for branch in example.branches:
        asked = [1] * 4 + [ord(c) for c in branch.question]
        answer = [ord(c) for c in branch.answer]
        rows.append((asked + answer, [IGNORE_INDEX] * len(asked) + answer))
    return rows


def spell(ids):
    return "".join("<image>" if i == 1 else chr(i) for i in ids)


def shown(report) -> str:
    console = Console(width=200, file=StringIO())
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def test_counts(folder):
    report = check(SOURCE, base_dir=folder)
    assert report.images == 3
    assert report.branches == 4
    assert report.duplicate_images == [("metadata.jsonl:1", "metadata.jsonl:2")]
    assert report.duplicate_branches == [("metadata.jsonl:1 captions[0]", "metadata.jsonl:2")]
    assert [(p.where.split(": ")[0], p.lost) for p in report.broken_images] == [
        ("metadata.jsonl:5", 1),
        ("metadata.jsonl:4", 3),
    ]
    assert len(report.problems) == 3
    assert report.lost == 5
    assert (report.answer_words.smallest, report.answer_words.largest, report.answer_words.median) == (1, 3, 2)
    assert report.tokens is None


def test_truncations_are_named(folder):
    length = len("Colour?") + len("black") + 4
    report = check(SOURCE, base_dir=folder, tokenize=letters, decode=spell, max_length=length)
    assert [p.where for p in report.truncated] == [
        "metadata.jsonl:1 captions[0]",
        "metadata.jsonl:1 captions[1]",
        "metadata.jsonl:2",
    ]
    assert report.truncated[1].why == f"{4 + 19 + 4} tokens, {27 - length} more than {length}"
    assert report.tokens.smallest == length
    assert "over 16 tokens" in shown(report)


def test_a_branch_of_which_nothing_is_learned_is_named(folder):
    report = check(
        SOURCE,
        base_dir=folder,
        decode=spell,
        tokenize=lambda e: [(ids, [IGNORE_INDEX] * len(ids)) for ids, _ in letters(e)],
    )
    assert len(report.unsupervised) == report.branches


def test_samples_mark_what_is_learned(folder):
    plain = shown(check(SOURCE, base_dir=folder))
    assert "user: <image> Describe the image.\nassistant: [[A red square.]]" in plain
    assert "user: <image> Colour?\nassistant: [[black]]" in plain
    tokens = shown(check(SOURCE, base_dir=folder, tokenize=letters, decode=spell))
    assert "<image> x 4 Colour?[[black]]" in tokens


def test_three_examples_are_shown(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    rows = [{"file_name": "a.png", "caption": f"c{n}", "image_id": n} for n in range(7)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = []
    report = check(SOURCE, base_dir=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert [s.where for s in report.samples] == ["metadata.jsonl:1", "metadata.jsonl:4", "metadata.jsonl:7"]
    assert report.images == 1
    assert report.duplicate_images == []
    assert seen[-1] == (7, 7)


def test_the_report_names_everything_bad(folder):
    text = shown(check(SOURCE, base_dir=folder))
    for expected in ("metadata.jsonl:6: caption: empty", "missing.png", "cut.png: image: truncated", "5 answers lost"):
        assert expected in text


def test_control_characters_in_data_do_not_reach_the_terminal(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "caption": "x\x1b[2Jy [red]z[/red]"}))
    text = shown(check(SOURCE, base_dir=tmp_path))
    assert "\x1b[2J" not in text
    assert "[[x\\x1b[2Jy [red]z[/red]]]" in text


def test_what_is_long_is_shown_in_part(tmp_path):
    """Whatever is long: a caption, a name, a key, a list, the answers about an image."""
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    long = "x" * 20_000
    rows = [
        {"file_name": "a.png", "captions": [f"{long}{n}" for n in range(25)], "image_id": long},
        {"file_name": f"{long}.png", "caption": "y"},
        {"file_name": "a.png", "caption": [long] * 1000},
        {"file_name": "a.png", "image_id": {long: long}, "caption": "y"},
        {"file_name": "a.png", **{f"{long}{n}": n for n in range(50)}},
        {"file_name": "a.png", "messages": [{"role": long, "content": long}]},
        {"file_name": f"data:image/png,{long}", "caption": "y"},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + f'"{long}"\n')
    report = check(SOURCE, base_dir=tmp_path)
    assert (report.branches, len(report.problems)) == (25, 7)
    text = shown(report)
    assert text.count("xx") > 0
    assert max(map(len, text.replace("\n", "").split("metadata.jsonl:"))) < 1300
    assert len(text) < 20_000
    assert "x ... (20,001 characters)" in text.replace("\n", "")
    assert "and 15 more answers about the same images" in text


def test_what_is_longer_than_learned_positions_is_named(folder):
    report = check(SOURCE, base_dir=folder, tokenize=letters, decode=spell, max_length=40, max_positions=26)
    assert [(problem.where, problem.why) for problem in report.truncated] == [
        ("metadata.jsonl:1 captions[0]", "36 tokens, and the model has 26 positions"),
        ("metadata.jsonl:1 captions[1]", "27 tokens, and the model has 26 positions"),
        ("metadata.jsonl:2", "36 tokens, and the model has 26 positions"),
    ]
    assert "over 40 tokens, or the 26 positions of the model" in shown(report)


def test_arguments_that_do_not_go_together(folder):
    with pytest.raises(ValueError, match="max_length counts tokens"):
        check(SOURCE, base_dir=folder, max_length=3)
    with pytest.raises(ValueError, match="go together"):
        check(SOURCE, base_dir=folder, tokenize=letters)


def problems(count: int) -> list[Problem]:
    return [Problem(f"f:{n}", "caption", "empty") for n in range(count)]


def test_budget():
    log = ProblemLog(total=300)
    log.extend(problems(3))
    assert log.bad == 3
    with pytest.raises(TooManyProblems, match=r"4 of 300 answers \(1\.33%\)(.|\n)*f:0: caption: empty(.|\n)*max_bad"):
        log.add(Problem("f:9", "caption", "empty"))


def test_one_problem_never_stops_unless_none_is_allowed():
    ProblemLog(total=5).extend(problems(1))
    with pytest.raises(TooManyProblems):
        ProblemLog(total=5).extend(problems(2))
    with pytest.raises(TooManyProblems):
        ProblemLog(total=5000, max_bad=0).extend(problems(1))


def test_the_same_place_counts_once():
    log = ProblemLog(total=100)
    for _ in range(50):
        log.extend(problems(1))
    assert log.bad == 1


def test_an_image_counts_with_all_its_branches():
    branches = tuple(question_and_answer("Q?", a) for a in "abc")
    example = Example(("x.png",), branches, "x", "f:1")
    error = ImageError("f:1: x.png", "truncated", "download it again")
    log = ProblemLog(total=100, max_bad=0.5)
    log.add_image(error, example)
    assert (
        log.problems
        == [image_problem(error, example)]
        == [Problem("f:1: x.png", "image", "truncated; download it again", 3)]
    )
    assert (
        log.summary() == "Skipped 3 of 100 answers (3.00%) as bad:\n  f:1: x.png: image: truncated; download it again"
    )


def test_summary_is_short_and_empty_when_all_is_well():
    assert ProblemLog(total=10).summary() == ""
    log = ProblemLog(total=100, max_bad=1)
    log.extend(problems(30))
    assert log.summary().splitlines()[-1] == "  ... and 20 more"


@given(total=st.integers(1, 500), bad=st.integers(0, 500), max_bad=st.floats(0, 1))
def test_budget_is_a_share(total, bad, max_bad):
    log = ProblemLog(total=total, max_bad=max_bad)
    stops = bad > max_bad * total and (bad > 1 or max_bad == 0)
    if stops:
        with pytest.raises(TooManyProblems):
            log.extend(problems(bad))
    else:
        log.extend(problems(bad))
    assert log.bad == bad


@pytest.mark.parametrize("max_bad", [-0.1, 1.5])
def test_max_bad_is_a_share(max_bad):
    with pytest.raises(ValueError, match="share from 0 to 1"):
        ProblemLog(total=1, max_bad=max_bad)
