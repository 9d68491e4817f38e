"""The stamps: what becomes of a Debian package of them, and how they are split."""

import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.quickstart_packages import make_deb, rows_of, stamp_files
from vlm.quickstart import datasets


@pytest.fixture
def stamps(tmp_path) -> tuple[Path, datasets.StampCounts]:
    deb = make_deb(tmp_path / "stamps.deb", stamp_files())
    (tmp_path / "stamps").mkdir()
    return tmp_path / "stamps", datasets.convert_stamps(deb, tmp_path / "stamps")


def test_stamps_become_squares_on_white_with_captions(stamps):
    root, counts = stamps
    rows = {row["file_name"]: row for row in rows_of(root / "metadata.jsonl")}
    assert rows["images/animals/frog.png"] == {
        "file_name": "images/animals/frog.png",
        "category": "animals",
        "captions": ["A frog."],
    }
    frog = Image.open(root / "images/animals/frog.png")
    assert (frog.size, frog.mode) == ((8, 8), "RGB")
    assert [frog.getpixel((4, y)) for y in (0, 4, 7)] == [(255, 255, 255), (0, 255, 0), (255, 255, 255)]
    assert Image.open(root / "images/animals/big.png").size == (448, 448)
    assert Image.open(root / "images/shapes/twice.png").getpixel((224, 224)) == (0, 0, 255)  # the SVG
    assert Image.open(root / "images/shapes/letter.png").getpixel((4, 4)) == (255, 0, 0)  # the PNG: text needs fonts
    assert counts.kept == len(rows) == 5
    assert counts.twins == 2
    translations = {row["file_name"]: row["captions"] for row in rows_of(root / "translations.jsonl")}
    assert translations["images/animals/frog.png"] == {"en": "A frog.", "de": "Ein Frosch.", "fr": "A frog."}


def test_dropped_stamps_are_counted_and_named(stamps):
    _, counts = stamps
    assert set(counts.dropped) == {"shapes/frog_mirror", "shapes/white", "shapes/clear", "shapes/broken"}
    assert counts.dropped["shapes/frog_mirror"] == "no caption"
    assert "4 dropped" in str(counts)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb to compare with")
def test_deb_is_read_as_dpkg_writes_it(tmp_path):
    """Against the real tool."""
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    (tree / "usr" / "share").mkdir(parents=True)
    (tree / "usr" / "share" / "odd").write_bytes(b"123")
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree), str(tmp_path / "x.deb")],
        check=True,
        capture_output=True,
    )
    assert dict(datasets.deb_members(tmp_path / "x.deb")) == {"usr/share/odd": b"123"}


def test_what_is_no_deb_says_so(tmp_path):
    (tmp_path / "x.deb").write_bytes(b"<html>")
    with pytest.raises(datasets.DataError, match=r"x\.deb is not a Debian package"):
        list(datasets.deb_members(tmp_path / "x.deb"))


@pytest.mark.parametrize("seed", range(5))
def test_no_caption_is_on_both_sides_of_the_split(stamps, seed):
    root, _ = stamps
    train, test = datasets.write_stamp_splits(root, seed=seed, n_test=2)
    sides = [
        {row["captions"][0].lower().rstrip(".").replace("  ", " ") for row in rows_of(path)} for path in (train, test)
    ]
    assert not sides[0] & sides[1]
    assert len(rows_of(train)) + len(rows_of(test)) == 5
    assert len(rows_of(test)) == 2
    before = test.read_text()
    datasets.write_stamp_splits(root, seed=seed, n_test=2)
    assert test.read_text() == before


def test_splits_differ_by_seed(stamps):
    root, _ = stamps
    assert len({datasets.write_stamp_splits(root, seed=seed, n_test=2)[1].read_text() for seed in range(8)}) > 1


def test_languages_come_after_english_and_untranslated_ones_do_not(stamps):
    root, _ = stamps
    train, test = datasets.write_stamp_splits(root, n_test=2, languages=["fr", "de"], train_name="a", test_name="b")
    rows = {row["file_name"]: row["captions"] for path in (train, test) for row in rows_of(path)}
    assert (train.name, test.name) == ("a", "b")
    assert rows["images/animals/frog.png"] == [
        "A frog.",
        {"prompt": "Describe the image in German.", "caption": "Ein Frosch."},
    ]
    assert rows["images/animals/big.png"] == ["A whale."]


def test_an_unknown_language_and_too_many_test_rows(stamps):
    root, _ = stamps
    with pytest.raises(datasets.DataError, match="No prompt is known for xx"):
        datasets.write_stamp_splits(root, languages=["xx"], n_test=2)
    with pytest.raises(datasets.DataError, match="between 1 and 4"):
        datasets.write_stamp_splits(root, n_test=5)
