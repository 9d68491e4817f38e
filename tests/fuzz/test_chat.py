"""Odd lines typed into a chat: each ends in an answer or a message, and the conversation goes on."""

import io
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.cases import WORDS, changed_bytes, parts, run, told
from tests.tiny import image, tiny
from vlm.chat import COMMANDS, Request, chat
from vlm.data.example import count_image_parts
from vlm.printing import SafeConsole
from vlm.session import Session

PIECES = (
    *WORDS, "<|im_end|>", "<|im_start|>system", "<|endoftext|>", "<|pad|>", "<image>", "\r", "\x85", "\u202e",
    "\udcff", "a " * 200, "word " * 3000,
)  # fmt: skip


def line(draw: random.Random, files: list[str]) -> str:
    kind = draw.randrange(4)
    text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 4)))
    if kind == 0:
        return f"{draw.choice(COMMANDS[:3])}{draw.choice((' ', '', '  ', chr(9)))}{text}"
    if kind == 1:
        return f"/image {draw.choice(files)}"
    if kind == 2:
        return f"/{text}"
    return text


def talk(lines: list[str], stream) -> str:
    raw = io.BytesIO()
    console = SafeConsole(file=io.TextIOWrapper(raw, "utf-8", write_through=True), width=80)
    chat(stream, console, image=None, question=None, lines=iter([*lines, "the end"]))
    return raw.getvalue().decode()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    draw = random.Random(0)
    buffer = io.BytesIO()
    image(0).save(buffer, "PNG")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "it's.png").write_bytes(buffer.getvalue())
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(changed_bytes(buffer.getvalue(), draw))
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    names = [str(path) for path in sorted(tmp_path.iterdir())]
    return [
        *names,
        *(f"'{name}'" for name in names),
        *(name.replace(" ", "\\ ") for name in names),
        *WORDS,
        "/dev/zero",
    ]


@parts(fast=600, slow=4_000)
def test_lines(numbers: range, files: list[str]) -> None:
    def stream(request: Request) -> Iterator[str]:
        images, messages = request
        assert count_image_parts(messages) == len(images)
        text = messages[-1]["content"][-1]["text"]
        assert text == text.encode().decode(), "a model is given Unicode"
        yield text

    def case(draw: random.Random) -> None:
        lines = [line(draw, files) for _ in range(draw.randrange(1, 6))]
        with told(lines):
            said = talk(lines, stream)
            assert said.endswith("the end\n") or "/quit" in " ".join(lines)
            assert "\x1b" not in said

    run("chat", numbers, case)


@parts(fast=4, slow=150)
def test_sessions(numbers: range, files: list[str]) -> None:
    """A real model: no line ends the conversation, whatever it contains."""
    sessions = [
        Session(*tiny(decoder, fusion)) for decoder, fusion in (("llama", "prefix"), ("gpt2", "cross_attention"))
    ]

    def case(draw: random.Random) -> None:
        session = draw.choice(sessions)
        lines = [line(draw, files) for _ in range(draw.randrange(1, 4))]
        with told(lines):
            talk(lines, lambda request: session.stream(request, max_new_tokens=2))

    run("session", numbers, case)
