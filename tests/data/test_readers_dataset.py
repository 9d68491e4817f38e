"""Readers of what `datasets` loads."""

import tarfile
from io import BytesIO

import datasets
import pytest
from PIL import Image

from tests.data.reader_files import images, lines, png, qa, write
from vlm.data.images import open_image
from vlm.data.readers import SourceError, read
from vlm.data.stream_sources import in_pieces

IMAGE_ROWS = {
    "img": [{"bytes": png(n), "path": None} for n in range(3)] + [None],
    "same": [{"bytes": png(n), "path": None} for n in (0, 1, 0, 0)],
    "imgs": [[{"bytes": png(i), "path": None} for i in range(n)] for n in (1, 0, 2)] + [None],
    "group": ["x", "y", "x", "z"],
    "text": ["t0", "t1", "t2", "t3"],
    "texts": [[{"user": f"q{n}", "assistant": f"a{n}"}] for n in range(4)],
}
FEATURES = datasets.Features(
    {
        "img": datasets.Image(),
        "same": datasets.Image(),
        "imgs": datasets.List(datasets.Image()),
        "group": datasets.Value("string"),
        "text": datasets.Value("string"),
        "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
    }
)


@pytest.fixture
def stored(tmp_path):
    dataset = datasets.Dataset.from_dict(IMAGE_ROWS, features=FEATURES)
    dataset.to_parquet(tmp_path / "p" / "train.parquet")
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "many")
    return tmp_path


def level(source) -> int:
    return open_image(source).getpixel((0, 0))[0]


@pytest.mark.parametrize(
    "where", [{"path": "p"}, {"path": "parquet", "data_files": "p/*.parquet"}, {"path": "one"}, {"path": "many"}]
)
def test_dataset_from_anywhere(stored, where):
    source = {"format": "dataset", **where, "columns": {"image": "img", "caption": "text"}}
    examples, problems = read(source, base_dir=stored)
    assert [level(e.images[0]) for e in examples] == [0, 1, 2]
    assert [e.branches[0].answer for e in examples] == ["t0", "t1", "t2"]
    assert len(problems) == 1
    assert str(problems[0]).endswith("[train]:row 3: image: no image in column 'img'")
    assert len(read({**source, "limit": 2}, base_dir=stored).examples) == 2


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("p/*.nope", "option 'data_files': no file matches .*p/.*nope"),
        ("p/none.parquet", "option 'data_files': no such file: .*p/none.parquet"),
        (["p/train.parquet", "q/*"], "option 'data_files': no file matches .*q/"),
        ([], "'data_files' is empty"),
    ],
)
def test_files_that_are_not_there_are_named(stored, files, said, streaming):
    columns = {"image": "img", "caption": "text"}
    source = {"format": "dataset", "path": "parquet", "data_files": files, "columns": columns, "streaming": streaming}
    with pytest.raises(SourceError, match=said):
        in_pieces(source, stored, lambda source: []) if streaming else read(source, base_dir=stored)


def test_dataset_split(stored):
    source = {"format": "dataset", "path": "many", "split": "test", "columns": {"image": "img", "caption": "text"}}
    assert [e.branches[0].answer for e in read(source, base_dir=stored).examples] == ["t1"]
    with pytest.raises(SourceError, match="split 'tset'"):
        read({**source, "split": "tset"}, base_dir=stored)
    with pytest.raises(SourceError, match="leave out 'split'"):
        read({**source, "path": "one"}, base_dir=stored)


def test_dataset_lists_of_images(stored):
    source = {"format": "dataset", "path": "one", "columns": {"images": "imgs", "qa": "texts"}}
    examples, problems = read(source, base_dir=stored)
    assert [[level(i) for i in e.images] for e in examples] == [[0], [], [0, 1]]
    assert [qa(e.branches[0]) for e in examples] == [("q0", "a0"), ("q1", "a1"), ("q2", "a2")]
    assert lines(problems) == ["one[train]:row 3: image: no image in column 'imgs'"]


def test_dataset_rows_of_one_image_are_branches(stored):
    columns = {"image": "same", "caption": "text", "image_id": "group"}
    examples, _ = read({"format": "dataset", "path": "one", "columns": columns}, base_dir=stored)
    assert [(e.image_id, [b.answer for b in e.branches]) for e in examples] == [
        ("x", ["t0", "t2"]),
        ("y", ["t1"]),
        ("z", ["t3"]),
    ]
    limited, _ = read({"format": "dataset", "path": "one", "columns": columns, "limit": 1}, base_dir=stored)
    assert [(e.image_id, len(e.branches)) for e in limited] == [("x", 2)]


def test_dataset_of_paths(tmp_path):
    images(tmp_path / "i", "a.png")
    write(tmp_path / "r.jsonl", [{"f": "a.png", "c": "x"}, {"f": "b.png", "c": "y"}, {"f": None, "c": "z"}])
    columns = {"image": "f", "caption": "c"}
    source = {"format": "dataset", "path": "json", "data_files": "r.jsonl", "columns": columns, "images": "i"}
    examples, problems = read(source, base_dir=tmp_path)
    assert [e.images for e in examples] == [(str(tmp_path / "i" / "a.png"),)]
    assert lines(problems) == [
        f"{tmp_path / 'r.jsonl'}:2: image: no such image: {tmp_path / 'i' / 'b.png'}",
        f"{tmp_path / 'r.jsonl'}:3: image: no image in column 'f'",
    ]


def test_webdataset_shards(tmp_path):
    with tarfile.open(tmp_path / "s-0.tar", "w") as shard:
        for n in range(3):
            for suffix, data in (("png", png(n)), ("txt", f"caption {n}".encode())):
                member = tarfile.TarInfo(f"{n:04d}.{suffix}")
                member.size = len(data)
                shard.addfile(member, BytesIO(data))
    columns = {"image": "png", "caption": "txt"}
    source = {"format": "dataset", "path": "webdataset", "data_files": "s-*.tar", "columns": columns}
    examples, problems = read(source, base_dir=tmp_path)
    assert problems == []
    assert [(level(e.images[0]), e.branches[0].answer) for e in examples] == [(n, f"caption {n}") for n in range(3)]


def test_reading_decodes_no_image(stored, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", fail)
    monkeypatch.setattr(Image, "open", fail)
    for columns in ({"image": "img", "caption": "text"}, {"images": "imgs", "qa": "texts"}):
        read({"format": "dataset", "path": "one", "columns": columns}, base_dir=stored)


def test_dataset_bad_columns(stored):
    with pytest.raises(SourceError, match=r"'columns\.caption': no column 'txt' in one; did you mean 'text'\?"):
        read({"format": "dataset", "path": "one", "columns": {"image": "img", "caption": "txt"}}, base_dir=stored)
    with pytest.raises(SourceError, match=r"column 'texts' holds .*, not images"):
        read({"format": "dataset", "path": "one", "columns": {"image": "texts", "caption": "text"}}, base_dir=stored)


def test_dataset_that_is_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=f"tried {tmp_path / 'empty'}"):
        read({"format": "dataset", "path": "empty", "columns": {"caption": "c"}}, base_dir=tmp_path)
