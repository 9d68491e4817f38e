"""`vlm predict`: the same prompt on many images, one JSON row each, in a file that a second run continues."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vlm.batches import MAX_BATCH_TOKENS
from vlm.data.example import Message
from vlm.data.image_files import find_images, place_of
from vlm.data.images import ImageError, RefusedImages, chunks, open_image
from vlm.disk_faults import is_write_fault, saving
from vlm.errors import UserError
from vlm.files import atomic_write
from vlm.loading import Placement
from vlm.locks import locked
from vlm.paths import existing
from vlm.printing import json_text, require_unicode

Request = tuple[list[Image.Image], list[Message]]
Generate = Callable[[list[Request]], list[str]]
"""From requests to one answer each (vlm.generation.generate)."""

WEIGHTS = "weights"
"""The key of a row that says which weights of the model have answered."""

ROW_START = b'{"image": "'
"""How each row begins."""


@dataclass(frozen=True)
class Counts:
    """Attributes:
    done: images that were answered now.
    earlier: images that were in the output already.
    broken: images that got a row with "error" now.
    earlier_broken: how many of the earlier ones have a row with "error", and still cannot be opened.
    """

    done: int
    earlier: int
    broken: int
    earlier_broken: int = 0


def predict(
    generate: Generate,
    images: Sequence[str],
    *,
    prompt: str,
    model: str,
    output: Path,
    settings: Mapping[str, Any] = MappingProxyType({}),
    why_refused: Callable[[Request], str] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Counts:
    """Write one row an image to `output`, in the order of `images`, dozens at a time, leaving out what it has already.

    A row is `{"image", "prompt", "model", "prediction"}` and the `settings`, or with `"error"` in place of
    `"prediction"` where the image cannot be opened, or the request not be answered. A row with `"error"` is removed
    when its image opens now, and its new row comes at the end. A last row cut off by a crash is removed first and
    redone.

    Args:
        settings: what else the answers depend on, by its key in a row: the weights of the model, for one.
        why_refused: returns why a request cannot be answered, or nothing if it can.
        advance: called with a number of images when they are written.

    Raises UserError when `output` is something else, or was written with another prompt, model or setting, and
    DiskError if the disk is full: then the rows that are whole stay.
    """
    about = {"prompt": prompt, "model": model, **settings}
    output.parent.mkdir(parents=True, exist_ok=True)
    advice = "Make room, and run the command again: it continues after the rows that are there"
    with saving(str(output), advice, is_write_fault):
        with output.open("a+b") as file:
            failed = _written(file, output, about)
        places: dict[str, str] = {}
        for image in images:
            places.setdefault(place_of(image), image)
        again = {place for place, image in places.items() if failed.get(place) and _opens(image)}
        if again:
            _remove_rows(output, again)
        todo = [image for place, image in places.items() if place not in failed or place in again]
        advance(len(images) - len(todo))
        broken = 0
        with output.open("ab") as file:
            for chunk in chunks(_opened(todo)):
                rows = [*_rows(generate, chunk, about, why_refused)]
                broken += sum("error" in row for row in rows)
                _append(file, "".join(json_text(row) + "\n" for row in rows).encode())
                advance(len(chunk))
    return Counts(
        done=len(todo) - broken,
        earlier=len(places) - len(todo),
        broken=broken,
        earlier_broken=sum(failed.get(place, False) for place in places.keys() - again),
    )


def _opens(image: str) -> bool:
    return any(opened for _, opened in _opened([image]))


def _opened(images: Sequence[str]) -> Iterator[tuple[tuple[str, str], list[Image.Image]]]:
    """Each file name and what is wrong with it, beside its image if nothing is."""
    for image in images:
        try:
            yield (image, ""), [open_image(image)]
        except ImageError as error:
            yield (image, str(error)), []


def _rows(
    generate: Generate,
    chunk: list[tuple[tuple[str, str], list[Image.Image]]],
    about: Mapping[str, Any],
    why_refused: Callable[[Request], str] | None,
) -> Iterator[dict[str, Any]]:
    prompt = about["prompt"]
    parts = [{"type": "image"}, *([{"type": "text", "text": prompt}] if prompt else [])]
    requests: dict[str, Request] = {
        image: (opened, [{"role": "user", "content": parts}]) for (image, _), opened in chunk if opened
    }
    errors = {image: error for (image, error), _ in chunk if error}
    answers: dict[str, str] = {}
    while requests and not answers:
        try:
            if why_refused:
                errors |= {image: why for image, request in requests.items() if (why := why_refused(request))}
                requests = {image: request for image, request in requests.items() if image not in errors}
            answers = dict(zip(requests, generate(list(requests.values())), strict=True))
        except RefusedImages as refused:
            found = {image: str(e) for image, ([opened], _) in requests.items() if (e := refused.of(opened, image))}
            if not found:
                raise
            errors |= found
            requests = {image: request for image, request in requests.items() if image not in found}
    for (image, _), _ in chunk:
        row = {"image": image, **about}
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


def _written(file: BinaryIO, output: Path, about: Mapping[str, Any]) -> dict[str, bool]:
    """Return which images have a row, by `place_of`, and whether it is one with "error". Cut off what a crash left of
    the last row."""
    file.seek(0)
    failed: dict[str, bool] = {}
    end = 0
    for number, line in enumerate(file, start=1):
        row = _row(line)
        if row is None and not _is_cut(line, first=number == 1):
            raise UserError(f"{output}, line {number}: not a row of `vlm predict`; choose another --output")
        for key, now in about.items():
            if row is not None and row.get(key) != now:
                raise UserError(
                    f"{output} was written {_difference(key, row.get(key), now)}; choose another --output, or remove "
                    "the file"
                )
        if row is None or not line.endswith(b"\n"):
            file.truncate(end)
            break
        end += len(line)
        place = place_of(row["image"])
        failed[place] = failed.get(place, True) and "error" in row
    return failed


def _difference(key: str, before: Any, now: Any) -> str:
    if before is None:
        return f"without a record of {key}, which an earlier version did not keep"
    if key == WEIGHTS:
        return f"with other weights of this model ({before}, and now {now}): it was trained again or changed since"
    return f"with {key} {before!r}, and this is {now!r}"


def _is_cut(line: bytes, *, first: bool) -> bool:
    """Whether a line that is no row is what a crash left of one, and not a file of something else."""
    if line.endswith(b"\n"):
        return False
    if not first:
        return True
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(ROW_START) or ROW_START.startswith(line)
    return False


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict):
        return None
    values = (*(row.get(key) for key in ("image", "prompt", "model")), row.get("prediction", row.get("error")))
    return row if all(isinstance(value, str) for value in values) else None


def _remove_rows(output: Path, places: Collection[str]) -> None:
    with output.open("rb") as file, atomic_write(output, "wb") as kept:
        kept.writelines(line for line in file if not ((row := _row(line)) and place_of(row["image"]) in places))


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

    Raises UserError if `output` is a folder, and InUse if another process writes it.
    """
    require_unicode(prompt, "--prompt")
    found = find_images(patterns)
    found.show_left_out(console)
    images = found.paths
    with locked(output, "Wait until it ends, or choose another --output."):
        if output.is_dir():
            raise UserError(f"{output} is a folder; name a file with --output, such as {output / 'predictions.jsonl'}")
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
    from vlm.fingerprint import fingerprint

    with console.status("loading the model"):
        weights = fingerprint(model)
        loaded, processor = generation.load(model, **placement.options())

    def generate(requests: list[Request]) -> list[str]:
        return generation.generate(
            loaded, processor, requests, max_new_tokens=max_new_tokens, max_batch_tokens=max_batch_tokens
        )

    dtype = str(loaded.dtype).removeprefix("torch.")
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
            settings={WEIGHTS: weights, "dtype": dtype, "max_new_tokens": max_new_tokens},
            why_refused=generation.prompt_check(loaded, processor),
            advance=lambda count: progress.advance(task, count),
        )
    _report(counts, output, console)
    return counts


def _report(counts: Counts, output: Path, console: Console) -> None:
    text = f"{counts.done} predicted"
    if counts.earlier:
        text += f", {counts.earlier} were there already"
    if counts.earlier_broken:
        text += f' ({counts.earlier_broken} of them with "error", which still cannot be opened)'
    if counts.broken:
        text += f', {counts.broken} could not be answered (the rows with "error")'
    console.print(f"{text}: {output}", markup=False, highlight=False, soft_wrap=True)
