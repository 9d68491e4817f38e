"""An index on disk: what comes back, and what is there after being killed while it is written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from vlm.errors import UserError
from vlm.retrieval import index as module
from vlm.retrieval.index import ImageIndex, IndexedFile
from vlm.retrieval.vectors import VectorIndex

NAMES = ["/a/plain.png", "/a/日本語 café.jpg", "/a/two\nlines.png", os.fsdecode(b"/a/\xff\xfe.png"), '/a/"<b>.png']


def vectors(count, seed=0):
    drawn = np.random.default_rng(seed).standard_normal((count, 8)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def files(names):
    return [IndexedFile(name, 10 * n, 10**18 + n, f"{n:064x}") for n, name in enumerate(names)]


@pytest.fixture
def saved(tmp_path):
    index = ImageIndex(tmp_path / "index", "encoder", "key")
    index.add(files(NAMES), vectors(5))
    index.save()
    return tmp_path / "index"


def found(folder):
    """What each vector finds first, itself, by name."""
    index = ImageIndex.open(folder)
    return [index.search(vector, 1)[0].path for vector in vectors(5)]


def test_files_of_any_name_come_back_with_their_vectors(saved):
    index = ImageIndex.open(saved)
    assert (index.encoder, index.encoder_key, len(index)) == ("encoder", "key", 5)
    assert list(index.files().values()) == files(NAMES)
    assert found(saved) == NAMES
    index.remove([1, 3])
    index.replace(0, IndexedFile("/b/moved.png", 1, 2, "0"))
    index.add(files(["/a/new.png"]), vectors(1, seed=1))
    index.save()
    again = ImageIndex.open(saved)
    names = {number: file.path for number, file in again.files().items()}
    assert names == {0: "/b/moved.png", 2: NAMES[2], 4: NAMES[4], 5: "/a/new.png"}
    assert again.search(vectors(1, seed=1)[0], 1)[0].path == "/a/new.png"
    assert again.search(vectors(5)[0], 1)[0].path == "/b/moved.png"
    assert again.search(vectors(5)[4], 1)[0].score == pytest.approx(1)
    assert not {NAMES[1], NAMES[3]} & {hit.path for hit in again.search(vectors(5)[1], 10)}
    assert sorted(path.name.split("-")[0] for path in saved.iterdir()) == ["content", "index.json"]


class Killed(BaseException):
    pass


def kill(*args, **kwargs):
    raise Killed


KILLED_AT = [
    (VectorIndex, "write"),
    (os, "fsync"),
    (Path, "rename"),
    (Path, "replace"),
    (module.shutil, "rmtree"),
]


@pytest.mark.parametrize(("owner", "step"), KILLED_AT)
def test_killed_while_it_is_written_it_is_as_before_or_as_after(saved, monkeypatch, owner, step):
    index = ImageIndex.open(saved)
    index.remove([0])
    index.add(files(["/a/new.png"]), vectors(1, seed=1))
    with monkeypatch.context() as patched:
        patched.setattr(owner, step, kill)
        with pytest.raises(Killed):
            index.save()
    after = step == "rmtree"  # the new one counts already, and the old one is in the way
    assert len(list(saved.glob("content-*"))) == (2 if after else 1)
    assert len(list(saved.iterdir())) == (3 if after else 2), "a disk without room needs it"
    assert found(saved) == NAMES if not after else "/a/new.png" in str(ImageIndex.open(saved).files())
    again = ImageIndex.open(saved)
    again.add(files(["/a/newer.png"]), vectors(1, seed=2))
    again.save()
    assert ImageIndex.open(saved).search(vectors(1, seed=2)[0], 1)[0].path == "/a/newer.png"
    assert len(list(saved.glob("content-*"))) == 1


def test_a_change_that_was_interrupted_is_not_saved(saved, monkeypatch):
    """Ctrl-C may come between the vector and the name."""
    index = ImageIndex.open(saved)
    index.remove([0])
    with monkeypatch.context() as patched:
        patched.setattr(module, "_line", kill)
        with pytest.raises(Killed):
            index.add(files(["/a/new.png"]), vectors(1, seed=1))
    index.save()
    assert found(saved) == NAMES


def test_nothing_is_written_if_nothing_changed(saved):
    before = (saved / "index.json").read_bytes()
    index = ImageIndex.open(saved)
    index.replace(0, index.files()[0])
    index.remove([])
    index.save()
    assert (saved / "index.json").read_bytes() == before


def test_of_two_that_write_at_once_the_second_is_told(saved):
    first, second = ImageIndex.open(saved), ImageIndex.open(saved)
    first.remove([0])
    first.save()
    second.remove([1])
    with pytest.raises(UserError, match="was changed by another vlm index meanwhile"):
        second.save()
    assert sorted(ImageIndex.open(saved).files()) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "index.json").unlink(), "is no index: .*index.json is missing"),
        (lambda folder: (folder / "index.json").write_text("{"), "is no index, or damaged"),
        (lambda folder: (folder / "index.json").write_text('{"format": 9}'), "has format 9, and 2 is read"),
        (lambda folder: next(folder.glob("*/files.jsonl")).write_bytes(b"{}\n"), "files and vectors are not as many"),
        (lambda folder: next(folder.glob("*/vectors.npy")).write_bytes(b"IwFl"), "content-.* is damaged"),
    ],
)
def test_what_is_no_index_or_damaged_is_refused(saved, spoil, message):
    spoil(saved)
    with pytest.raises(UserError, match=message):
        ImageIndex.open(saved)


def test_it_is_plain_files(saved):
    about = json.loads((saved / "index.json").read_text())
    lines = (saved / about["content"] / "files.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == NAMES


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("files.jsonl", lambda text: text.replace(b'"path"', b'"pth"')),
        ("files.jsonl", lambda text: b"x\n" * text.count(b"\n")),
        ("files.jsonl", lambda text: b'{"path": 7, "size": 1, "mtime_ns": 1, "sha256": ""}\n' * text.count(b"\n")),
        ("files.jsonl", lambda text: b"[1]\n" * text.count(b"\n")),
        ("files.jsonl", lambda text: b"[" * 100_000 + b"\n" * text.count(b"\n")),
        ("vectors.npy", lambda text: b""),
        ("vectors.npy", lambda text: text[:20]),
        ("vectors.npy", lambda text: text.replace(b"<f4", b"<i4")),
        ("index.json", lambda text: text.replace(b"content-", b"../content-")),
        ("index.json", lambda text: b"[]"),
        ("index.json", lambda text: b"[" * 100_000),
        ("index.json", lambda text: b'{"format": 2, "encoder": 7, "encoder_key": "x", "content": "y"}'),
    ],
)
def test_damaged_files_are_named(tmp_path, name, change):
    index = ImageIndex(tmp_path, "some/encoder", "key")
    files = [IndexedFile(f"/photos/{n}.png", n, n, "0" * 64) for n in range(3)]
    index.add(files, np.eye(3, 8, dtype=np.float32))
    index.save()
    assert [hit.path for hit in ImageIndex.open(tmp_path).search(np.eye(3, 8)[1], 1)] == ["/photos/1.png"]
    path = next(tmp_path.rglob(name))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=f"{tmp_path}.* make the index anew"):
        ImageIndex.open(tmp_path).search(np.ones(8), 3)


def test_vectors_of_another_length_are_named(tmp_path):
    index = ImageIndex(tmp_path, "some/encoder", "key")
    index.add([IndexedFile("/a.png", 1, 1, "0" * 64)], np.ones((1, 8), dtype=np.float32))
    with pytest.raises(UserError, match=r"its vectors have 8 numbers, and those of some/encoder 4"):
        index.search(np.ones(4), 1)
