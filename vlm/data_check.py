"""`vlm data check`: what is in the sources of a recipe or of a command line, and what is wrong with it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from vlm import recipe


def run(words: Sequence[str], *, model: str | None, console: Console) -> bool:
    """Check every source and print what was found; return whether all of it can be used.

    Args:
        words: a recipe, or one source as `key=value` words (see vlm.recipe.parse_data).
        model: count tokens and show what is learned as this model's processor does it.
    """
    from vlm.data.check import check, render

    data = recipe.parse_data(words)
    reading = _reading(model, data.max_length) if model else {}
    fine = True
    sources = [("train", source) for source in data.sources]
    sources += [("validation", data.validation)] if data.validation is not None else []
    for name, source in sources:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            seen = _bar(progress)
            report = check(source, base_dir=Path(data.base_dir), progress=seen, **reading)
        if len(sources) > 1:
            console.print(f"\n{name}", style="bold")
        console.print(render(report), soft_wrap=True)
        fine = fine and not report.problems and not report.unsupervised
    return fine


def _bar(progress: Progress) -> Callable[[int, int], None]:
    task = progress.add_task("looking at every image", total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def _reading(model: str, max_length: int) -> dict[str, Any]:
    """How `model` reads a conversation: the arguments that make `check` count tokens."""
    from transformers import AutoProcessor

    from vlm.data.conversation import tokenize_branch
    from vlm.data.example import Example
    from vlm.data.image_inputs import processed_once
    from vlm.data.images import image_size, open_image
    from vlm.loading import checkpoint_of, reading
    from vlm.processing import VLMProcessor

    source = checkpoint_of(model)
    with reading(source, "processor"):
        processor = AutoProcessor.from_pretrained(source)

    def tokenize(example: Example) -> list[tuple[list[int], list[int]]]:
        if isinstance(processor, VLMProcessor):  # which knows the length of an image without its pixels
            images, sizes = None, [image_size(source, where=example.where) for source in example.images]
        else:
            images, sizes = [open_image(source, where=example.where) for source in example.images], []
        with processed_once(processor):
            rows = [tokenize_branch(processor, branch, images, sizes) for branch in example.branches]
        return [(row.input_ids, row.labels) for row in rows]

    return {
        "tokenize": tokenize,
        "decode": processor.tokenizer.decode,
        "max_length": max_length,
        "max_positions": _positions(source),
    }


def _positions(source: str) -> int | None:
    """How many tokens the model reads at the most, if its positions are learned; no weights are loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from vlm.generation import learned_positions
    from vlm.loading import reading

    with reading(source, "config"), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(source))
    return learned_positions(model)
