"""WebDataset shards whose rows have several kinds of images, or keys with dots in them."""

import io
import os
import tarfile

import pytest

from tests.data.reader_files import png
from vlm.data.images import open_image
from vlm.data.readers import SourceError, read
from vlm.data.readers_webdataset import split_name
from vlm.data.stream_sources import Place, in_pieces


def shard(path, *files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def found(folder, columns, streamed=False, files="*.tar"):
    source = {"format": "dataset", "path": "webdataset", "data_files": files, "columns": columns}
    if streamed:
        pieces = in_pieces(source | {"streaming": True}, folder, lambda source: [])
        rows = [(Place(i, n), row) for i in range(len(pieces)) for n, row in enumerate(pieces.rows(i))]
        examples, problems = pieces.examples(rows)
    else:
        examples, problems = read(source, base_dir=folder)
    return [(open_image(e.images[0]).getpixel((0, 0))[0], e.branches[0].answer) for e in examples], problems


def texts(*keys):
    return [(f"{key}.txt", str(n).encode()) for n, key in enumerate(keys)]


@pytest.mark.parametrize("streamed", [False, True])
def test_kinds_of_images_and_dots_in_keys(tmp_path, streamed):
    zero, one = texts("a/0", "a/1")
    shard(tmp_path / "mixed.tar", ("a/0.png", png(0)), zero, ("a/0.json", b"{}"), ("a/1.jpg", png(1)), one)
    both = {"image": "png;jpg", "caption": "txt"}
    assert found(tmp_path, both, streamed, "mixed.tar") == ([(0, "0"), (1, "1")], [])
    zero, one, two = texts("v1.2", "v1.3", "plain")
    shard(tmp_path / "dots.tar", ("v1.2.PNG", png(2)), zero, ("v1.3.png", png(3)), one, ("plain.png", png(4)), two)
    columns = {"image": "png", "caption": "txt"}
    assert found(tmp_path, columns, streamed, "dots.tar") == ([(2, "0"), (3, "1"), (4, "2")], [])


@pytest.mark.parametrize("streamed", [False, True])
def test_fields_with_dots_are_not_taken_for_keys(tmp_path, streamed):
    zero, one = texts("0", "1")
    masks = [(f"{n}.depth.png", png(9)) for n in range(2)]
    shard(tmp_path / "0.tar", masks[0], ("0.png", png(0)), zero, masks[1], ("1.png", png(1)), one)
    columns = {"image": "png", "caption": "txt"}
    assert found(tmp_path, columns, streamed) == ([(0, "0"), (1, "1")], [])
    assert found(tmp_path, columns | {"image": "depth.png"}, streamed) == ([(9, "0"), (9, "1")], [])


@pytest.mark.parametrize("streamed", [False, True])
def test_what_is_not_read_is_said(tmp_path, streamed):
    shard(tmp_path / "0.tar", ("0.png", png(0)), ("0.txt", b"zero"), ("1.jpg", png(1)), ("1.txt", b"one"))
    with pytest.raises(SourceError, match=r"some rows have their image in \.jpg, not in \.png; .* write 'png;jpg'"):
        found(tmp_path, {"image": "png", "caption": "txt"}, streamed)
    with pytest.raises(SourceError, match=r"no column 'webp' in .*\.tar; known: jpg, png, txt"):
        found(tmp_path, {"image": "webp", "caption": "txt"}, streamed)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_row_without_text_or_with_bytes_is_named(tmp_path, streamed):
    shard(
        tmp_path / "0.tar",
        *[("0.png", png(0)), ("0.txt", b"zero"), ("1.png", png(1)), ("2.png", png(2)), ("2.txt", b"\xff\xfe\xff")],
    )
    made, problems = found(tmp_path, {"image": "png", "caption": "txt"}, streamed)
    assert made == [(0, "zero")]
    assert [str(p).rpartition(":row ")[2] for p in problems] == [
        "1: nothing to answer: 'caption' is null",
        "2: nothing to answer: 'caption' is null",
    ]


def test_a_changed_shard_is_read_anew(tmp_path):
    shard(tmp_path / "0.tar", ("0.png", png(0)), ("0.txt", b"zero"))
    assert found(tmp_path, {"image": "png", "caption": "txt"})[0] == [(0, "zero")]
    shard(tmp_path / "0.tar", ("0.png", png(1)), ("0.txt", b"one"))
    os.utime(tmp_path / "0.tar", (1, 1))
    assert found(tmp_path, {"image": "png", "caption": "txt"})[0] == [(1, "one")]


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("a/b.c/0.jpg", ["jpg"], ("a/b.c/0", "jpg")),
        ("0.seg.png", ["png", "seg.png"], ("0", "seg.png")),
        ("0.seg.png", ["png"], ("0.seg", "png")),
        ("0.JPG", ["jpg"], ("0", "jpg")),
        ("0.jpg", ["txt"], ("0.jpg", None)),
    ],
)
def test_where_a_key_ends(name, fields, expected):
    assert split_name(name, fields) == expected
