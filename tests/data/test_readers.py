"""Readers of sources of any format."""

import pytest

from tests.data.reader_files import images, write
from vlm.data.example import Branch, Example
from vlm.data.readers import READERS, SourceError, parse_source, read


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
