"""The images that folders hold are found, whatever other systems call them, and what is left out is said."""

import os
from pathlib import Path

import pytest
from PIL import Image

from vlm.data.image_files import IMAGE_SUFFIXES, find_images, has_image_suffix
from vlm.data.images import open_image
from vlm.errors import UserError

KINDS = {
    "jfif": "JPEG", "jpe": "JPEG", "JPG": "JPEG", "mpo": "MPO", "tga": "TGA", "vda": "TGA", "ico": "ICO", "pgm": "PPM",
    "pbm": "PPM", "pnm": "PPM", "j2k": "JPEG2000", "jpx": "JPEG2000", "jp2": "JPEG2000", "apng": "PNG", "dib": "DIB",
    "Bmp": "BMP", "TIFF": "TIFF", "tif": "TIFF", "webp": "WEBP", "avif": "AVIF", "gif": "GIF",
}  # fmt: skip


@pytest.mark.parametrize("suffix", KINDS)
def test_every_kind_that_opens_is_found_by_its_name(tmp_path: Path, suffix: str) -> None:
    kind = KINDS[suffix]
    more = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]} if kind == "MPO" else {}
    mode = {"pgm": "L", "pbm": "1"}.get(suffix, "RGB")
    Image.new(mode, (16, 16)).save(tmp_path / f"a.{suffix}", kind, **more)
    found = find_images([str(tmp_path)])
    assert found.paths == [str(tmp_path / f"a.{suffix}")]
    assert found.left_out() == []
    assert open_image(found.paths[0]).size == (16, 16)


def test_only_what_opens_counts_as_an_image() -> None:
    assert {".png", ".jpeg"} <= IMAGE_SUFFIXES
    assert IMAGE_SUFFIXES.isdisjoint({".eps", ".psd", ".pdf", ".svg", ".txt", ""})
    assert has_image_suffix("photo.JPG ")  # as some cameras and old systems write it


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    names = [
        "a.png", "deep/b.png", ".trash/c.png", ".trash/more/d.png", ".ipynb_checkpoints/a.png", "__MACOSX/._a.png",
        "deep/@eaDir/e.png", "._a.png", ".hidden.png", "Thumbs.db", "deep/notes.txt", "README", "desktop.ini",
    ]  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_hidden_images_and_files_of_other_types_are_left_out_and_counted(messy: Path) -> None:
    found = find_images([str(messy)])
    assert found.paths == [str(messy / "a.png"), str(messy / "deep/b.png")]
    hidden, others = found.left_out()
    assert hidden.startswith("7 hidden images (")
    for place, count in {".trash": 2, ".ipynb_checkpoints": 1, "__MACOSX": 1, "deep/@eaDir": 1, "": 2}.items():
        assert f"{messy / place}: {count}" in hidden
    assert others == f"2 files of other types ({messy / 'README'}, {messy / 'deep/notes.txt'})"


def test_a_hidden_folder_can_be_named(messy: Path) -> None:
    assert len(find_images([str(messy / ".trash")]).paths) == 2
    assert find_images([str(messy / ".trash" / "*.png")]).paths == [str(messy / ".trash/c.png")]


def test_globs_leave_hidden_folders_out_too(messy: Path) -> None:
    found = find_images([str(messy / "**" / "*.png")])
    assert found.paths == [str(messy / "a.png"), str(messy / "deep/b.png")]
    assert found.left_out() == ["1 hidden image (@eaDir/: 1)"], "a glob matches nothing that begins with a dot"


def test_links_are_followed_and_never_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").touch()
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "back").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    assert find_images([str(folder)]).paths == [str(folder / "gone.png"), str(folder / "link" / "a.png")]


def test_names_of_any_bytes(tmp_path: Path) -> None:
    for name in (b"caf\xe9.png", b"line\nend.png", b"\x1b[2J.png", b"back\\slash%20.png"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9\x1b.txt")).touch()
    found = find_images([str(tmp_path)])
    assert len(found.paths) == 4
    assert found.left_out() == [f"1 file of other types ({tmp_path}/\\xe9\\x1b.txt)"]


def test_an_empty_folder_says_what_is_in_it(messy: Path) -> None:
    (messy / "a.png").unlink()
    (messy / "deep/b.png").unlink()
    with pytest.raises(UserError, match=r"has no images in it; left out: 7 hidden images .*2 files of other types"):
        find_images([str(messy)])


@pytest.mark.parametrize("text", ["a" * 5000, "~nobody-of-that-name cat", "a\0b"])
def test_what_is_no_name_of_a_file_finds_nothing(text: str) -> None:
    with pytest.raises(UserError, match="is no file or folder"):
        find_images([text])
