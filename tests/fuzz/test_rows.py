"""Rows with mistakes, in every format: each is read or named as a problem, and what is read is the text put in."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.data.reader_files import images, write
from tests.fuzz.cases import changed, changed_text, parts, run, told
from tests.tiny import tiny
from vlm.data.check import check
from vlm.data.dataset import TreeCollator, make_items
from vlm.data.readers import ReadResult, read
from vlm.data.stream_sources import Place, in_pieces
from vlm.errors import UserError

NAMES = ("0.png", "1.png", "2.png")
TURNS = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a cat"}]
SHARED = {"path": "rows.jsonl", "images": "."}
FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "folder": (
        {"format": "image_folder", "path": "."},
        {"metadata.jsonl": [{"file_name": name, "caption": f"a cat {name}"} for name in NAMES]},
    ),
    "questions": (
        {"format": "image_folder", "path": "."},
        {"metadata.jsonl": [{"file_name": name, "qa": [{"question": "what?", "answer": "a cat"}]} for name in NAMES]},
    ),
    "messages": (
        {"format": "image_folder", "path": "."},
        {"metadata.jsonl": [{"file_name": name, "messages": TURNS} for name in NAMES]},
    ),
    "llava": (
        {"format": "llava", "path": "rows.json", "images": "."},
        {
            "rows.json": [
                {
                    "id": name,
                    "image": name,
                    "conversations": [
                        {"from": "human", "value": "<image>\nwhat?"},
                        {"from": "gpt", "value": "a cat"},
                    ],
                }
                for name in NAMES
            ]
        },
    ),
    "coco": (
        {"format": "coco_captions", "annotations": "rows.json", "images": "."},
        {
            "rows.json": {
                "images": [{"id": number, "file_name": name} for number, name in enumerate(NAMES)],
                "annotations": [{"id": n, "image_id": n % 3, "caption": f"a cat {n}"} for n in range(5)],
            }
        },
    ),
    "vqa": (
        {"format": "vqav2", "questions": "questions.json", "annotations": "answers.json", "images": "."},
        {
            "questions.json": {
                "questions": [{"image_id": n, "question_id": 10 + n, "question": "what?"} for n in range(3)],
                "data_subtype": "train2014",
            },
            "answers.json": {
                "annotations": [
                    {
                        "question_id": 10 + n,
                        "image_id": n,
                        "multiple_choice_answer": "a cat",
                        "answers": [{"answer": "a cat"}, {"answer": "a dog"}],
                    }
                    for n in range(3)
                ]
            },
        },
    ),
}


def write_files(folder: Path, files: dict[str, Any], draw: random.Random | None) -> str:
    """Write the files of a source, one of them changed; gives the change."""
    chosen = draw.choice(sorted(files)) if draw else None
    change = ""
    for name, content in files.items():
        if draw and name == chosen:
            if draw.randrange(4):
                content, change = changed(content, draw)
                if not draw.randrange(3):
                    content, more = changed(content, draw) if content else (content, "")
                    change += more
            text = _text(name, content)
            if not change:
                text = change = changed_text(text, draw)
            (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        else:
            write(folder / name, content)
    return change


def _text(name: str, content: Any) -> str:
    """As JSON, one line for each row of a .jsonl file; a change may have made it something else."""
    if name.endswith(".jsonl") and isinstance(content, list):
        return "".join(json.dumps(row) + "\n" for row in content)
    return json.dumps(content)


@pytest.fixture(params=FORMATS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    images(tmp_path, *NAMES)
    for number in range(3):
        images(tmp_path, f"COCO_train2014_{number:012}.png")
        (tmp_path / f"COCO_train2014_{number:012}.png").rename(tmp_path / f"COCO_train2014_{number:012}.jpg")
    return request.param, *FORMATS[request.param]


@parts(fast=8, slow=900)
def test_rows(numbers: range, source: tuple[str, dict[str, Any], dict[str, Any]], tmp_path: Path) -> None:
    name, options, files = source
    _, processor = tiny()
    collate = TreeCollator(processor)
    write_files(tmp_path, files, None)
    assert len(read(options, base_dir=tmp_path).examples) == 3

    def case(draw: random.Random) -> int:
        with told(change := write_files(tmp_path, files, draw)):
            try:
                result = read(options, base_dir=tmp_path)
                report = check(options, base_dir=tmp_path)
            except UserError as error:
                said = str(error)
                assert said.strip(), change
                return 0
            assert all(str(problem).strip() for problem in result.problems)
            paths = [path for path in tmp_path.iterdir() if "json" in path.suffix]
            written = "".join(path.read_text("utf-8", "surrogatepass") for path in paths)
            for example in result.examples:
                for branch in example.branches:
                    assert json.dumps(branch.answer)[1:-1] in written or branch.answer in written
            problems: list[Any] = []
            items, _ = make_items(
                result.examples,
                processor,
                max_length=4096,
                too_long="skip",
                report=problems.append,
                progress=lambda examples, total: examples,
            )
            for item in items:
                collate([[item]])
            assert report is not None
        return len(items)

    sound = run(f"rows {name}", numbers, case)
    assert any(sound)


JSON_ROWS = [{"image": name, "id": 2**60 + n, "a": f"a cat {n}, 007"} for n, name in enumerate(NAMES * 3)]
TABLES = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in JSON_ROWS),
    "rows.csv": "image,id,a\n" + "".join(f'{name},{n},"a ""cat"" {n},\n007"\n' for n, name in enumerate(NAMES * 3)),
}


@pytest.mark.parametrize("name", TABLES)
@parts(fast=5, slow=300)
def test_files_say_the_same_whole_and_streamed(numbers: range, name: str, tmp_path: Path) -> None:
    images(tmp_path, *NAMES)
    columns = {"image": "image", "question_id": "id", "caption": "a"}
    builder = name.rpartition(".")[2].removesuffix("l")
    source = {"format": "dataset", "path": builder, "data_files": name, "columns": columns}

    def found(result: ReadResult) -> list[tuple[str, str]]:
        good = [(branch.where, branch.answer) for example in result.examples for branch in example.branches]
        return sorted([*good, *((problem.where, f"{problem.key} {problem.why}") for problem in result.problems)])

    def streamed() -> list[tuple[str, str]]:
        pieces = in_pieces(source | {"streaming": True}, tmp_path, lambda source: [])
        rows = [(Place(0, number), row) for number, row in enumerate(pieces.rows(0))]
        return found(pieces.examples(rows))

    def case(draw: random.Random) -> int:
        content = changed_text(TABLES[name], draw).encode("utf-8", "surrogatepass")
        if not draw.randrange(3):
            at = draw.randrange(len(content) + 1)
            content = content[:at] + bytes([draw.randrange(256)]) + content[at + draw.randrange(3) :]
        (tmp_path / name).write_bytes(content)
        with told(content):
            results = []
            for reading in (lambda: found(read(source, base_dir=tmp_path)), streamed):
                try:
                    results.append(reading())
                except UserError as error:
                    results.append(str(error))
            whole, in_parts = results
            if isinstance(whole, str) and "in another encoding" in whole:  # of a stream, each row is bad
                return 0
            assert whole == in_parts
        return len(whole)

    assert max(run(f"files {name}", numbers, case)) >= len(NAMES * 3)
