"""An index that is brought up to date against one that is made from scratch, and what is encoded for it."""

import os

import pytest
import torch
from PIL import Image

from tests.retrieval.conftest import picture
from vlm.data.image_files import find_images
from vlm.embedding import load_embedder
from vlm.index import key_of
from vlm.retrieval import update as module
from vlm.retrieval.index import ImageIndex
from vlm.retrieval.update import update


class Watched:
    """An embedder that notes what it encodes, and may be interrupted after so many batches."""

    def __init__(self, embedder):
        self.embedder, self.encoded, self.left = embedder, [], None
        self.before_batch = lambda: None

    def embed_images(self, images, **options):
        for batch in self.embedder.embed_images(images, **options):
            self.before_batch()
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            self.encoded += [os.path.basename(path) for path in batch.images]
            yield batch


@pytest.fixture
def watched(clip):
    return Watched(load_embedder(str(clip)))


@pytest.fixture
def bring(watched, tmp_path, console):
    """Brings an index up to date: `bring(folder of photos)` gives what changed and what was encoded."""

    def run(*patterns, name="index"):
        folder, watched.encoded = tmp_path / name, []
        new = ImageIndex(folder, str(watched.embedder.name), key_of(watched.embedder))
        index = ImageIndex.open(folder) if (folder / "index.json").exists() else new
        changes = update(index, find_images([str(pattern) for pattern in patterns]).paths, watched, console=console)
        return changes, sorted(watched.encoded)

    return run


def hits(folder, watched):
    """For twenty other images, the scores of all that the index holds, by file."""
    index = ImageIndex.open(folder)
    (batch, *more) = watched.embedder.embed_images({str(n): picture(100 + n) for n in range(20)}, broken={})
    vectors = torch.cat([batch.features, *(other.features for other in more)]).numpy()
    return [{hit.path: hit.score for hit in index.search(vector, 100)} for vector in vectors]


def check_alike(folder, other, watched):
    """Two indices have the same files, with the same vectors."""
    for ours, theirs in zip(hits(folder, watched), hits(other, watched), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_brought_up_to_date_it_is_as_made_from_scratch(photos, bring, watched, tmp_path):
    (photos / "broken.png").write_bytes(b"not an image")
    changes, encoded = bring(photos)
    assert (changes.new, len(encoded), len(changes.broken)) == (20, 20, 1)

    picture(50).save(photos / "new.png")
    picture(51).save(photos / "03.png")
    (photos / "04.png").unlink()
    (photos / "05.png").rename(photos / "more" / "moved.png")
    (photos / "06.png").write_bytes(b"no longer an image")
    os.utime(photos / "07.png", ns=(1, 1))
    (photos / "08.png").write_bytes(b"")
    changes, encoded = bring(photos)
    assert encoded == ["03.png", "new.png"]
    assert str(changes) == "1 new, 1 changed, 1 moved, 1 gone, 15 as before, 3 could not be opened"
    assert sorted(os.path.basename(error.where) for error in changes.broken) == ["06.png", "08.png", "broken.png"]
    assert {name.path for name in ImageIndex.open(tmp_path / "index").files().values()} == {
        str(path) for path in photos.rglob("*.png") if path.name not in ("06.png", "08.png", "broken.png")
    }

    bring(photos, name="from scratch")
    check_alike(tmp_path / "index", tmp_path / "from scratch", watched)
    changes, encoded = bring(photos)
    assert (str(changes), encoded) == ("18 as before, 3 could not be opened", [])


def test_what_was_broken_is_tried_again(photos, bring):
    (photos / "late.png").write_bytes(b"still downloading")
    bring(photos)
    picture(60).save(photos / "late.png")
    changes, encoded = bring(photos)
    assert (str(changes), encoded) == ("1 new, 20 as before", ["late.png"])


def test_files_not_named_stay_and_are_forgotten_once_they_are_gone(photos, bring, tmp_path):
    bring(photos)
    changes, _ = bring(photos / "more")
    assert str(changes) == "4 as before"
    assert len(ImageIndex.open(tmp_path / "index")) == 20
    (photos / "00.png").unlink()
    changes, _ = bring(photos / "more")
    assert str(changes) == "1 gone, 4 as before"


def test_a_file_with_other_content_of_the_same_size_is_changed(photos, bring, watched, tmp_path):
    Image.new("RGB", (32, 32), (200, 10, 10)).save(photos / "a.bmp")
    bring(photos)
    Image.new("RGB", (32, 32), (10, 10, 200)).save(photos / "a.bmp")
    os.utime(photos / "a.bmp", ns=(2, 2))
    assert bring(photos)[1] == ["a.bmp"]
    bring(photos, name="from scratch")
    check_alike(tmp_path / "index", tmp_path / "from scratch", watched)


def test_copies_that_are_moved_are_both_followed(photos, bring):
    for name in ("a", "b"):
        picture(0).save(photos / f"copy_{name}.png")
    bring(photos)
    for name in ("a", "b"):
        (photos / f"copy_{name}.png").rename(photos / "more" / f"{name}.png")
    changes, encoded = bring(photos)
    assert (changes.moved, changes.gone, encoded) == (2, 0, [])


def test_interrupted_it_keeps_what_is_encoded(photos, bring, watched, tmp_path):
    watched.left = 1
    with pytest.raises(KeyboardInterrupt):
        bring(photos)
    assert len(ImageIndex.open(tmp_path / "index")) == 16
    watched.left = None
    changes, encoded = bring(photos)
    assert (str(changes), len(encoded)) == ("4 new, 16 as before", 4)
    bring(photos, name="from scratch")
    check_alike(tmp_path / "index", tmp_path / "from scratch", watched)


def test_it_is_saved_while_it_is_made(photos, bring, watched, tmp_path, monkeypatch):
    """For those who are killed, and cannot save."""
    seen = []

    def look():
        there = (tmp_path / "index" / "index.json").exists()
        seen.append(len(ImageIndex.open(tmp_path / "index")) if there else None)

    watched.before_batch = look
    bring(photos)
    assert seen == [None, None]
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(module, "SAVE_SHARE", 1e9)
    for n in range(33):
        picture(200 + n).save(photos / f"{n}.jpg")
    bring(photos)
    assert seen[2:] == [20, 36, 52]
