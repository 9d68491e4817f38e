"""Rows cannot name files outside the folders of their data, unless the source allows it."""

import os
from pathlib import Path

import pytest

from tests.data.reader_files import images, lines, write
from vlm.data.inside import Inside
from vlm.data.readers import read
from vlm.errors import UserError
from vlm.recognition.labelled_images import read_labelled_images

ASKED = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a cat"}]


def image_folder(data: Path, names: list[str]) -> dict:
    write(data / "metadata.jsonl", [{"file_name": name, "caption": "a cat"} for name in names])
    return {"format": "image_folder", "path": "data"}


def coco(data: Path, names: list[str]) -> dict:
    entries = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    captions = [{"id": n, "image_id": n, "caption": "a cat"} for n in range(len(names))]
    write(data / "captions.json", {"images": entries, "annotations": captions})
    return {"format": "coco_captions", "annotations": "data/captions.json", "images": "data"}


def llava(data: Path, names: list[str]) -> dict:
    write(data / "chat.json", [{"image": name, "conversations": ASKED} for name in names])
    return {"format": "llava", "path": "data/chat.json"}


def dataset(data: Path, names: list[str]) -> dict:
    write(data / "rows.jsonl", [{"picture": name, "text": "a cat"} for name in names])
    columns = {"image": "picture", "caption": "text"}
    return {"format": "dataset", "path": "json", "data_files": "data/rows.jsonl", "images": "data", "columns": columns}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with an image, links to one in it and to one outside, and a folder that is a link."""
    images(tmp_path / "data", "a.png")
    images(tmp_path / "private", "b.png")
    (tmp_path / "data" / "deep").mkdir()
    (tmp_path / "data" / "good.png").symlink_to("a.png")
    (tmp_path / "data" / "bad.png").symlink_to("../private/b.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "private")
    return tmp_path / "data"


@pytest.mark.parametrize("make", [image_folder, coco, llava, dataset])
def test_a_row_that_leads_outside_is_bad(make, data: Path, tmp_path: Path) -> None:
    good = ["a.png", "good.png", "deep/../a.png", str(data / "a.png")]
    bad = ["../private/b.png", str(tmp_path / "private/b.png"), "bad.png", "linked/b.png", "deep/../../private/b.png"]
    source = make(data, good + bad)
    examples, problems = read(source, base_dir=tmp_path)
    assert sum(len(example.branches) for example in examples) == len(good)
    assert {os.path.realpath(image) for example in examples for image in example.images} == {str(data / "a.png")}
    assert len(problems) == len(bad)
    for problem, name in zip(lines(problems), bad, strict=True):
        assert f"{data / name} is outside {data}" in problem
        assert problem.endswith("set allow_outside: true in its source")
    examples, problems = read(source | {"allow_outside": True}, base_dir=tmp_path)
    assert not problems
    assert sum(len(example.branches) for example in examples) == len(good + bad)


def test_labelled_images_stay_inside_too(data: Path) -> None:
    rows = [("a.png", "cat"), ("good.png", "dog"), ("../private/b.png", "dog"), ("bad.png", "cat")]
    write(data / "metadata.jsonl", [{"file_name": name, "label": label} for name, label in rows])
    found = read_labelled_images(str(data))
    assert list(found.images) == [str(data / "a.png"), str(data / "good.png")]
    assert [problem.why for problem in found.problems] == [f"{name} is outside {data}" for name, _ in rows[2:]]


def test_the_folder_of_the_data_may_be_a_link_itself(data: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(data)
    image_folder(data, ["a.png"])
    examples, problems = read({"format": "image_folder", "path": "link"}, base_dir=tmp_path)
    assert len(examples) == 1
    assert not problems


@pytest.mark.parametrize("name", ["..", ".", "", "../data-other/a.png", "a/../../b.png"])
def test_names_that_only_look_inside(name: str, tmp_path: Path) -> None:
    assert not Inside([tmp_path / "data"]).holds(tmp_path / "data" / "x" / ".." / ".." / "data-other" / name)
    assert Inside([tmp_path / "data", tmp_path]).holds(tmp_path / "other" / "a.png")


def test_names_as_web_addresses_have_them(tmp_path: Path) -> None:
    images(tmp_path / "data", "my photo.png", "100%20.png")
    source = image_folder(tmp_path / "data", ["my%20photo.png", "100%20.png"])
    examples, problems = read(source, base_dir=tmp_path)
    assert not problems
    assert [Path(example.images[0]).name for example in examples] == ["my photo.png", "100%20.png"]


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'allow_outside'"):
        read({"format": "image_folder", "path": "x", "allow_outsid": True})
