"""Folders as captioning data sets and their tools lay them out: read, or named with what to write."""

import gzip
import json
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.data.reader_files import images, lines, write
from vlm.data.images import ImageError, open_image
from vlm.data.readers import SourceError, read
from vlm.data.stream_sources import in_pieces
from vlm.errors import UserError
from vlm.recipe import parse_data


def read_folder(folder, /, **options):
    return read({"format": "image_folder", "path": ".", **options}, base_dir=folder)


def answers(examples):
    return [branch.answer for example in examples for branch in example.branches]


def test_text_files_next_to_images_are_captions(tmp_path):
    images(tmp_path, "a b.JPG", "b.png", "c.png", "d.png", "e.png")
    images(tmp_path / "10_cats", "é.webp")
    images(tmp_path / "__MACOSX", "x.png")
    (tmp_path / "a b.txt").write_text("\ufeffa photo of a cat,\n indoors \n", encoding="utf-8")
    (tmp_path / "b.caption").write_text("a dog", encoding="utf-16")
    (tmp_path / "d.txt").write_text("0 0.51 0.5 0.25 1\n16 0.1 0.2 0.3 0.4\n")
    (tmp_path / "e.txt").write_text(" \n")
    (tmp_path / "f.txt").write_text("of no image")
    (tmp_path / "10_cats/é.txt").write_text("two cats")
    (tmp_path / "__MACOSX/x.txt").write_text("hidden")
    (tmp_path / "README.txt").write_text("about it")
    examples, problems = read_folder(tmp_path)
    assert sorted(answers(examples)) == ["a dog", "a photo of a cat,\n indoors", "two cats"]
    assert sorted(lines(problems)) == [
        "c.png: caption: there is no c.txt next to it",
        "d.txt: caption: these are numbers, as of boxes in YOLO's format, and no caption",
        "e.txt: caption: empty",
        "f.txt: image: there is no image called f next to it",
    ]
    limited, _ = read_folder(tmp_path, limit=1)
    assert len(limited) == 1
    images(tmp_path / "splits/train", "a.png")
    images(tmp_path / "splits/val", "b.png")
    (tmp_path / "splits/train/a.txt").write_text("a")
    with pytest.raises(SourceError, match=r"has the folders train and val; set path to .*splits/train"):
        read_folder(tmp_path, path="splits")


@pytest.mark.parametrize("name", ["captions.txt", "captions.tsv", "captions.jsonl"])
def test_metadata_of_any_name_says_the_image_by_other_names(tmp_path, name):
    images(tmp_path / "Images", "a.jpg", "b.jpg")
    rows = [("a.jpg", "A child, running ."), ("a.jpg", "A girl ."), ("b.jpg", "A dog .")]
    if name.endswith(".jsonl"):
        write(tmp_path / name, [{"image": image, "caption": caption} for image, caption in rows])
    else:
        separator = "\t" if name.endswith(".tsv") else ","
        written = [separator.join((image, f'"{caption}"')) for image, caption in [("image", "caption"), *rows]]
        (tmp_path / name).write_text("\n".join(written))
    examples, problems = read_folder(tmp_path, path="Images", metadata=f"../{name}")
    assert problems == []
    assert [answers([example]) for example in examples] == [["A child, running .", "A girl ."], ["A dog ."]]


def advised(folder):
    """The source that the message about a folder says to write."""
    with pytest.raises(SourceError) as raised:
        read_folder(folder)
    text = str(raised.value)
    if ": set path: " in text:
        path, metadata = text.partition(": set path: ")[2].split(" and metadata: ")
        return {"format": "image_folder", "path": path, "metadata": metadata}
    if "as captions, read " in text:
        path, columns = text.partition("as captions, read ")[2].split(" with format: dataset and columns: ")
        return {"format": "dataset", "path": path, "columns": yaml.safe_load(columns)}
    return yaml.safe_load("{" + text.partition(": read it with ")[2].replace(" and path:", ", path:") + "}")


def test_a_folder_is_told_by_its_layout(tmp_path):
    for name in ("flickr8k/Images", "flickr30k/flickr30k_images", "parquet/images", "odd"):
        images(tmp_path / name, "a.jpg", "b.jpg")
    (tmp_path / "flickr8k/captions.txt").write_text("image,caption\na.jpg,one\nb.jpg,two\n")
    (tmp_path / "flickr30k/results.csv").write_text(
        "image_name| comment_number| comment\na.jpg| 0| one\nb.jpg| 0| two\n"
    )
    (tmp_path / "odd/labels.csv").write_text("image;text\na.jpg;one\nb.jpg;two\n")
    (tmp_path / "odd/notes.txt").write_text("my photos, and more")
    for split in ("train", "test"):
        images(tmp_path / "classes" / split / "one", "a.jpg")
        images(tmp_path / "classes" / split / "two", "b.jpg")
    turns = [{"from": "human", "value": "<image>"}]
    rows = [{"image": f"{a}.jpg", "conversations": [*turns, {"from": "gpt", "value": b}]} for a, b in ("a1", "b2")]
    images(tmp_path / "llava", "a.jpg", "b.jpg")
    (tmp_path / "llava/chat.json").write_text(json.dumps(rows).replace('"1"', '"one"').replace('"2"', '"two"'))
    for name in ("flickr8k", "flickr30k", "odd", "classes", "llava"):
        source = advised(tmp_path / name)
        examples, problems = read(source, base_dir=tmp_path)
        assert (sorted(answers(examples)), problems) == (["one", "two"], []), source
        assert parse_data([f"{key}={json.dumps(value)}" for key, value in source.items()])


def test_coco_captions_are_told(tmp_path):
    images(tmp_path / "val2017", "a.jpg")
    write(tmp_path / "captions.json", {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []})
    with pytest.raises(
        SourceError, match=r"there is captions\.json: if it holds COCO captions, read it with format: coco"
    ):
        read_folder(tmp_path)


def test_what_is_no_data_says_what_to_do(tmp_path):
    images(tmp_path, "a.png")
    (tmp_path / "link.png").symlink_to("gone.png")
    write(tmp_path / "metadata.jsonl", [{"file_name": "link.png", "caption": "x"}])
    (tmp_path / "excel.csv").write_text("sep=;\nfile_name;caption\na.png;x\n")
    (tmp_path / "book.xlsx").write_bytes(b"PK")
    (tmp_path / "rows.zip").write_bytes(b"PK")
    pq.write_table(pa.table({"image": [{"bytes": b"", "path": None}], "caption": ["x"]}), tmp_path / "stored.parquet")
    assert lines(read_folder(tmp_path).problems) == [
        f"metadata.jsonl:1: image: no such image: {tmp_path}/link.png; it is a link to gone.png, which is not there"
    ]
    [problem] = read_folder(tmp_path, metadata="stored.parquet").problems
    assert problem.why == "an image, not the name of one; read its file with format: dataset and its columns"
    columns = {"image": "file_name", "caption": "caption"}
    for source, message in (
        ({"metadata": "excel.csv"}, "excel.csv: line 1 is 'sep=', which only Excel understands; remove it"),
        ({"metadata": "book.xlsx"}, "book.xlsx is a spreadsheet; save it as CSV"),
        ({"path": "excel.csv"}, "excel.csv is a file, and a folder is wanted"),
        ({"metadata": "."}, "is a folder, and a file is wanted"),
        ({"format": "dataset", "path": "rows.zip", "columns": columns}, "rows.zip is no file of rows; known: .jsonl,"),
    ):
        with pytest.raises(SourceError, match=re.escape(message)):
            read({"format": "image_folder", "path": ".", **source}, base_dir=tmp_path)
    with pytest.raises(UserError, match=r"metadata\.jsonl is no recipe and no folder\. Write path="):
        parse_data([str(tmp_path / "metadata.jsonl")])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.csv.gz", "rows.parquet"])
def test_a_data_set_may_be_the_path_of_a_file(tmp_path, monkeypatch, name):
    images(tmp_path / "rows", "a.png")
    table = pd.DataFrame({"image": ["a.png"], "caption": ["a cat"]})
    if name.endswith(".jsonl"):
        table.to_json(tmp_path / "rows" / name, orient="records", lines=True)
    elif name.endswith(".parquet"):
        table.to_parquet(tmp_path / "rows" / name)
    else:
        table.to_csv(tmp_path / "rows" / name)
    monkeypatch.chdir(tmp_path)
    columns = {"image": "image", "caption": "caption"}
    for folder in (tmp_path, Path()):
        source = {"format": "dataset", "path": f"rows/{name}", "columns": columns}
        assert answers(read(source, base_dir=folder).examples) == ["a cat"]
        files = {"path": ".", "data_files": f"rows/{name}", "images": "rows"}
        assert answers(read(source | files, base_dir=folder).examples) == ["a cat"]


def test_a_file_of_something_else_is_told(tmp_path):
    images(tmp_path, "a.png")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "lfs.jsonl").write_text(pointer)
    (tmp_path / "lfs.png").write_text(pointer)
    (tmp_path / "page.jsonl").write_text("<!DOCTYPE html>\n<html>404</html>\n")
    (tmp_path / "packed.csv").write_bytes(gzip.compress(b"image,caption\n"))
    (tmp_path / "latin.csv").write_bytes("größe,image,caption\n1,a.png,x\n".encode("latin-1"))
    columns = {"image": "image", "caption": "caption"}
    for source, message in (
        (
            {"path": "lfs.jsonl"},
            "lfs.jsonl: a pointer of Git LFS in place of the file; get the file with `git lfs pull`",
        ),
        ({"path": "page.jsonl"}, "page.jsonl:1: not valid JSON: Expecting value at column 1; no other"),
        ({"path": "packed.csv"}, "packed.csv: not a CSV file (it begins with b'\\x1f\\x8b"),
        ({"path": "latin.csv"}, "latin.csv: not UTF-8 text; save it as UTF-8"),
        ({"path": "csv", "data_files": "*.tsv"}, "no file matches *.tsv"),
    ):
        options = {"format": "dataset", **source, "columns": columns}
        pattern = re.escape(message).replace(r"matches\ ", ".*")
        with pytest.raises(SourceError, match=pattern):
            read(options, base_dir=tmp_path)
        with pytest.raises(SourceError, match=pattern):
            in_pieces({**options, "streaming": True}, tmp_path, lambda _: [])
    with pytest.raises(ImageError, match="a pointer of Git LFS in place of the file; get the file with `git lfs pull`"):
        open_image(str(tmp_path / "lfs.png"))


def test_names_with_the_number_of_a_caption_are_those_of_images(tmp_path):
    images(tmp_path, "a.jpg")
    (tmp_path / "Flickr8k.token.txt").write_text("image\tcaption\na.jpg#0\tA child .\na.jpg#1\tA girl .\n")
    examples, problems = read_folder(tmp_path, metadata="Flickr8k.token.txt")
    assert (answers(examples), problems) == (["A child .", "A girl ."], [])
