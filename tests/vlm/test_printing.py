"""Text from data on a terminal, in a page and in JSON."""

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm import classify, predict, search
from vlm.errors import UserError
from vlm.paths import existing, existing_file, existing_folder, expanded
from vlm.printing import SafeConsole, html_text, json_text, printable, printable_name
from vlm.recognition.labels import read_labels, read_templates

NAME = "\x1b]0;TITLE\x07\x1b[2J\x9b31m\u202ered\u2066\ud83d" + os.fsdecode(b"caf\xe9")


def test_unsafe_characters_are_written_out() -> None:
    assert printable(NAME) == r"\x1b]0;TITLE\x07\x1b[2J\x9b31m\u202ered\u2066\ud83dcaf\xe9"
    assert printable("a\tb\r\nc\rd") == "a\tb\nc\\rd"
    assert printable_name("a\tb\nc") == "a\\tb\\nc"


def test_what_people_write_stays() -> None:
    for text in ("Zürich 東京", "👩‍👩‍👧", "می\u200cخواهم", "שלום\u200f!", "a\u00a0b", "x\u00ady"):
        assert printable(text) == text


def test_a_page_has_neither_markup_nor_overrides_of_the_data() -> None:
    assert html_text("<b>\u202e\x00&'") == r"&lt;b&gt;\u202e\x00&amp;&#x27;"


def test_a_console_writes_no_control_character_of_the_data() -> None:
    file = io.StringIO()
    console = SafeConsole(file=file, force_terminal=True, width=200, color_system="truecolor")
    table = Table(NAME)
    table.add_row(Text(NAME), style="bold")
    with console.status(NAME.replace("[", "")):
        console.print(NAME, markup=False, soft_wrap=True)
        console.print(Text(NAME, style="red"), table)
    out = file.getvalue()
    assert "\x1b[31m" in out, "styles of our own stay"
    out = out.replace("\x1b[2K", "")  # a line of the status is cleared
    for bad in ("\x1b]0", "\x07", "\x1b[2", "\x9b", "\u202e", "\u2066"):
        assert bad not in out
    out.encode()


def test_json_of_any_name_can_be_written_and_gives_the_name_back() -> None:
    row = {"image": NAME, "text": "é東"}
    text = json_text(row)
    assert json.loads(text.encode()) == row
    assert "é東" in text
    assert r"\udce9" in text


@pytest.mark.parametrize(
    "text", ["a" * 5000, "~nobody-of-that-name cat", "a\0b", "\ud83d", "", "a,b,c " * 100, "x/" * 3000]
)
def test_any_text_may_be_asked_about(text: str) -> None:
    assert existing(text) is existing_file(text) is existing_folder(text) is None
    expanded(text)


def test_what_is_there_is_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").touch()
    assert existing("~/a.txt") == existing_file("~/a.txt") == tmp_path / "a.txt"
    assert existing_folder("~/a.txt") is None
    assert existing("~") == existing_folder("~") == tmp_path


def test_json_has_no_nan() -> None:
    """Which no JSON parser but Python's would read."""

    def strict(name: str) -> None:
        raise AssertionError(name)

    nan, infinity = float("nan"), float("inf")
    text = json_text({"a": nan, "b": [1.5, -infinity, {"c": infinity}], "d": "NaN", "e": (nan, 2)}, indent=1)
    read = json.loads(text, parse_constant=strict)
    assert read == {"a": None, "b": [1.5, None, {"c": None}], "d": "NaN", "e": [None, 2]}


HALF, BYTE = "half \ud83d", os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("text", [HALF, BYTE])
@pytest.mark.parametrize(
    "command",
    [
        lambda text: read_labels(f"cat,{text}"),
        lambda text: read_templates([f"a {{}} {text}"], None),
        lambda text: predict.run("no-model", [], prompt=text, output=Path("no"), console=Console()),
        lambda text: classify.run("no-model", ["no.png"], labels="a,b", prompt=text, console=Console()),
        lambda text: search.run(text, index=Path("no"), k=1, html=None, console=Console()),
    ],
    ids=["labels", "templates", "predict", "classify", "search"],
)
def test_words_that_are_no_unicode_are_refused_before_anything_is_loaded(command, text) -> None:
    with pytest.raises(UserError, match="is no Unicode") as raised:
        command(text)
    assert str(raised.value).encode()
