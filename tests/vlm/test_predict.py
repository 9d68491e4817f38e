"""Predicting on many images: which files, which rows, and going on after a stop."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from vlm.data.image_files import find_images
from vlm.errors import UserError
from vlm.predict import Counts, Request, _report, predict


class Namer:
    """Answers with the width of the image; stops like a crash after `stop_after` batches."""

    def __init__(self, stop_after: int = 99) -> None:
        self.batches: list[int] = []
        self.stop_after = stop_after

    def __call__(self, requests: list[Request]) -> list[str]:
        if len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        self.batches.append(len(requests))
        assert all(messages[0]["content"][1:] == [{"type": "text", "text": "what?"}] for _, messages in requests)
        return [f"{images[0].size[0]} wide\nand \u2028 ü" for images, _ in requests]


@pytest.fixture(autouse=True)
def two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.data.images.CHUNK", 2)


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(1, 8):
        Image.new("RGB", (i, 4)).save(folder / f"{i}.png")
    (folder / "4.png").write_bytes(b"not an image")
    return find_images([str(folder)]).paths


def run(photos: list[str], output: Path, namer: Namer | None = None, **changes: Any) -> Counts:
    settings = {"prompt": "what?", "model": "m"} | changes
    return predict(namer or Namer(), photos, output=output, **settings)


def rows(output: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in output.read_text().split("\n") if line]


def test_one_row_an_image_in_order(photos: list[str], tmp_path: Path) -> None:
    steps: list[int] = []
    counts = run(photos, tmp_path / "new" / "out.jsonl", advance=steps.append)
    assert counts == Counts(done=6, earlier=0, broken=1)
    assert sum(steps) == 7
    written = rows(tmp_path / "new" / "out.jsonl")
    assert [row["image"] for row in written] == photos
    assert written[0] == {"image": photos[0], "prompt": "what?", "model": "m", "prediction": "1 wide\nand \u2028 ü"}
    assert "not an image" in written[3]["error"]
    assert "prediction" not in written[3]


def test_a_second_run_adds_what_is_missing(photos: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(photos[:3], output)
    first = output.read_bytes()
    namer = Namer()
    assert run(photos, output, namer) == Counts(done=3, earlier=3, broken=1)
    assert sum(namer.batches) == 3
    assert output.read_bytes().startswith(first)
    assert run(photos, output, Namer(stop_after=0)) == Counts(done=0, earlier=7, broken=0, earlier_broken=1)
    assert [row["image"] for row in rows(output)] == photos


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
def test_stopped_anywhere_and_continued_it_is_the_undisturbed_file(
    photos: list[str], tmp_path: Path, batches: int
) -> None:
    run(photos, tmp_path / "whole.jsonl")
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(photos, output, Namer(stop_after=batches))
    run(photos, output)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_cut_at_any_byte_it_is_repaired(photos: list[str], tmp_path: Path) -> None:
    run(photos, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    output = tmp_path / "out.jsonl"
    for length in range(0, len(whole), 13):
        output.write_bytes(whole[:length])
        run(photos, output)
        assert output.read_bytes() == whole


def test_answers_of_other_weights_or_settings_are_not_continued(photos: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    settings = {"weights": "aa", "max_new_tokens": 4}
    run(photos[:2], output, settings=settings)
    assert rows(output)[0] | {"prediction": ""} == {
        "image": photos[0], "prompt": "what?", "model": "m", "weights": "aa", "max_new_tokens": 4, "prediction": ""
    }  # fmt: skip
    before = output.read_bytes()
    with pytest.raises(UserError, match=r"with other weights of this model \(aa, and now bb\)"):
        run(photos, output, settings=settings | {"weights": "bb"})
    with pytest.raises(UserError, match="with max_new_tokens 4, and this is 5"):
        run(photos, output, settings=settings | {"max_new_tokens": 5})
    assert output.read_bytes() == before
    assert run(photos, output, settings=settings).earlier == 2
    run(photos, tmp_path / "old.jsonl")
    with pytest.raises(UserError, match="without a record of weights"):
        run(photos, tmp_path / "old.jsonl", settings=settings)


def test_a_request_that_cannot_be_answered_is_one_row(photos: list[str], tmp_path: Path) -> None:
    output, namer = tmp_path / "out.jsonl", Namer()

    def why(request: Request) -> str:
        return "too long" if request[0][0].size[0] in (2, 3, 7) else ""

    assert run(photos, output, namer, why_refused=why) == Counts(done=3, earlier=0, broken=4)
    assert [row["image"] for row in rows(output)] == photos
    assert [row.get("error", row.get("prediction", ""))[:8] for row in rows(output)] == [
        "1 wide\na", "too long", "too long", rows(output)[3]["error"][:8], "5 wide\na", "6 wide\na", "too long"
    ]  # fmt: skip
    assert sum(namer.batches) == 3
    assert run(photos, output) == Counts(done=3, earlier=4, broken=0, earlier_broken=1)


@pytest.mark.parametrize(("key", "now"), [("prompt", "why?"), ("model", "n")])
def test_another_prompt_or_model_is_refused(photos: list[str], tmp_path: Path, key: str, now: str) -> None:
    output = tmp_path / "out.jsonl"
    run(photos[:2], output)
    before = output.read_bytes()
    with pytest.raises(UserError, match=f"was written with {key} .* and this is '{now[0]}"):
        run(photos, output, **{key: now})
    assert output.read_bytes() == before


OTHERS = [
    b"{}\n", b"[1]\n", b"text\n", b"\xff\n", b'{"image": 1}\n', b"\n", b"text", b"[1]",
    b'{"image": "a", "caption": "b"}',
    b'{"image": ["a"], "prompt": "what?", "model": "m", "prediction": "b"}\n',
    b'{"image": "a", "prompt": "what?", "model": "m"}\n',
    b'{"image": "a", "prompt": "what?", "model": "m", "prediction": null}\n',
]  # fmt: skip


@pytest.mark.parametrize("line", OTHERS)
def test_a_file_of_something_else_is_refused_untouched(photos: list[str], tmp_path: Path, line: bytes) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(line)
    with pytest.raises(UserError, match="line 1: not a row of `vlm predict`"):
        run(photos, output)
    assert output.read_bytes() == line


def test_files_folders_and_globs_each_once(photos: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    deep = folder / "a" / "b"
    deep.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(deep / "x[1].JPG")
    (folder / "notes.txt").write_text("no image")
    assert find_images([str(folder)]).paths == [*photos, str(deep / "x[1].JPG")]
    assert find_images([photos[1], str(folder / "*.png")]).paths == [photos[1], photos[0], *photos[2:]]
    assert find_images([str(deep / "x[1].JPG")]).paths == [str(deep / "x[1].JPG")]
    assert find_images([str(folder / "**" / "*.JPG")]).paths == [str(deep / "x[1].JPG")]


@pytest.mark.parametrize(
    ("name", "message"), [("none.png", "is no file"), ("empty", "no images in it"), ("*.gif", "no file matches")]
)
def test_a_pattern_that_finds_nothing(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_images([str(tmp_path / name)])


def test_names_of_any_bytes_are_answered_once(photos: list[str], tmp_path: Path) -> None:
    odd = [os.fsdecode(os.fsencode(photos[0])[:-5] + name) for name in (b"caf\xe9.png", b"line\nend.png")]
    for path in odd:
        os.link(photos[0], path)
    output = tmp_path / "out.jsonl"
    assert run([*photos, *odd], output) == Counts(done=8, earlier=0, broken=1)
    assert [row["image"] for row in rows(output)] == [*photos, *odd]
    assert run([*photos, *odd], output, Namer(stop_after=0)) == Counts(done=0, earlier=9, broken=0, earlier_broken=1)


def test_images_that_open_now_are_answered_and_the_others_keep_their_error(photos: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    Path(photos[5]).rename(tmp_path / "away")
    assert run(photos, output) == Counts(done=5, earlier=0, broken=2)
    before = rows(output)
    (tmp_path / "away").rename(photos[5])
    with pytest.raises(KeyboardInterrupt):
        run(photos, output, Namer(stop_after=0))
    steps: list[int] = []
    assert run(photos, output, advance=steps.append) == Counts(done=1, earlier=6, broken=0, earlier_broken=1)
    assert sum(steps) == 7
    now = {"image": photos[5], "prompt": "what?", "model": "m", "prediction": "6 wide\nand \u2028 ü"}
    assert rows(output) == [*before[:5], before[6], now]
    assert run(photos, output, Namer(stop_after=0)) == Counts(done=0, earlier=7, broken=0, earlier_broken=1)
    console = Console(file=io.StringIO(), width=200)
    _report(Counts(done=1, earlier=6, broken=0, earlier_broken=1), output, console)
    said = '1 predicted, 6 were there already (1 of them with "error", which still cannot be opened): '
    assert console.file.getvalue().startswith(said)  # type: ignore[attr-defined]


def test_an_image_has_one_row_however_its_name_is_spelled(
    photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("photos")
    spelled = ["photos", str(tmp_path / "photos"), "link", "photos/../link"]
    relative = [os.path.relpath(photo) for photo in photos]
    assert find_images(spelled).paths == relative
    every = [image for name in spelled for image in find_images([name]).paths]
    output = tmp_path / "out.jsonl"
    steps: list[int] = []
    assert run(every, output, advance=steps.append) == Counts(done=6, earlier=0, broken=1)
    assert sum(steps) == len(every)
    assert [row["image"] for row in rows(output)] == relative
    assert run(photos, output, Namer(stop_after=0)) == Counts(done=0, earlier=7, broken=0, earlier_broken=1)
    (tmp_path / "photos" / "z.png").symlink_to("1.png")  # a name of its own
    assert run(find_images(["photos"]).paths, output) == Counts(done=1, earlier=7, broken=0, earlier_broken=1)
