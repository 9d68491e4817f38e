"""JSON and CSV files of a data set: the same rows, and the same bad ones, wherever the files are and however read."""

import base64
import gzip
import json
import zipfile

import datasets
import fsspec
import pytest

from tests.data.reader_files import answers, images, lines, png, read_streamed, write
from vlm.data.example import StoredImage
from vlm.data.images import ImageError, open_image
from vlm.data.readers import SourceError, read


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is taken from an earlier run."""
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "downloads"))


COLUMNS = {"image": "image", "question": "q", "answer": "a", "question_id": "id"}


def read_whole(folder, /, **options):
    return read({"format": "dataset", **options}, base_dir=folder)


def put(folder, name, content, where):
    """Write a file as it is, compressed, into an archive, or where fsspec reads it; gives its `data_files`."""
    if where == "gzip":
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        return f"{name}.gz"
    if where == "zip":
        with zipfile.ZipFile(folder / "rows.zip", "w") as archive:
            archive.writestr(f"inner/{name}", content)
            archive.writestr(f"__MACOSX/inner/._{name}", b"\x00\x05\x16\x07")
        return "rows.zip"
    if where == "memory":
        fsspec.filesystem("memory").pipe(f"/{folder.name}/{name}", content)
        return f"memory://{folder.name}/{name}"
    (folder / name).write_bytes(content)
    return name


EVERYWHERE = pytest.mark.parametrize("where", ["disk", "gzip", "zip", "memory"])
HOW = pytest.mark.parametrize("reading", [read_whole, read_streamed])

CSV = b'''\xef\xbb\xbfid,image,q,a
1,a.png,n?,007
2,a.png,n?,NA
3,a.png,n?,"two
lines, ""both"""
4,a.png,n?,"A sign "STOP" here"
5,a.png,n?,1.10
6,a.png,n?,one,two
7,a.png,n?,\xe9
8,a.png,n?,
9,b.png,n?,None
10,a.png,n?,ol\xc3\xa9
'''


@HOW
@EVERYWHERE
def test_cells_of_csv_are_text_and_bad_rows_are_named(tmp_path, where, reading):
    images(tmp_path, "a.png")
    files = put(tmp_path, "rows.csv", CSV, where)
    examples, problems = reading(tmp_path, path="csv", data_files=files, columns=COLUMNS)
    assert answers(examples) == ["007", "NA", 'two\nlines, "both"', "1.10", "olé"]
    assert {b.question_id for e in examples for b in e.branches} == {"1", "2", "3", "5", "10"}
    named = [(p.where.rpartition(":")[2], p.key, p.why.partition(":")[0].partition(" (")[0]) for p in problems]
    assert sorted(named, key=lambda problem: int(problem[0])) == [
        ("6", "", "not valid CSV"),
        ("8", "", "5 cells, and the first line names 4 columns; put a cell with a comma in it in quotation marks"),
        ("9", "answer", "not UTF-8 text"),
        ("10", "answer", "missing"),
        ("11", "image", "no such image"),
    ]
    assert all("rows.csv" in problem.where or "rows.zip" in problem.where for problem in problems)


JSONL = b"""\xef\xbb\xbf{"id": 9007199254740993, "image": "a.png", "q": "n?", "a": "2020-01-01T10:00:00Z"}

{"id": 18446744073709551617, "image": "a.png", "q": "n?", "a": "half \\ud83d"}
{"id": 18446744073709551616, "image": "a.png", "q": "n?", "a": 18446744073709551615}
{"id": 18446744073709551617, "image": "a.png", "q": "n?", "a": 0.1234567890123456}
{"id": "007", "image": "a.png", "q": "n?", "a": "007"}
{"id": 4, "image": "a.png", "q": "n?", "a": "\xe9"}
{"id": 5, "image": "a.png", "q": "n?", "a": "twice", "a": "twice"}
{"id": [6], "image": "a.png", "q": "n?", "a": "a list for an id"}
["a.png", "n?"]
{"id": 7, "image": "a.png"
{"id": 8, "image": 3, "q": "n?", "a": "no image"}
{"id": 9, "image": "a.png", "q": "n?", "a": "last", "new": {"column": [1]}}"""


@HOW
@EVERYWHERE
def test_values_of_json_are_exact_and_bad_rows_are_named(tmp_path, where, reading):
    images(tmp_path, "a.png")
    files = put(tmp_path, "rows.jsonl", JSONL, where)
    examples, problems = reading(tmp_path, path="json", data_files=files, columns=COLUMNS)
    assert answers(examples) == ["2020-01-01T10:00:00Z", "18446744073709551615", "0.1234567890123456", "007", "last"]
    ids = [branch.question_id for example in examples for branch in example.branches]
    assert ids == ["9007199254740993", "18446744073709551616", "18446744073709551617", "007", "9"]
    named = sorted((int(p.where.rpartition(":")[2]), p.key, p.why.partition(" (")[0][:30]) for p in problems)
    assert named == [
        (3, "answer", "half of a character"),
        (7, "", "not UTF-8 text"),
        (8, "", "expected an object {...}, foun"),
        (9, "question_id", "an id is text or a number, fou"),
        (10, "", "expected an object {...}, foun"),
        (11, "", "not valid JSON: Expecting ',' "),
        (12, "image", "expected an image or the name "),
    ]


@HOW
def test_a_list_of_json_is_read_with_exact_numbers(tmp_path, reading):
    images(tmp_path, "a.png")
    write(tmp_path / "rows.json", [{"image": "a.png", "q": "n?", "a": 2**64 + n, "id": 2**53 + n} for n in range(3)])
    examples, problems = reading(tmp_path, path="json", data_files="rows.json", columns=COLUMNS)
    assert (answers(examples), problems) == ([str(2**64 + n) for n in range(3)], [])
    assert [b.question_id for e in examples for b in e.branches] == [str(2**53 + n) for n in range(3)]


@pytest.mark.parametrize(
    ("split", "kept"),
    [("train[:2]", [0, 1]), ("train[1:3]+train[-1:]", [1, 2, 5]), ("train[50%:]", [3, 4, 5]), ("all", range(6))],
)
def test_a_part_of_a_split(tmp_path, split, kept):
    images(tmp_path, "a.png")
    write(tmp_path / "0.jsonl", [{"image": "a.png", "q": "n?", "a": n, "id": n} for n in range(4)])
    write(tmp_path / "1.jsonl", [{"image": "a.png", "q": "n?", "a": n, "id": n} for n in range(4, 6)])
    examples, _ = read_whole(tmp_path, path="json", data_files=["0.jsonl", "1.jsonl"], split=split, columns=COLUMNS)
    assert answers(examples) == [str(n) for n in kept]
    with pytest.raises(SourceError, match="no split 'tset'; there is train"):
        read_whole(tmp_path, path="json", data_files="0.jsonl", split="tset", columns=COLUMNS)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_images_in_rows_stay_on_disk(tmp_path, name):
    texts = [base64.b64encode(png(level)).decode() for level in (10, 20, 30)]
    rows = [{"id": n, "image": text, "q": "é?\u2028", "a": n} for n, text in enumerate(texts)]
    if name.endswith(".csv"):
        content = "\ufeffid,image,q,a\r\n" + "".join(f'{r["id"]},{r["image"]},"é\r\n?",{r["a"]}\r\n' for r in rows)
    else:
        content = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / name).write_bytes(content.encode())
    path = "csv" if name.endswith(".csv") else "json"
    examples, problems = read_whole(tmp_path, path=path, data_files=name, columns=COLUMNS)
    assert problems == []
    assert all(isinstance(example.images[0], StoredImage) for example in examples)
    assert [open_image(example.images[0]).getpixel((0, 0))[0] for example in examples] == [10, 20, 30]
    for changed in (b"", b"\n" * 5000):
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(ImageError, match="its row cannot be read again"):
            open_image(examples[-1].images[0])


@HOW
def test_what_separates_cells_is_seen_in_the_first_line(tmp_path, reading):
    images(tmp_path, "a.png", "b.png")
    flickr = 'image_name| comment_number| comment\na.png| 0| Two men, "one" asleep .\nb.png| 4   A dog runs .\n'
    (tmp_path / "results.csv").write_text(flickr)
    columns = {"image": "image_name", "image_id": "image_name", "caption": "comment"}
    examples, problems = reading(tmp_path, path="csv", data_files="results.csv", columns=columns)
    assert answers(examples) == ['Two men, "one" asleep .']
    assert [str(p).rpartition("results.csv")[2] for p in problems] == [":3: nothing to answer: 'caption' is null"]
    excel = 'image;caption\r\na.png;"Ja; nein, 3,5"\r\nb.png;x\r\n'
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "excel.csv").write_bytes(excel.encode(encoding))
        columns = {"image": "image", "caption": "caption"}
        examples, problems = reading(tmp_path, path="csv", data_files="excel.csv", columns=columns)
        assert (answers(examples), problems) == (["Ja; nein, 3,5", "x"], [])


@HOW
def test_a_file_without_a_line_of_columns_is_refused(tmp_path, reading):
    images(tmp_path, "a.png")
    (tmp_path / "flickr.token").write_text("a.png#0\tA child .\na.png#1\tA girl .\n")
    with pytest.raises(SourceError, match=r"line 1 is a row already \('a.png#0'\); write a line above it"):
        reading(tmp_path, path="csv", data_files="flickr.token", columns={"image": "image", "caption": "caption"})


@HOW
def test_a_damaged_file_is_named(tmp_path, reading):
    images(tmp_path, "a.png")
    whole = gzip.compress(b"".join(b'{"image": "a.png", "a": "%d"}\n' % n for n in range(3000)))
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"rows\.jsonl\.gz: cannot be read"):
        reading(tmp_path, path="json", data_files="rows.jsonl.gz", columns={"image": "image", "caption": "a"})


@HOW
def test_another_encoding_is_said(tmp_path, reading):
    images(tmp_path, "a.png")
    (tmp_path / "rows.csv").write_bytes("image,caption\na.png,café\na.png,naïve\n".encode("latin-1"))
    columns = {"image": "image", "caption": "caption"}
    try:
        problems = lines(reading(tmp_path, path="csv", data_files="rows.csv", columns=columns).problems)
    except SourceError as error:
        problems = [str(error)] * 2
    assert len(problems) == 2
    assert all("not UTF-8 text" in problem for problem in problems)
