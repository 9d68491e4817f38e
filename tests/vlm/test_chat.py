"""The chat loop: commands, what is remembered, and what reaches the terminal."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from vlm.chat import Conversation, Request, _typed, chat, run
from vlm.data.example import count_image_parts
from vlm.data.images import open_image
from vlm.errors import UserError


class Talker:
    """Answers with what it was given, word by word, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __call__(self, request: Request) -> Iterator[str]:
        images, messages = request
        assert count_image_parts(messages) == len(images), "every image has its place in the messages"
        assert messages[-1]["role"] == "user"
        self.requests.append(request)
        text = messages[-1]["content"][-1]["text"]
        if text == "fail":
            raise UserError("the model takes one image")
        yield f"{text}!"
        if text == "stop":
            raise KeyboardInterrupt
        yield f" images={[image.size[0] for image in images]} turns={len(messages)}"


def talk(*lines: str, image: Image.Image | None = None, question: str | None = None) -> tuple[str, Talker]:
    talker, console = Talker(), Console(file=io.StringIO(), width=40)
    chat(talker, console, image=image, question=question, lines=iter(lines))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), talker


@pytest.fixture
def photo(tmp_path: Path) -> str:
    path = tmp_path / "my photo's.png"
    Image.new("RGB", (30, 20)).save(path)
    return str(path)


def test_one_question_one_answer() -> None:
    out, talker = talk("never read", image=Image.new("RGB", (10, 10)), question="what?")
    assert out == "what?! images=[10] turns=1\n"
    assert talker.requests[0][1] == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
    ]


def test_a_conversation_remembers_and_takes_further_images(photo: str) -> None:
    out, talker = talk("a", "b", f"/image {photo}", "c", image=Image.new("RGB", (10, 10)))
    assert "a! images=[10] turns=1" in out
    assert "b! images=[10] turns=3" in out
    assert "c! images=[10, 30] turns=5" in out
    roles = [message["role"] for message in talker.requests[-1][1]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert talker.requests[-1][1][1]["content"] == [{"type": "text", "text": "a! images=[10] turns=1"}]


def test_reset_forgets_all_but_the_last_image(photo: str) -> None:
    out, _ = talk("a", f"/image {photo}", "b", "/reset", "c", image=Image.new("RGB", (10, 10)))
    assert out.splitlines()[-1] == "c! images=[30] turns=1"
    out, _ = talk("a", "/reset", "b")
    assert out.splitlines()[-1] == "b! images=[] turns=1"


@pytest.mark.parametrize("quote", ['"{}"', "  {}  ", "{}"])
def test_file_names_as_people_and_terminals_type_them(photo: str, quote: str) -> None:
    _, talker = talk(f"/image {quote.format(photo)}", "a")
    assert talker.requests[0][0][0].size == (30, 20)


def test_a_dragged_file_with_backslashes(photo: str) -> None:
    escaped = photo.replace(" ", "\\ ").replace("'", "\\'")
    _, talker = talk(f"/image {escaped}", "a")
    assert len(talker.requests[0][0]) == 1


@pytest.mark.parametrize("name", ["/nowhere.png", "", "'unclosed", "/", "\0"])
def test_a_wrong_file_name_does_not_end_the_chat(name: str) -> None:
    out, _ = talk(f"/image {name}", "a")
    assert "a! images=[] turns=1" in out
    assert len(out.splitlines()) > 1


def test_commands(photo: str) -> None:
    out, talker = talk("/help", "/imag x", "", "   ", "/quit", "never")
    assert "/reset" in out
    assert "there is no command /imag; did you mean '/image'?" in out
    assert talker.requests == []


def test_a_question_that_fails_or_is_stopped_is_forgotten() -> None:
    out, _ = talk("a", "fail", "stop", "b", image=Image.new("RGB", (10, 10)))
    assert "the model takes one image" in out
    assert "stopped" in out
    assert "b! images=[10] turns=3" in out


def test_an_image_of_a_failed_question_waits_for_the_next() -> None:
    out, _ = talk("fail", "b", image=Image.new("RGB", (10, 10)))
    assert "b! images=[10] turns=1" in out


def test_piped_output_is_plain_and_not_wrapped() -> None:
    long = "word " * 40 + "[bold]not markup[/bold] :smile:"
    out, _ = talk(long)
    assert out.startswith(f"{long.strip()}! images")
    assert len(out.splitlines()) == 1


def test_control_characters_do_not_reach_the_terminal() -> None:
    out, talker = talk("\x1b[2Jred\x07 \u200d fine")
    assert out == "\\x1b[2Jred\\x07 \u200d fine! images=[] turns=1\n"
    assert talker.requests[0][1][0]["content"][0]["text"].startswith("\x1b"), "the model gets what was typed"


def test_a_conversation_is_not_changed_by_asking() -> None:
    conversation = Conversation()
    conversation.show(Image.new("RGB", (4, 4)))
    conversation.ask("a")
    assert (conversation.images, conversation.messages, len(conversation.waiting)) == ([], [], 1)


def test_images_are_opened_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    _, talker = talk(f"/image {tmp_path / 'turned.jpg'}", "a")
    assert talker.requests[0][0][0].size == (20, 30) == open_image(str(tmp_path / "turned.jpg")).size


def test_half_a_surrogate_pair_is_no_text_for_a_model() -> None:
    assert question_of("what is \ud800 this \udcff?") == "what is \ufffd this \ufffd?"


def question_of(typed: str) -> str:
    _, talker = talk(typed)
    return talker.requests[0][1][-1]["content"][-1]["text"]


def test_bytes_on_a_pipe_that_are_not_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 \xff?\n"), "utf-8"))
    assert list(_typed(Console(file=io.StringIO()))) == ["caf\udce9 \udcff?\n"]


def test_a_command_with_something_after_it_does_nothing(photo: str) -> None:
    out, _ = talk("/quit now", "/reset it", "/help me", "a", image=Image.new("RGB", (10, 10)))
    assert "/quit takes nothing after it; type /quit alone. To ask this as a question, type //quit now" in out
    assert "/reset takes nothing after it" in out
    assert "/help takes nothing after it" in out
    assert out.splitlines()[-1] == "a! images=[10] turns=1"
    assert "/image needs the name of a file" in talk("/image")[0]


def test_a_question_may_begin_with_a_slash() -> None:
    out, talker = talk("/etc/hosts is what?", "//etc/hosts is what?", "//quit", "//")
    assert "there is no command /etc/hosts; known: /help, /image, /quit, /reset. To ask this" in out
    assert "as a question, type //etc/hosts is what?" in out
    asked = [request[1][-1]["content"][-1]["text"] for request in talker.requests]
    assert asked == ["/etc/hosts is what?", "/quit", "/"]


def test_an_empty_question_is_the_image_alone_or_refused() -> None:
    conversation = Conversation()
    conversation.show(Image.new("RGB", (4, 4)))
    assert conversation.ask("  ")[1] == [{"role": "user", "content": [{"type": "image"}]}]
    with pytest.raises(UserError, match="the question is empty, and there is no image"):
        run("no model", image=None, question=" ", console=Console(file=io.StringIO()))
