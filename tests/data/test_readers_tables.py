"""Rows as tables give them, and as the guides of `datasets` and diffusers lay them out."""

import base64
import datetime
import json
from decimal import Decimal
from io import BytesIO

import datasets
import pandas as pd
import pytest
from PIL import Image

from tests.data.reader_files import answers, images, lines, png, read_streamed, write
from vlm.data.images import open_image
from vlm.data.readers import SourceError, read
from vlm.data.readers_text import as_text
from vlm.recipe import parse_data

NOISE = Image.effect_noise((40, 30), 80).convert("RGB")


def base64_png() -> str:
    buffer = BytesIO()
    NOISE.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def read_folder(folder, /, **options):
    return read({"format": "image_folder", "path": ".", **options}, base_dir=folder)


def read_dataset(folder, /, **options):
    return read({"format": "dataset", **options}, base_dir=folder)


CAPTIONS = [{"file_name": "a.png", "text": "first"}, {"file_name": "b.png", "text": "second, with a comma"}]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_a_captioning_folder_is_read_as_datasets_reads_it(tmp_path, name):
    images(tmp_path, "a.png", "b.png")
    table = pd.DataFrame(CAPTIONS)
    if name.endswith(".jsonl"):
        write(tmp_path / name, CAPTIONS)
    elif name.endswith(".csv"):
        table.to_csv(tmp_path / name, index=False)
    else:
        table.to_parquet(tmp_path / name)
    examples, problems = read_folder(tmp_path)
    assert problems == []
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train")
    assert sorted(answers(examples)) == sorted(theirs["text"])
    shown = {branch.answer: open_image(e.images[0]).getpixel((0, 0)) for e in examples for branch in e.branches}
    assert shown == {row["text"]: row["image"].convert("RGB").getpixel((0, 0)) for row in theirs}


STRAY = """file_name,caption
a.png,"A sign that says STOP
b.png,"two
lines, ""both"" read"
a.png,"A sign that says "STOP" in red"
a.png,a 5" screen
b.png,"not closed
a.png,last
"""


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("how", ["folder", "dataset"])
def test_a_stray_quote_costs_its_row_alone(tmp_path, how, separator):
    images(tmp_path, "a.png", "b.png")
    name = "metadata.csv" if separator == "," else "metadata.tsv"
    (tmp_path / name).write_text(STRAY.replace(",", separator))
    if how == "folder":
        examples, problems = read_folder(tmp_path, metadata=name)
    else:
        columns = {"image": "file_name", "caption": "caption"}
        examples, problems = read_dataset(tmp_path, path="csv", data_files=name, columns=columns)
    assert sorted(answers(examples)) == sorted(['a 5" screen', f'two\nlines{separator} "both" read', "last"])
    assert [p.where.rpartition(":")[2] for p in problems if "not valid CSV" in p.why] == ["2", "5", "7"]
    assert len(problems) == 3


def test_quotes_that_pandas_reads_over_are_found(tmp_path):
    images(tmp_path, "a.png")
    columns = {"image": "image", "caption": "a"}
    for row in ('a.png,"A sign that says "STOP" in red"', "a.png,a dog, running"):
        (tmp_path / "rows.csv").write_text(f"image,a\n{row}\na.png,a dog\na.png,a cat\n")
        examples, problems = read_dataset(tmp_path, path="csv", data_files="rows.csv", columns=columns)
        assert (answers(examples), len(problems)) == (["a dog", "a cat"], 1)
        assert problems[0].where.endswith("rows.csv:2")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_files_in_another_encoding_are_refused_and_single_lines_are_bad(tmp_path, name):
    images(tmp_path, "a.png")
    words = ["caf\xe9", "plain", "na\xefve"]
    if name.endswith(".csv"):
        rows = ["file_name,caption", *(f"a.png,{word}" for word in words)]
    else:
        rows = [json.dumps({"file_name": "a.png", "caption": word}, ensure_ascii=False) for word in words]
    (tmp_path / name).write_bytes("\n".join(rows).encode("latin-1"))
    with pytest.raises(SourceError, match=r"not UTF-8 text \(2 lines .*; save the file as UTF-8"):
        read_folder(tmp_path)
    columns = {"image": "file_name", "caption": "caption"}
    with pytest.raises(SourceError, match="save the file as UTF-8"):
        read_dataset(tmp_path, path=name.rpartition(".")[2].removesuffix("l"), data_files=name, columns=columns)
    (tmp_path / name).write_bytes("\n".join(rows[:-1]).encode("latin-1"))
    examples, problems = read_folder(tmp_path)
    assert (answers(examples), len(problems)) == (["plain"], 1)
    (tmp_path / name).write_bytes("\n".join(rows[:-1]).encode("latin-1") + b"\n" + rows[-1].encode())
    assert answers(read_folder(tmp_path).examples) == ["plain", "na\xefve"]


def test_text_is_a_caption_only_where_there_is_nothing_else(tmp_path):
    images(tmp_path, "a.png")
    write(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "OCR", "question": "Q?", "answer": "A"}])
    assert answers(read_folder(tmp_path).examples) == ["A"]


def test_cells_of_csv_are_text_and_bad_lines_are_named(tmp_path):
    images(tmp_path, "a.png")
    content = (
        'file_name,question,answer\na.png,n?,007\na.png,n?,None\na.png,"two\nlines",N/A\na.png,n?,\na.png,n?,1,2\n'
    )
    (tmp_path / "metadata.csv").write_bytes(("\ufeff" + content).encode() + b"a.png,n?,\xe9\n")
    examples, problems = read_folder(tmp_path)
    assert answers(examples) == ["007", "None", "N/A"]
    assert lines(problems) == [
        "metadata.csv:7: 4 cells, and the first line names 3 columns; put a cell with a comma in it in quotation marks",
        "metadata.csv:6: answer: missing: a question needs 'answer' or 'answers'",
        "metadata.csv:8: answer: not UTF-8 text (byte 0xe9, or \\udce9, in place of character 0); write the text again",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "file_name,caption,caption\n", "two columns are called 'caption'"),
        ("metadata.parquet", "no parquet", "metadata.parquet: cannot be read as parquet"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        read_folder(tmp_path)


def test_a_folder_without_metadata_says_what_to_do(tmp_path):
    images(tmp_path / "bare", "a.png")
    images(tmp_path / "labelled" / "cat", "a.png")
    images(tmp_path / "labelled" / "dog", "a.png")
    write(tmp_path / "splits" / "train" / "metadata.jsonl", [])
    write(tmp_path / "splits" / "test" / "metadata.jsonl", [])
    write(tmp_path / "both" / "metadata.jsonl", [])
    write(tmp_path / "both" / "metadata.csv", "")
    for name, message in (
        ("bare", "Write metadata.jsonl with a line for each"),
        ("labelled", r"names of its folders \(cat, dog\) as captions, .* columns: {image: image, caption: label}"),
        ("splits", "there is train/metadata.jsonl: set path to .*splits/train"),
        ("both", "has metadata.jsonl and metadata.csv; say which"),
    ):
        with pytest.raises(SourceError, match=message):
            read_folder(tmp_path, path=name)
    # The advice is right.
    examples, _ = read_dataset(tmp_path, path="labelled", columns={"image": "image", "caption": "label"})
    assert sorted(answers(examples)) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2, "2"), (2.0, "2"), (2.5, "2.5"), (-1e300, "-1e+300"), (True, "true"), (Decimal("1.10"), "1.10"),
        (datetime.date(2019, 5, 1), "2019-05-01"), (datetime.datetime(2019, 5, 1), "2019-05-01"),
        (datetime.datetime(2019, 5, 1, 12, 30), "2019-05-01 12:30:00"), (datetime.time(12, 30), "12:30:00"),
        (float("nan"), None), (float("inf"), None), (None, None), ([], None), ({}, None), (b"x", None),
    ],
)  # fmt: skip
def test_values_as_text(value, text):
    assert as_text(value) == text


COLUMNS = {"image": "image", "question": "q", "answer": "a"}


def test_cells_of_csv_in_datasets_are_text(tmp_path):
    images(tmp_path, "a.png")
    words = ["2", "007", "None", "N/A", "1.10", "True", "2019-05-01", "nan", "-"]
    (tmp_path / "rows.csv").write_text("image,q,a\n" + "".join(f"a.png,what,{word}\n" for word in words))
    for reading in (read_dataset, read_streamed):
        examples, problems = reading(tmp_path, path="csv", data_files="rows.csv", columns=COLUMNS)
        assert (answers(examples), problems) == (words, [])


@pytest.mark.parametrize("reading", [read_dataset, read_streamed])
def test_class_labels_are_their_names(tmp_path, reading):
    features = {
        "image": datasets.Image(),
        "a": datasets.ClassLabel(names=["cat", "dog"]),
        "several": datasets.List(datasets.ClassLabel(names=["cat", "dog"])),
    }
    rows = {
        "image": [{"bytes": png(n), "path": None} for n in range(3)],
        "a": [1, 0, -1],
        "several": [[0, 1], [1], [0]],
    }
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    made.to_parquet(tmp_path / "rows.parquet")
    made.save_to_disk(tmp_path / "saved")
    for source in ({"path": "parquet", "data_files": "rows.parquet"}, {"path": "saved"}):
        examples, problems = reading(tmp_path, **source, columns={"image": "image", "caption": "a"})
        assert answers(examples) == ["dog", "cat"]
        assert len(problems) == 1
        examples, _ = reading(tmp_path, **source, columns={"image": "image", "captions": "several"})
        assert answers(examples) == ["cat", "dog", "dog", "cat"]


@pytest.mark.parametrize("reading", [read_dataset, read_streamed])
def test_images_that_pandas_stored(tmp_path, reading):
    rows = {
        "one": [{"bytes": png(n), "path": f"{n}.png"} for n in (1, 2)],
        "many": [[{"path": None, "bytes": png(3)}, {"path": None, "bytes": png(4)}], [{"path": None, "bytes": png(5)}]],
        "a": ["x", "y"],
    }
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    source = {"path": "parquet", "data_files": "rows.parquet"}
    for key, column, expected in (("image", "one", [[1], [2]]), ("images", "many", [[3, 4], [5]])):
        examples, problems = reading(tmp_path, **source, columns={key: column, "caption": "a"})
        assert problems == []
        assert [[open_image(i).getpixel((0, 0))[0] for i in e.images] for e in examples] == expected


@pytest.mark.parametrize("how", ["tsv", "jsonl", "stream", "folder", "llava"])
@pytest.mark.parametrize("begin", ["", "data:image/png;base64,"])
def test_images_in_base64(tmp_path, how, begin):
    text = begin + base64_png()
    bad = text[:-8] + "*" * 8
    images(tmp_path, "a.png")
    pairs = list(zip((text, bad, "a.png"), "xyz", strict=True))
    columns = {"image": "image", "question": "q", "answer": "a"}
    if how in ("tsv", "stream"):
        rows = [("image", "q", "a"), (text, "one, two", "x"), (bad, "one", "y"), ("a.png", "one", "z")]
        (tmp_path / "rows.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
        source = {"format": "dataset", "path": "csv", "data_files": "rows.tsv", "columns": columns}
    elif how == "jsonl":
        write(
            tmp_path / "rows.jsonl",
            [{"image": i, "q": "one", "a": a} for i, a in ((text, "x"), (bad, "y"), ("a.png", "z"))],
        )
        source = {"format": "dataset", "path": "json", "data_files": "rows.jsonl", "columns": columns}
    elif how == "folder":
        write(
            tmp_path / "metadata.jsonl",
            [{"file_name": i, "caption": a} for i, a in ((text, "x"), (bad, "y"), ("a.png", "z"))],
        )
        source = {"format": "image_folder", "path": "."}
    else:
        question = {"from": "human", "value": "<image>"}
        rows = [{"image": i, "conversations": [question, {"from": "gpt", "value": a}]} for i, a in pairs]
        write(tmp_path / "l.json", rows)
        source = {"format": "llava", "path": "l.json"}
    if how == "stream":
        examples, problems = read_streamed(tmp_path, **{k: v for k, v in source.items() if k != "format"})
    else:
        examples, problems = read(source, base_dir=tmp_path)
    assert answers(examples) == ["x", "z"]
    assert open_image(examples[0].images[0]).tobytes() == NOISE.tobytes()
    assert len(problems) == 1
    assert "base64 that cannot be decoded" in str(problems[0])
    assert len(examples[0].image_id) < 300


def test_a_name_that_looks_like_base64_is_a_name(tmp_path):
    name = "/9j/" + "a" * 80 + ".png"
    assert "no such image" in str(read_rows_of(tmp_path, name).problems[0])
    assert "no such image" in str(read_rows_of(tmp_path, "iVBORw0KGgo").problems[0])


def read_rows_of(path, name):
    write(path / "metadata.jsonl", [{"file_name": name, "caption": "x"}])
    return read_folder(path)


def test_one_bad_row_does_not_cost_the_file(tmp_path):
    images(tmp_path, "a.png")
    rows = [json.dumps({"image": "a.png", "a": a}) for a in ("x", "\ud83d", "z")]
    write(tmp_path / "rows.jsonl", [*rows, "[" * 100_000 + "]" * 100_000])
    columns = {"image": "image", "caption": "a"}
    examples, problems = read_dataset(tmp_path, path="json", data_files="rows.jsonl", columns=columns)
    assert answers(examples) == ["x", "z"]
    assert sorted(str(p).rpartition("rows.jsonl")[2][:12] for p in problems) == [":2: caption:", ":4: expected"]
    (tmp_path / "rows.csv").write_text("image,a\na.png,x\na.png,y,z\n")
    examples, problems = read_dataset(tmp_path, path="csv", data_files="rows.csv", columns=columns)
    assert (answers(examples), len(problems)) == (["x"], 1)


def test_why_datasets_cannot_read_is_said(tmp_path):
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(SourceError, match=r"[Pp]arquet magic bytes"):
        read_dataset(tmp_path, path="parquet", data_files="rows.parquet", columns={"image": "image", "caption": "a"})


def test_a_bare_folder_is_an_image_folder(tmp_path, monkeypatch):
    images(tmp_path / "two words", "a.png")
    monkeypatch.chdir(tmp_path)
    assert parse_data(["two words"]).train == {"format": "image_folder", "path": str(tmp_path / "two words")}


def test_rows_of_vlmevalkit_that_name_the_row_of_their_image(tmp_path):
    images(tmp_path, "a.png")
    rows = [
        ("7", base64_png(), "one", "x"),
        ("8", "7", "two", "y"),
        ("9", "a.png", "q", "z"),
    ]
    table = [("index", "image", "q", "a"), *rows]
    (tmp_path / "rows.tsv").write_text("".join("\t".join(row) + "\n" for row in table))
    columns = COLUMNS | {"question_id": "index"}
    examples, problems = read_dataset(tmp_path, path="csv", data_files="rows.tsv", columns=columns)
    assert problems == []
    asked = [[(branch.question_id, branch.answer) for branch in e.branches] for e in examples]
    assert asked == [[("7", "x"), ("8", "y")], [("9", "z")]]
    assert open_image(examples[0].images[0]).tobytes() == NOISE.tobytes()
