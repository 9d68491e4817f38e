"""`vlm predict`: the same prompt on many images, one JSON row each, in a file that a second run continues."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlm.batches import MAX_BATCH_TOKENS
from vlm.data.example import Message
from vlm.data.image_files import find_images
from vlm.data.images import ImageError, RefusedImages, chunks, open_image
from vlm.errors import UserError
from vlm.files import is_write_fault, locked, saving
from vlm.loading import Placement
from vlm.paths import existing
from vlm.printing import json_text, require_unicode

Request = tuple[list[Image.Image], list[Message]]
Generate = Callable[[list[Request]], list[str]]
"""From requests to one answer each (vlm.generation.generate)."""


@dataclass(frozen=True)
class Counts:
    """How many images were answered now, were in the output already, and could not be opened now."""

    done: int
    earlier: int
    broken: int


def predict(
    generate: Generate,
    images: Sequence[str],
    *,
    prompt: str,
    model: str,
    output: Path,
    advance: Callable[[int], None] = lambda count: None,
) -> Counts:
    """Write one row an image to `output`, in the order of `images`, dozens at a time, leaving out what it has already.

    A row is `{"image", "prompt", "model", "prediction"}`, or with `"error"` in place of `"prediction"` where the image
    cannot be opened. A last row cut off by a crash is removed first and redone.

    Args:
        advance: called with a number of images when they are written.

    Raises UserError when `output` is something else, or was written with another prompt or model, and DiskError if the
    disk is full: then the rows that are whole stay.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    advice = "Make room, and run the command again: it continues after the rows that are there"
    with saving(str(output), advice, is_write_fault), output.open("a+b") as file:
        written = _written(file, output, prompt=prompt, model=model)
        todo = [image for image in images if image not in written]
        earlier = len(images) - len(todo)
        advance(earlier)
        broken = 0
        for chunk in chunks(_opened(todo)):
            rows = [*_rows(generate, chunk, prompt, model)]
            broken += sum("error" in row for row in rows)
            _append(file, "".join(json_text(row) + "\n" for row in rows).encode())
            advance(len(chunk))
    return Counts(done=len(todo) - broken, earlier=earlier, broken=broken)


def _opened(images: Sequence[str]) -> Iterator[tuple[tuple[str, str], list[Image.Image]]]:
    """Each file name and what is wrong with it, beside its image if nothing is."""
    for image in images:
        try:
            yield (image, ""), [open_image(image)]
        except ImageError as error:
            yield (image, str(error)), []


def _rows(
    generate: Generate, chunk: list[tuple[tuple[str, str], list[Image.Image]]], prompt: str, model: str
) -> Iterator[dict[str, str]]:
    parts = [{"type": "image"}, *([{"type": "text", "text": prompt}] if prompt else [])]
    requests = {image: (opened, [{"role": "user", "content": parts}]) for (image, _), opened in chunk if opened}
    errors = {image: error for (image, error), _ in chunk if error}
    answers: dict[str, str] = {}
    while requests and not answers:
        try:
            answers = dict(zip(requests, generate(list(requests.values())), strict=True))
        except RefusedImages as refused:
            found = {image: str(e) for image, ([opened], _) in requests.items() if (e := refused.of(opened, image))}
            if not found:
                raise
            errors |= found
            requests = {image: request for image, request in requests.items() if image not in found}
    for (image, _), _ in chunk:
        row = {"image": image, "prompt": prompt, "model": model}
        yield row | ({"error": errors[image]} if image in errors else {"prediction": answers[image]})


def _append(file: BinaryIO, lines: bytes) -> None:
    """Add whole lines, all of them or none."""
    end = file.seek(0, os.SEEK_END)
    try:
        file.write(lines)
        file.flush()
    except OSError:
        with suppress(OSError):
            file.close()  # what is in its buffer does not fit either
        with suppress(OSError):
            os.truncate(file.name, end)
        raise


def _written(file: BinaryIO, output: Path, *, prompt: str, model: str) -> set[str]:
    """Return the images that have a row, and cut off what a crash left of the last one."""
    file.seek(0)
    images = set()
    end = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            file.truncate(end)
            break
        end += len(line)
        row = _row(line)
        if row is None:
            raise UserError(f"{output}, line {number}: not a row of `vlm predict`; choose another --output")
        for key, now in (("prompt", prompt), ("model", model)):
            if row[key] != now:
                raise UserError(
                    f"{output} was written with {key} {row[key]!r}, and this is {now!r}; "
                    "choose another --output, or remove the file"
                )
        images.add(row["image"])
    file.seek(0, 2)
    return images


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"image", "prompt", "model"} <= row.keys() else None


def run(
    model: str,
    patterns: Sequence[str],
    *,
    prompt: str,
    output: Path,
    console: Console,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    max_new_tokens: int = 64,
    placement: Placement = Placement(),
) -> Counts:
    """Find the images, load `model` (run folder, checkpoint or Hub name), and predict with a progress bar.

    Raises InUse if another process writes `output`.
    """
    require_unicode(prompt, "--prompt")
    found = find_images(patterns)
    found.show_left_out(console)
    images = found.paths
    with locked(output, "Wait until it ends, or choose another --output."):
        return _run(
            model, images, prompt=prompt, output=output, console=console, max_batch_tokens=max_batch_tokens,
            max_new_tokens=max_new_tokens, placement=placement,
        )  # fmt: skip


def _run(
    model: str,
    images: Sequence[str],
    *,
    prompt: str,
    output: Path,
    console: Console,
    max_batch_tokens: int,
    max_new_tokens: int,
    placement: Placement,
) -> Counts:
    from vlm import generation

    with console.status("loading the model"):
        loaded, processor = generation.load(model, **placement.options())

    def generate(requests: list[Request]) -> list[str]:
        return generation.generate(
            loaded, processor, requests, max_new_tokens=max_new_tokens, max_batch_tokens=max_batch_tokens
        )

    folder = existing(model)
    name = str(folder.resolve()) if folder else model
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("images", total=len(images))
        counts = predict(
            generate,
            images,
            prompt=prompt,
            model=name,
            output=output,
            advance=lambda count: progress.advance(task, count),
        )
    _report(counts, output, console)
    return counts


def _report(counts: Counts, output: Path, console: Console) -> None:
    text = f"{counts.done} predicted"
    if counts.earlier:
        text += f", {counts.earlier} were there already"
    if counts.broken:
        text += f', {counts.broken} could not be opened (the rows with "error")'
    console.print(f"{text}: {output}", markup=False, highlight=False, soft_wrap=True)
