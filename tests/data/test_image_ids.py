"""Which rows are about the same images, whatever their ids."""

import json

import datasets
import pytest

from tests.data.reader_files import images, png, write
from vlm.data.example import apart
from vlm.data.images import open_image
from vlm.data.readers import read


def levels(examples):
    """What each example shows, by the level of its image, and what is said of it."""
    return [(open_image(e.images[0]).getpixel((0, 0))[0], [branch.answer for branch in e.branches]) for e in examples]


NO_IDS = [None, float("nan"), "", "  "]


@pytest.mark.parametrize("no_id", NO_IDS, ids=repr)
def test_rows_without_an_id_keep_their_images(tmp_path, no_id):
    images(tmp_path, "0.png", "1.png")
    rows = [{"file_name": f"{n}.png", "image_id": no_id, "caption": c} for n, c in [(0, "a"), (1, "b"), (0, "c")]]
    write(tmp_path / "metadata.jsonl", rows)
    examples, problems = read({"format": "image_folder", "path": "."}, base_dir=tmp_path)
    assert problems == []
    assert levels(examples) == [(0, ["a", "c"]), (1, ["b"])]
    assert [e.image_id for e in examples] == ["0.png", "1.png"]


@pytest.mark.parametrize("ids", [(7, 7, 7), (1, "1", 1.0), ("0.png", "1.png", "0.png"), ("1.png", None, "1.png")])
def test_files_that_share_an_id_keep_their_captions(tmp_path, ids):
    images(tmp_path, "0.png", "1.png")
    names = ("0.png", "1.png", "0.png")
    rows = [{"file_name": n, "image_id": i, "caption": c} for n, i, c in zip(names, ids, "abc", strict=True)]
    write(tmp_path / "metadata.jsonl", rows)
    examples, problems = read({"format": "image_folder", "path": "."}, base_dir=tmp_path)
    assert problems == []
    assert levels(examples) == [(0, ["a", "c"]), (1, ["b"])]
    assert len({e.image_id for e in examples}) == 2


def test_the_order_of_the_images_is_part_of_what_they_are(tmp_path):
    images(tmp_path, "0.png", "1.png")
    rows = [{"file_names": n, "image_id": 1, "caption": "x"} for n in (["0.png", "1.png"], ["1.png", "0.png"])]
    write(tmp_path / "metadata.jsonl", rows)
    examples, _ = read({"format": "image_folder", "path": "."}, base_dir=tmp_path)
    assert [[name.split("/")[-1] for name in e.images] for e in examples] == [["0.png", "1.png"], ["1.png", "0.png"]]


def test_a_limit_counts_images_not_ids(tmp_path):
    images(tmp_path, "0.png", "1.png")
    write(tmp_path / "metadata.jsonl", [{"file_name": f"{n}.png", "image_id": 7, "caption": "x"} for n in (0, 1, 0)])
    examples, _ = read({"format": "image_folder", "path": ".", "limit": 1}, base_dir=tmp_path)
    assert [len(e.branches) for e in examples] == [2]


ROWS = {
    "image": [{"bytes": png(n), "path": None} for n in (0, 1, 0, 2, 3)],
    "id": [7, 7, 7, None, None],
    "caption": list("abcde"),
}


def stored(path, streamed: bool):
    features = {"image": datasets.Image(), "id": datasets.Value("int64"), "caption": datasets.Value("string")}
    datasets.Dataset.from_dict(ROWS, features=datasets.Features(features)).to_parquet(path / "train.parquet")
    columns = {"image": "image", "image_id": "id", "caption": "caption"}
    source = {"format": "dataset", "path": "parquet", "data_files": "train.parquet", "columns": columns}
    if not streamed:
        return read(source, base_dir=path)
    from vlm.data.stream_sources import Place, in_pieces

    pieces = in_pieces(source | {"streaming": True}, path, lambda source: [])
    return pieces.examples([(Place(0, n), row) for n, row in enumerate(pieces.rows(0))])


@pytest.mark.parametrize("streamed", [False, True])
def test_stored_images_that_share_an_id_keep_their_captions(tmp_path, streamed):
    examples, problems = stored(tmp_path, streamed)
    assert problems == []
    assert levels(examples) == [(0, ["a", "c"]), (1, ["b"]), (2, ["d"]), (3, ["e"])]
    assert len({e.image_id for e in examples}) == 4


def test_ids_that_are_no_ids_are_named(tmp_path):
    images(tmp_path, "0.png")
    write(tmp_path / "rows.jsonl", [{"image": "0.png", "id": [n], "caption": "x"} for n in range(2)])
    columns = {"image": "image", "image_id": "id", "caption": "caption"}
    source = {"format": "dataset", "path": "json", "data_files": "rows.jsonl", "columns": columns}
    examples, problems = read(source, base_dir=tmp_path)
    assert examples == []
    assert [str(p).rpartition("rows.jsonl:")[2] for p in problems] == [
        f"{n + 1}: id: an id is text or a number, found [{n}]" for n in range(2)
    ]


def test_captions_are_references_of_each_other_and_questions_are_not(tmp_path):
    images(tmp_path, "0.png")
    rows = [
        {"file_name": "0.png", "captions": ["a", "b"]},
        {"file_name": "0.png", "question": "Q?", "answer": "red"},
        {"file_name": "0.png", "question": "Q?", "answer": "blue"},
        {"file_name": "0.png", "question": "Q?", "answers": ["x", "y"], "question_id": 5},
        {"file_name": "0.png", "question": "Q?", "answer": "z", "question_id": 5},
    ]
    write(tmp_path / "metadata.jsonl", rows)
    examples, problems = read({"format": "image_folder", "path": "."}, base_dir=tmp_path)
    assert problems == []
    from vlm.eval import items_of

    items = items_of(examples)
    assert [item.references for item in items] == [["a", "b"], ["red"], ["blue"], ["x", "y", "z"]]
    assert [item.question_id for item in items] == [None, "metadata.jsonl:2", "metadata.jsonl:3", "5"]
    assert json.dumps([item.question_id for item in items])


def test_photos_of_two_folders_with_the_same_names_are_two(tmp_path):
    for folder, names in (("one", ["0.png", "1.png"]), ("two", ["0.png"])):
        images(tmp_path / folder, *names)
        write(tmp_path / folder / "metadata.jsonl", [{"file_name": name, "caption": folder} for name in names])
    sources = [read({"format": "image_folder", "path": name}, base_dir=tmp_path).examples for name in ("one", "two")]
    assert [e.image_id for e in apart(sources)] == ["0.png", "1.png", "0.png (source 1)"]
    assert [e.image_id for e in apart([sources[0], sources[0]])] == ["0.png", "1.png"] * 2
    assert [e.images for e in apart(sources)] == [e.images for source in sources for e in source]
