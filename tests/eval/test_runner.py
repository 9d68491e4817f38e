"""The runner from examples to files, with small painted images and predictors that look at them."""

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.data.example import Branch, Example, Message
from vlm.eval import Processes, evaluate, items_of
from vlm.eval.runner import Request, derangement

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "brown", "pink", "white", "black", "gray"]


def user(text: str, *, image: bool = True) -> Message:
    parts: list[dict[str, str]] = [{"type": "image"}] if image else []
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def example(colour: str, *, captions: int = 1, broken: bool = False) -> Example:
    branches = tuple(
        Branch((user("Describe."), assistant(f"a {colour} square" if i == 0 else f"square number {i} in {colour}")))
        for i in range(captions)
    )
    image = b"not an image" if broken else Image.new("RGB", (24, 16), colour)
    return Example((image,), branches, image_id=colour, where=f"metadata.jsonl:{colour}")


NAME_OF = {Image.new("RGB", (1, 1), colour).getpixel((0, 0)): colour for colour in COLOURS}


def seeing(requests: list[Request]) -> list[str]:
    return [f"a {NAME_OF[images[0].getpixel((0, 0))]} square" for images, _ in requests]


def constant(requests: list[Request]) -> list[str]:
    return ["a red square"] * len(requests)


def test_captions_of_one_image_are_one_item_with_all_references() -> None:
    items = items_of([example("red", captions=5), example("blue")])
    assert [(item.image_id, len(item.references)) for item in items] == [("red", 5), ("blue", 1)]
    assert items[0].messages == [user("Describe.")]


def test_earlier_turns_and_other_prompts_stay_apart() -> None:
    first = (user("What is it?"), assistant("a cat"))
    branches = (
        Branch((*first, user("Colour?", image=False), assistant("black")), where="a:2"),
        Branch(first, references=("cat", "kitten"), where="a:1"),
    )
    items = items_of([Example((Image.new("RGB", (4, 4)),), branches, image_id="1", where="a")])
    assert items[0].messages == [*first, user("Colour?", image=False)]
    assert items[0].references == ["black"]
    assert (items[1].references, items[1].where) == (["cat", "kitten"], "a:1")


def test_a_model_that_looks_beats_its_blind_self(tmp_path: Path) -> None:
    examples = [example(colour) for colour in COLOURS]
    summary = evaluate(examples, seeing, ["exact_match", "cider_d", "bleu_4"], output_dir=tmp_path)
    found = summary["metrics"]["exact_match"]
    assert (found["score"], found["interval"]) == (1.0, [1.0, 1.0])
    assert (found["blind_score"], found["blind_interval"]) == (0.0, [0.0, 0.0])
    assert all(summary["metrics"][name]["sees"] is True for name in ("exact_match", "cider_d"))
    assert (summary["n_items"], summary["n_images"], summary["n_broken"]) == (12, 12, 0)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary

    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in rows] == COLOURS
    assert rows[0]["prediction"] == "a red square"
    assert rows[0]["references"] == ["a red square"]
    assert rows[0]["prompt"] == "Describe."
    assert rows[0]["where"] == "metadata.jsonl:red"
    assert rows[0]["scores"]["exact_match"] == 1.0
    for row in rows:  # the blind model was shown just the image that the row names, and never its own
        assert row["blind_image_id"] != row["image_id"]
        assert row["blind_prediction"] == f"a {row['blind_image_id']} square"
    assert sorted(row["blind_image_id"] for row in rows) == sorted(COLOURS)
    assert "<article" in (tmp_path / "samples.html").read_text()


def test_a_model_that_does_not_look_is_found_out(tmp_path: Path) -> None:
    summary = evaluate([example(colour) for colour in COLOURS], constant, ["rouge_l"], output_dir=tmp_path)
    found = summary["metrics"]["rouge_l"]
    assert found["score"] == found["blind_score"] > 0
    assert found["sees"] is False


def test_same_seed_same_files(tmp_path: Path) -> None:
    examples = [example(colour, captions=3) for colour in COLOURS]
    for name in ("a", "b"):
        evaluate(examples, seeing, ["cider_d"], output_dir=tmp_path / name, seed=5, num_samples=4)
    for file in ("predictions.jsonl", "summary.json", "samples.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a" / "samples.html").read_text().count("<article") == 4


def test_requests_come_in_chunks_with_one_images_questions_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [
        Example(
            (Image.new("RGB", (4, 4), colour),),
            tuple(Branch((user(f"Question {i}"), assistant(colour))) for i in range(10)),
            image_id=colour,
            where=colour,
        )
        for colour in COLOURS
    ]
    calls: list[list[Request]] = []

    def predict(requests: list[Request]) -> list[str]:
        calls.append(requests)
        return ["red"] * len(requests)

    monkeypatch.setattr("vlm.data.images.CHUNK", 5)
    evaluate(examples, predict, ["exact_match"], output_dir=tmp_path, bootstrap=0)
    assert [len(call) for call in calls] == [100, 100, 40]  # each of 5 images has its questions, and 10 asked blind
    colours = [NAME_OF[images[0].getpixel((0, 0))] for call in calls for images, _ in call]
    assert colours == [colour for colour in COLOURS for _ in range(20)]
    for call, images in zip(calls, (5, 5, 2), strict=True):  # opened once for its questions, not once for each
        assert len({id(images[0]) for images, _ in call}) == images


def test_broken_images_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    examples = [example("red"), example("green", captions=2, broken=True), example("blue")]
    with caplog.at_level(logging.WARNING):
        summary = evaluate(examples, seeing, ["exact_match"], output_dir=tmp_path)
    assert (summary["n_items"], summary["n_broken"]) == (2, 1)
    assert summary["broken_images"][0]["image_id"] == "green"
    assert summary["broken_images"][0]["where"] == "metadata.jsonl:green"
    assert summary["broken_images"][0]["why"]
    assert "1 of 3 examples left out" in caplog.text
    assert "1 left out" in (tmp_path / "samples.html").read_text()
    with pytest.raises(ValueError, match="all 1 images are broken"):
        evaluate([example("red", broken=True)], seeing, ["exact_match"], output_dir=tmp_path)


@pytest.mark.parametrize(("number", "blind", "reason"), [(1, True, "only one image"), (3, False, "not asked for")])
def test_why_the_blind_score_is_missing(tmp_path: Path, number: int, blind: bool, reason: str) -> None:
    examples = [example(colour) for colour in COLOURS[:number]]
    summary = evaluate(examples, seeing, ["exact_match"], output_dir=tmp_path, blind=blind)
    assert reason in summary["blind_missing"]
    assert summary["metrics"]["exact_match"]["blind_score"] is None
    assert summary["metrics"]["exact_match"]["sees"] is None
    assert "blind_prediction" not in (tmp_path / "predictions.jsonl").read_text()


def test_examples_of_several_images_are_swapped_among_themselves(tmp_path: Path) -> None:
    def several(*colours: str) -> Example:
        parts = [*[{"type": "image"}] * len(colours), {"type": "text", "text": "Describe."}]
        branch = Branch(({"role": "user", "content": parts}, assistant(f"a {' and '.join(colours)} square")))
        pictures = tuple(Image.new("RGB", (24, 16), colour) for colour in colours)
        return Example(pictures, (branch,), image_id=" ".join(colours), where="here")

    asked: list[int] = []

    def all_seeing(requests: list[Request]) -> list[str]:
        asked.extend(len(images) for images, _ in requests)
        seen = [[NAME_OF[image.getpixel((0, 0))] for image in images] for images, _ in requests]
        return [f"a {' and '.join(colours)} square" for colours in seen]

    examples = [*map(several, COLOURS[:4]), several("red", "blue"), several("pink", "gray"), several()]
    summary = evaluate(examples, all_seeing, ["exact_match"], output_dir=tmp_path)
    assert sorted(asked) == sorted(2 * [1, 1, 1, 1, 2, 2, 0])
    assert summary["metrics"]["exact_match"]["score"] == 1
    assert summary["metrics"]["exact_match"]["blind_score"] == pytest.approx(1 / 7), "the one without images"
    summary = evaluate([*examples[:-2], several()], all_seeing, ["exact_match"], output_dir=tmp_path)
    assert summary["blind_missing"] == "only one example has 2 images: there is no other to show instead"
    summary = evaluate([several()], all_seeing, ["exact_match"], output_dir=tmp_path)
    assert summary["blind_missing"] == "the examples have no images"


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    def evaluate_(predict: Any = seeing, examples: Any = (example("red"),), metrics: Any = ("exact_match",)) -> None:
        evaluate(examples, predict, metrics, output_dir=tmp_path)

    with pytest.raises(ValueError, match="Did you mean 'exact_match'"):
        evaluate_(metrics=["exact_mach"])
    with pytest.raises(ValueError, match="No metric"):
        evaluate_(metrics=[])
    with pytest.raises(ValueError, match="no examples"):
        evaluate_(examples=[])
    with pytest.raises(ValueError, match="0 texts for 1 requests"):
        evaluate_(predict=lambda requests: [])


@pytest.mark.parametrize("number", [2, 3, 7, 100])
def test_derangement(number: int) -> None:
    ids = [str(i) for i in range(number)]
    for seed in range(5):
        other = derangement(ids, seed)
        assert sorted(other) == sorted(other.values()) == sorted(ids)
        assert all(a != b for a, b in other.items())


@pytest.mark.parametrize("count", [2, 5])
def test_several_processes_ask_each_item_once_and_have_the_scores_of_one(tmp_path: Path, count: int) -> None:
    """Here they are threads, which wait for each other as processes do."""
    examples = [example(colour, captions=2, broken=colour == "green") for colour in COLOURS]
    alone = evaluate(examples, seeing, ["exact_match", "cider_d"], output_dir=tmp_path / "alone")
    lists: list[list[Any]] = [[] for _ in range(count)]
    everyone = threading.Barrier(count, timeout=60)
    asked: list[Request] = []

    def predict(requests: list[Request]) -> list[str]:
        asked.extend(requests)
        return seeing(requests)

    def process(index: int) -> dict[str, Any]:
        def gather(mine: list[Any]) -> list[Any]:
            lists[index] = mine
            everyone.wait()
            found = [value for some in lists for value in some]
            everyone.wait()
            return found

        folder = tmp_path / str(index)
        processes = Processes(index, count, gather)
        return evaluate(examples, predict, ["exact_match", "cider_d"], output_dir=folder, processes=processes)

    with ThreadPoolExecutor(count) as threads:
        summaries = list(threads.map(process, range(count)))
    assert summaries == [alone] * count
    assert len(asked) == 2 * alone["n_items"] == 22, "seeing and blind"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["0", "alone"], "the first one writes"
    written = [(tmp_path / folder / "predictions.jsonl").read_text() for folder in ("0", "alone")]
    assert written[0] == written[1]


def test_questions_of_the_same_words_are_scored_one_by_one(tmp_path: Path) -> None:
    """Two question ids about one image, as in VQAv2: each against its own ten answers, seeing and blind."""

    def asked(colour: str, *answers: tuple[str, list[str]]) -> Example:
        branches = tuple(
            Branch((user("What colour?"), assistant(refs[0])), tuple(refs), f"q.json:{number}", number)
            for number, refs in answers
        )
        return Example((Image.new("RGB", (24, 16), colour),), branches, image_id=colour, where="q.json")

    examples = [asked("red", ("1", ["red"] * 10), ("2", ["blue"] * 10)), asked("blue", ("3", ["blue"] * 10))]

    def colour_of(requests: list[Request]) -> list[str]:
        return [NAME_OF[images[0].getpixel((0, 0))] for images, _ in requests]

    metrics = ["vqa_accuracy", "exact_match"]
    summary = evaluate(examples, colour_of, metrics, output_dir=tmp_path, bootstrap=10)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == ["1", "2", "3"]
    assert [len(row["references"]) for row in rows] == [10, 10, 10]
    for name in metrics:
        found = summary["metrics"][name]
        assert (found["n_items"], found["n_images"]) == (3, 2)
        assert (found["score"], found["blind_score"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_a_prompt_that_cannot_be_asked_is_left_out_and_named(tmp_path: Path) -> None:
    """The scores are those without it; another prompt about the same image stays."""
    long = Branch((user("Describe at length."), assistant("a red square")), where="metadata.jsonl:red.2")
    red = example("red")
    both = Example(red.images, (*red.branches, long), image_id="red", where=red.where)
    asked: list[str] = []

    def why(request: Request) -> str:
        asked.append(request[1][0]["content"][-1]["text"])
        return "too long" if "length" in asked[-1] else ""

    others = [example("blue"), example("green")]
    options: dict[str, Any] = {"metrics": ["exact_match"], "bootstrap": 0}
    summary = evaluate([both, *others], seeing, output_dir=tmp_path / "a", check_prompt=why, **options)
    wanted = evaluate([red, *others], seeing, output_dir=tmp_path / "b", **options)
    assert summary["metrics"] == wanted["metrics"]
    assert summary["n_broken"] == 1
    assert summary["broken_images"] == [{"image_id": "red", "where": "metadata.jsonl:red.2", "why": "too long"}]
    with pytest.raises(ValueError, match="no prompt can be asked, the first: no"):
        evaluate(others, seeing, output_dir=tmp_path / "c", check_prompt=lambda request: "no", **options)


def test_a_prompt_may_be_too_long_with_the_images_of_another_example_alone(tmp_path: Path) -> None:
    """Images take different numbers of tokens. Such an item has no blind answer, and is left out of both scores."""
    answered: list[str] = []

    def asked(requests: list[Request]) -> list[str]:
        answered.extend(seeing(requests))
        return seeing(requests)

    def why(request: Request) -> str:
        return "too long" if NAME_OF[request[0][0].getpixel((0, 0))] == "green" else ""

    examples = [example(colour) for colour in ("red", "blue", "green")]
    summary = evaluate(examples, asked, ["exact_match"], output_dir=tmp_path, bootstrap=0, check_prompt=why)
    left_out = {row["image_id"]: row["why"] for row in summary["broken_images"]}
    assert left_out.pop("green") == "too long"
    assert [*left_out.values()] == ["with the images of another example, too long"]
    assert len(answered) == 2, "one item, sighted and blind"
    assert "a green square" not in answered
    assert (summary["n_items"], summary["n_broken"]) == (1, 2)
    assert (summary["metrics"]["exact_match"]["score"], summary["metrics"]["exact_match"]["blind_score"]) == (1, 0)
