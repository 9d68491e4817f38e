"""Files for the readers to read, and what they gave in a form to compare."""

import json
from io import BytesIO
from pathlib import Path

from PIL import Image

from vlm.data.example import Branch
from vlm.data.stream_sources import Place, in_pieces


def write(path: Path, content) -> None:
    """Text as it is; for `.jsonl` one line a row; anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        content = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def png(level: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def images(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for level, name in enumerate(names):
        (folder / name).write_bytes(png(level))


def qa(branch: Branch) -> tuple[str, str]:
    return branch.question, branch.answer


def lines(problems) -> list[str]:
    return [str(problem) for problem in problems]


def read_streamed(folder: Path, /, **options):
    """Examples and problems of a source of format `dataset`, read in pieces as a stream."""
    pieces = in_pieces({"format": "dataset", "streaming": True, **options}, folder, lambda source: [])
    places = [(Place(piece, n), row) for piece in range(len(pieces)) for n, row in enumerate(pieces.rows(piece))]
    return pieces.examples(places)


def answers(examples) -> list[str]:
    return [branch.answer for example in examples for branch in example.branches]
