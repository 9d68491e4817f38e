"""Sources in pieces say what the same sources say read whole."""

import json
import tarfile
from io import BytesIO
from itertools import islice

import datasets
import fsspec
import pytest

from tests.data.reader_files import images, png, write
from tests.data.test_readers_dataset import level
from vlm.data import stream_sources
from vlm.data.readers import SourceError, read
from vlm.data.stream_sources import InMemory, ParquetRowGroups, Place, in_pieces

ROWS = 25
FEATURES = datasets.Features(
    {
        "img": datasets.Image(),
        "same": datasets.Image(),
        "text": datasets.Value("string"),
        "n": datasets.Value("int64"),
    }
)
COLUMNS = {"image": "img", "caption": "text"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return store(tmp_path_factory.mktemp("stored"))


def store(folder, last="text 24"):
    """The same 25 rows in each format; row 3 has no image, row 11 no text, the last row the `last` text."""
    columns = {
        "img": [None if n == 3 else {"bytes": png(n), "path": None} for n in range(ROWS)],
        "same": [{"bytes": png(n // 2), "path": None} for n in range(ROWS)],
        "text": [None if n == 11 else f"text {n}" for n in range(ROWS - 1)] + [last],
        "n": [n // 2 for n in range(ROWS)],
    }
    dataset = datasets.Dataset.from_dict(columns, features=FEATURES)
    for number, rows in enumerate((range(15), range(15, ROWS))):
        dataset.select(rows).to_parquet(folder / "parquet" / f"{number}.parquet", batch_size=4)
    dataset.save_to_disk(folder / "saved")
    images(folder / "jsonl", *(f"{n}.png" for n in range(ROWS)))
    paths = [None if n == 3 else f"{n}.png" for n in range(ROWS)]
    rows = [{"img": path, "text": columns["text"][n], "n": n // 2} for n, path in enumerate(paths)]
    write(folder / "jsonl" / "0.jsonl", rows[:15])
    write(folder / "jsonl" / "1.jsonl", rows[15:])
    for number, some in enumerate((range(15), range(15, ROWS))):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for n in some:
                for name, content in (
                    (f"{n:03}.png", png(n)),
                    (f"{n:03}.txt", (last if n == ROWS - 1 else f"text {n}").encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
    return folder


SOURCES = {
    "parquet": {"path": "parquet", "columns": COLUMNS},
    "parquet_files": {"path": "parquet", "data_files": "parquet/*.parquet", "columns": COLUMNS},
    "saved": {"path": "saved", "columns": COLUMNS},
    "jsonl": {"path": "json", "data_files": "jsonl/*.jsonl", "images": "jsonl", "columns": COLUMNS},
    "webdataset": {"path": "webdataset", "data_files": "*.tar", "columns": {"image": "png", "caption": "txt"}},
}


def pieces_of(stored, name, **options):
    return in_pieces({"format": "dataset", **SOURCES[name], "streaming": True, **options}, stored, lambda source: [])


def all_rows(pieces):
    return [(Place(i, row), content) for i in range(len(pieces)) for row, content in enumerate(pieces.rows(i))]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(stream_sources, "ROWS_IN_A_PIECE", 6)
    monkeypatch.setattr(stream_sources, "ROWS_AT_ONCE", 3)


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_in_pieces_is_the_source_read_whole(stored, name):
    pieces = pieces_of(stored, name)
    found = pieces.examples(all_rows(pieces))
    wanted = read({"format": "dataset", **SOURCES[name]}, base_dir=stored)
    assert len(wanted.examples) == (ROWS if name == "webdataset" else ROWS - 2)
    assert [example.branches[0].messages for example in found.examples] == [
        example.branches[0].messages for example in wanted.examples
    ]
    assert [level(e.images[0]) for e in found.examples] == [level(e.images[0]) for e in wanted.examples]
    assert [(problem.key, problem.why) for problem in found.problems] == [
        (problem.key, problem.why) for problem in wanted.problems
    ]
    assert len({example.where for example in found.examples}) == len(found.examples)


@pytest.mark.parametrize("name", SOURCES)
def test_a_piece_is_read_from_any_row(stored, name):
    pieces = pieces_of(stored, name)
    assert len(pieces) > 1
    for piece in range(len(pieces)):
        whole = list(pieces.rows(piece))
        for start in range(len(whole) + 1):
            assert list(pieces.rows(piece, start)) == whole[start:]


def test_rows_are_counted_where_that_is_cheap(stored):
    assert {name: pieces_of(stored, name).num_rows for name in SOURCES} == {
        "parquet": ROWS, "parquet_files": ROWS, "saved": ROWS, "jsonl": None, "webdataset": None,
    }  # fmt: skip
    assert len(pieces_of(stored, "parquet")) == 7, "row groups of four: four of 15 rows, three of 10"


def test_rows_are_known_where_a_card_says_them(stored, tmp_path):
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes((stored / name).read_bytes())
    info = f"dataset_info:\n  splits:\n  - name: train\n    num_examples: {ROWS}\n"
    (tmp_path / "README.md").write_text(f"---\n{info}---\n")
    assert pieces_of(tmp_path, "webdataset", path=".", data_files=None).num_rows == ROWS


@pytest.mark.parametrize("name", SOURCES)
def test_a_change_in_the_last_row_is_seen_without_reading_it(stored, tmp_path, name):
    outline = pieces_of(stored, name).outline
    assert json.loads(json.dumps(pieces_of(store(tmp_path / "same"), name).outline)) == outline or name == "saved"
    assert pieces_of(stored, name).outline == outline
    assert pieces_of(store(tmp_path / "other", "x" * 20_000), name).outline != outline


def test_a_large_row_group_is_read_through_a_buffer(stored, monkeypatch):
    whole = all_rows(pieces_of(stored, "parquet"))
    opened = []
    original = stream_sources._open_parquet
    monkeypatch.setattr(stream_sources, "BUFFER_FROM", 0)
    monkeypatch.setattr(
        stream_sources, "_open_parquet", lambda file, buffered: opened.append(buffered) or original(file, buffered)
    )
    pieces = pieces_of(stored, "parquet")
    assert isinstance(pieces, ParquetRowGroups)
    assert all_rows(pieces) == whole
    assert True in opened


def test_bad_rows_are_named_with_their_file(stored):
    pieces = pieces_of(stored, "parquet")
    problems = pieces.examples(all_rows(pieces)).problems
    folder = stored / "parquet"
    assert [str(problem).partition(";")[0] for problem in problems] == [
        f"{folder}/0.parquet:row 3: image: no image in column 'img'",
        f"{folder}/0.parquet:row 11: nothing to answer: 'caption' is null",
    ]


def test_rows_of_one_image_are_one_example(stored):
    pieces = pieces_of(stored, "parquet", columns=COLUMNS | {"image": "same", "image_id": "n"})
    examples = pieces.examples(list(islice(all_rows(pieces), 12, 20))).examples
    assert [len(example.branches) for example in examples] == [2, 2, 2, 2]


def test_files_that_are_elsewhere(stored):
    """By fsspec, as those of the Hub."""
    memory = fsspec.filesystem("memory")
    for number in range(2):
        memory.pipe(f"/shards/{number}.parquet", (stored / f"parquet/{number}.parquet").read_bytes())
    there, here = (
        pieces_of(stored, "parquet_files", data_files="memory://shards/*.parquet"),
        pieces_of(stored, "parquet"),
    )
    assert all_rows(there) == all_rows(here)
    assert there.num_rows == ROWS
    assert there.where(Place(5, 2)) == "memory:///shards/1.parquet:row 6"


def test_what_is_read_whole_is_in_pieces_too(stored):
    examples = read({"format": "dataset", **SOURCES["parquet"]}, base_dir=stored).examples
    source = {"format": "dataset", **SOURCES["parquet"]}
    pieces = in_pieces(source, stored, lambda asked: examples if asked == source else [])
    assert isinstance(pieces, InMemory)
    assert pieces.num_rows == len(examples)
    assert len(pieces) == 4
    assert pieces.examples(all_rows(pieces)).examples == examples


@pytest.mark.parametrize("name", SOURCES)
def test_errors(stored, name):
    with pytest.raises(SourceError, match=r"option 'columns.caption': no column 'txet'.* did you mean 'te?xt'"):
        pieces_of(stored, name, columns=SOURCES[name]["columns"] | {"caption": "txet"})
    with pytest.raises(SourceError, match="'limit' does not go with 'streaming'"):
        pieces_of(stored, name, limit=3)
    if name != "saved":
        with pytest.raises(SourceError, match="split 'tset'"):
            pieces_of(stored, name, split="tset")


def test_a_damaged_file_is_named(stored, tmp_path):
    content = (stored / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[: 10 * 1024 + 520])
    pieces = pieces_of(tmp_path, "webdataset")
    with pytest.raises(SourceError, match=r"0\.tar:row 5: cannot be read"):
        list(pieces.rows(0))
    content = bytearray((stored / "parquet/0.parquet").read_bytes())
    content[4:2000] = bytes(1996)
    (tmp_path / "parquet").mkdir()
    (tmp_path / "parquet/0.parquet").write_bytes(content)
    with pytest.raises(SourceError, match=r"0\.parquet:row 0: cannot be read"):
        list(pieces_of(tmp_path, "parquet").rows(0))


def test_rows_behind_a_damaged_header_are_not_lost_in_silence(stored, tmp_path):
    """`datasets` ends there, as if the file did."""
    with tarfile.open(stored / "0.tar") as tar:
        place = tar.getmember("009.png").offset
    content = bytearray((stored / "0.tar").read_bytes())
    content[place : place + 100] = b"?" * 100
    (tmp_path / "0.tar").write_bytes(content)
    pieces = pieces_of(tmp_path, "webdataset")
    with pytest.raises(SourceError, match=rf"0\.tar:row 9: cannot be read \(no header at byte {place:,} of .*0\.tar"):
        list(pieces.rows(0))
    with pytest.raises(SourceError, match=f"no header at byte {place:,} of"):
        read({"format": "dataset", **SOURCES["webdataset"]}, base_dir=tmp_path)


def test_files_that_are_not_there(tmp_path):
    source = {"format": "dataset", "path": "parquet", "data_files": "no/*.parquet", "columns": COLUMNS}
    with pytest.raises(SourceError, match=r"no file matches .*no/\*\.parquet"):
        in_pieces(source | {"streaming": True}, tmp_path, lambda source: [])
