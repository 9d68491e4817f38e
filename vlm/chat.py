"""`vlm chat`: one answer about an image, or a conversation, with the answer shown as it is written."""

import io
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator

from PIL import Image
from rich.console import Console
from rich.text import Text

from vlm.data.example import Message
from vlm.data.images import ImageError, RefusedImages, open_image
from vlm.errors import UserError, nearest
from vlm.loading import Placement
from vlm.paths import existing, expanded
from vlm.printing import printable, valid_unicode

Request = tuple[list[Image.Image], list[Message]]
Stream = Callable[[Request], Iterator[str]]
"""From images and messages that end with the user's to the pieces of the answer (vlm.session.Session.stream)."""

HELP = """\
/image FILE   show another image with your next question
/reset        forget what was said; the last image stays
/help         this list
/quit         leave (so does Ctrl-D); Ctrl-C stops an answer
//...         ask a question that begins with /"""
COMMANDS = ("/image", "/reset", "/help", "/quit")


class Conversation:
    """What was said so far: the messages, and the images in the order in which the messages hold them."""

    def __init__(self) -> None:
        self.images: list[Image.Image] = []
        self.messages: list[Message] = []
        self.waiting: list[Image.Image] = []
        """Images that go with the next question."""

    def show(self, image: Image.Image) -> None:
        """Let the next question come with `image`."""
        self.waiting.append(image)

    def reset(self) -> None:
        """Forget everything but the last image, which goes with the next question."""
        self.waiting = (self.images + self.waiting)[-1:]
        self.images, self.messages = [], []

    def ask(self, question: str) -> Request:
        """Return the request for an answer to `question`. Nothing is remembered before `answered`."""
        text = [{"type": "text", "text": question}] if question.strip() else []
        parts = [*({"type": "image"} for _ in self.waiting), *text]
        return self.images + self.waiting, [*self.messages, {"role": "user", "content": parts}]

    def answered(self, request: Request, answer: str) -> None:
        """Remember a request and its answer."""
        self.images, asked = request
        self.messages = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        self.waiting = []


def run(
    model: str,
    *,
    image: str | None,
    question: str | None,
    console: Console,
    max_new_tokens: int = 256,
    placement: Placement = Placement(),
) -> None:
    """Load `model` (run folder, checkpoint or Hub name) and chat on the terminal. See `chat`.

    Raises UserError for an empty `question` without an image, and ImageError if `image` cannot be opened.
    """
    picture = None if image is None else open_image(image)  # before the model, which takes longer to load
    if question is not None and not question.strip() and picture is None:
        raise UserError("the question is empty, and there is no image; ask something, or name an image with --image")
    with console.status("loading the model"):
        from vlm import generation
        from vlm.session import Session

        session = Session(*generation.load(model, **placement.options()))

    def stream(request: Request) -> Iterator[str]:
        return session.stream(request, max_new_tokens=max_new_tokens)

    chat(stream, console, image=picture, question=question, lines=_typed(console))


def chat(
    stream: Stream, console: Console, *, image: Image.Image | None, question: str | None, lines: Iterable[str]
) -> None:
    """Answer `question` and return; without one, answer the `lines` that the user types until they end or /quit."""
    conversation = Conversation()
    if image is not None:
        conversation.show(image)
    if question is not None:
        _answer(conversation, valid_unicode(question), stream, console)
        return
    if console.is_terminal:
        console.print("Ask about the image; /help lists the commands.", style="dim")
    for line in lines:
        line = line.strip()
        if line == "/quit":
            return
        if line.startswith("/") and not line.startswith("//"):
            _command(conversation, line, console)
        elif line:
            line = line.removeprefix("/") if line.startswith("//") else line
            try:
                _answer(conversation, valid_unicode(line), stream, console)
            except KeyboardInterrupt:
                console.print("\n(stopped; this question is forgotten)", style="dim")
            except UserError as error:
                if isinstance(error, RefusedImages):
                    conversation.waiting = [image for image in conversation.waiting if id(image) not in error.reasons]
                _say(console, str(error), "red")


def _typed(console: Console) -> Iterator[str]:
    """Lines as they are typed, with a prompt on a terminal and without one from a pipe. Bytes that are not UTF-8, which
    a file name may have, come as surrogates."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield console.input("[bold cyan]you>[/] ")
        except EOFError:
            console.print()
            return


def _command(conversation: Conversation, line: str, console: Console) -> None:
    name, *rest = line.split(maxsplit=1)
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS)
        full = hint if hint.endswith("?") else f"{hint}."
        _say(console, f"there is no command {name}; {full} To ask this as a question, type /{line}", "red")
    elif name != "/image" and rest:
        _say(
            console, f"{name} takes nothing after it; type {name} alone. To ask this as a question, type /{line}", "red"
        )
    elif name == "/image" and not rest:
        _say(console, "/image needs the name of a file: /image FILE", "red")
    elif name == "/image":
        try:
            path = _path(rest[0])
            conversation.show(open_image(path))
        except ImageError as error:
            _say(console, str(error), "red")
        else:
            _say(console, f"{path} goes with your next question", "dim")
    elif name == "/reset":
        conversation.reset()
        kept = "the last image stays" if conversation.waiting else "show an image with /image FILE"
        _say(console, f"forgotten; {kept}", "dim")
    else:
        _say(console, HELP, "dim")


def _path(typed: str) -> str:
    """The file name in `typed`: as it is, or without the quotes and backslashes that a dragged file comes with."""
    plain = existing(typed.strip())
    if plain is not None:
        return str(plain)
    try:
        words = shlex.split(typed)
    except ValueError:  # an apostrophe in a name is no quote
        words = [typed.strip()]
    return str(expanded(words[0] if len(words) == 1 else typed.strip()))


def _answer(conversation: Conversation, question: str, stream: Stream, console: Console) -> None:
    request = conversation.ask(question)
    pieces = []
    for piece in stream(request):
        pieces.append(piece)
        # As text: what a model writes is no markup, and its control characters must not reach the terminal.
        console.print(Text(printable(piece)), end="", soft_wrap=True, highlight=False)
    console.print()
    conversation.answered(request, "".join(pieces))


def _say(console: Console, text: str, style: str) -> None:
    console.print(Text(text), style=style, soft_wrap=True, highlight=False)
