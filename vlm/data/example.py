"""What one training or evaluation example is: image(s), and every conversation about them.

Captions come five to an image (COCO, Flickr30k), questions five to an image (VQAv2). An `Example` holds the image once
and each caption or question as a `Branch`, so that everything downstream can encode the image once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from vlm.data.inline_images import inline_image
from vlm.errors import cut

Message = dict[str, Any]
"""One turn in the Hugging Face chat format:
`{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}`.

`content` is always a list of parts. An image part carries no payload: images are taken in order from `Example.images`.
"""


@dataclass(frozen=True, eq=False)
class StoredImage:
    """An image inside a `datasets.Dataset`, fetched only when it is opened.

    The column must be cast to `Image(decode=False)`, so that a row gives `{"bytes": ..., "path": ...}`; a column of
    paths or of images in base64 gives plain strings. `index` picks one of several images of a row (`None` where the
    column holds one). In place of a data set there may be the rows of a JSON or CSV file, by the byte they start at.
    """

    dataset: Any
    row: int
    column: str
    index: int | None = None

    def fetch(self) -> str | bytes | Image.Image:
        """The undecoded image: its bytes, or the path of its file."""
        cell = self.dataset[self.row][self.column]
        if self.index is not None:
            cell = cell[self.index]
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell.get("bytes") is not None else cell["path"]
        inline = inline_image(cell, self.column) if isinstance(cell, str) else None
        return cell if inline is None else inline


ImageSource = str | bytes | Image.Image | StoredImage
"""A path, encoded bytes, an image in memory, or a place in a data set. `vlm.data.images.open_image` opens each."""


@dataclass(frozen=True)
class Branch:
    """One whole conversation about the images of its example. It ends with an assistant message.

    Attributes:
        messages: the conversation; every assistant message is supervised.
        references: all acceptable answers to the last question, such as the ten answers of VQAv2. Empty means that the
            last assistant text is the only one.
        where: file and row this branch comes from, for messages to people.
        question_id: what tells this question from others of the same words: the id in its data, or file and row. None
            for captions: those about the same images with the same prompt are references of each other.
    """

    messages: tuple[Message, ...]
    references: tuple[str, ...] = ()
    where: str = ""
    question_id: str | None = None

    def __post_init__(self) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError(f"{self.where or 'branch'}: a branch must end with an assistant message")

    @property
    def answer(self) -> str:
        """The text of the last assistant message."""
        return message_text(self.messages[-1])

    @property
    def all_references(self) -> tuple[str, ...]:
        """The acceptable answers: `references`, or the last assistant text where there are none."""
        return self.references or (self.answer,)

    @property
    def question(self) -> str:
        """The text of the last user message (empty where there is none)."""
        return next((message_text(m) for m in reversed(self.messages) if m["role"] == "user"), "")


@dataclass(frozen=True)
class Example:
    """Image(s) and the conversations about them.

    Attributes:
        images: the images, in the order in which the image parts of each branch refer to them. Empty for text only.
        branches: one or more conversations. Each has one image part for each image.
        image_id: a stable name of this group of images; results are grouped and resampled by it.
        where: file and row the example comes from.
    """

    images: tuple[ImageSource, ...]
    branches: tuple[Branch, ...]
    image_id: str
    where: str

    def __post_init__(self) -> None:
        if not self.branches:
            raise ValueError(f"{self.where}: an example needs at least one branch")
        for branch in self.branches:
            parts = count_image_parts(branch.messages)
            if parts != len(self.images):
                where = branch.where or self.where
                raise ValueError(f"{where}: {parts} image part(s) in the messages but {len(self.images)} image(s)")


@dataclass(frozen=True)
class Problem:
    """Something bad in the data: where (file and row), which key, and why. `lost` counts the branches lost with it."""

    where: str
    key: str
    why: str
    lost: int = 1

    def __str__(self) -> str:
        parts = (cut(self.where, 300), cut(self.key), cut(self.why, 600))
        return ": ".join(part for part in parts if part)


def message_text(message: Message) -> str:
    """The text parts of a message, joined; image parts are left out."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def count_image_parts(messages: Sequence[Message]) -> int:
    """How many image parts the messages hold."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def apart(sources: Sequence[Sequence[Example]]) -> list[Example]:
    """Return the examples of several sources as one list, in which an id of an image is that of the same files.

    Other images that have the id of one of an earlier source (photos of two folders may have the same names) get the
    number of their source behind it.
    """
    known: dict[str, tuple[ImageSource, ...]] = {}
    examples: list[Example] = []
    for number, source in enumerate(sources):
        of_source: dict[str, tuple[ImageSource, ...]] = {}
        for example in source:
            first = known.get(example.image_id, example.images)
            if first is not example.images and not _same_files(first, example.images):
                example = replace(example, image_id=f"{example.image_id} (source {number})")
            of_source.setdefault(example.image_id, example.images)
            examples.append(example)
        known = of_source | known
    return examples


def _same_files(one: Sequence[ImageSource], other: Sequence[ImageSource]) -> bool:
    return len(one) == len(other) and all(isinstance(a, str) and a == b for a, b in zip(one, other, strict=True))


def iter_branches(examples: Sequence[Example]) -> Iterator[tuple[Example, Branch]]:
    """Every branch with its example, in order."""
    for example in examples:
        for branch in example.branches:
            yield example, branch


def question_and_answer(
    question: str, answer: str, *, num_images: int = 1, references: Sequence[str] = (), where: str = ""
) -> Branch:
    """A branch of one question and one answer: the images first, then the question (omitted when empty)."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in range(num_images)]
    if question:
        content.append({"type": "text", "text": question})
    messages: tuple[Message, ...] = (
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    )
    return Branch(messages=messages, references=tuple(references), where=where)
