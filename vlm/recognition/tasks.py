"""How well a model tells images apart by labels that it was not trained on: of one set of labelled images, or of the
tasks in a recipe's `evaluation.classification`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vlm.data.encoding import BATCH_IMAGES
from vlm.data.example import ImageSource
from vlm.data.images import ImageError, RefusedImages, open_image
from vlm.errors import UserError
from vlm.eval.runner import Processes
from vlm.eval.top_k import Share, first_right, top_k
from vlm.paths import existing
from vlm.recipe_evaluation import Classification
from vlm.recognition.labelled_images import LabelledImages, read_labelled_images

TOP = 5
"""Beside the first place these are counted, if there are more labels."""

Watch = Callable[[Iterable[Any]], Iterable[Any]]


class Classifier(Protocol):
    def scores(self, images: Sequence[Image.Image]) -> Tensor: ...

    def probabilities(self, scores: Tensor) -> Tensor: ...


def classify(
    classifier: Classifier, images: Mapping[str, ImageSource], *, console: Console, watch: Watch = iter
) -> tuple[dict[str, Tensor], list[ImageError]]:
    """The scores `[labels]` of each of `images` that opens, by its name, and what is wrong with the others. `watch`
    sees each batch, and may raise."""
    broken: list[ImageError] = []
    scores: dict[str, Tensor] = {}
    total = -(-len(images) // BATCH_IMAGES)
    batches = track(_opened(images, broken), "classifying", total, console=console, disable=not console.is_terminal)
    for batch in watch(batches):
        scores |= _scores(classifier, batch, images, broken)
    return scores, broken


def _scores(
    classifier: Classifier, batch: dict[str, Image.Image], sources: Mapping[str, ImageSource], broken: list[ImageError]
) -> dict[str, Tensor]:
    """The scores of opened images, by their names. Those that an image processor refuses go to `broken`."""
    while batch:
        try:
            return dict(zip(batch, classifier.scores(list(batch.values())), strict=True))
        except RefusedImages as refused:
            errors = {name: refused.of(image, sources[name]) for name, image in batch.items()}
            if not any(errors.values()):
                raise
            broken += [error for error in errors.values() if error]
            batch = {name: image for name, image in batch.items() if not errors[name]}
    return {}


def accuracy(labelled: LabelledImages, scores: Mapping[str, Tensor]) -> dict[int, Share]:
    """How often the right label is first, and among the first `TOP` if there are more, by k."""
    target = dict(zip(labelled.images, labelled.targets, strict=True))
    right = np.eye(len(labelled.labels), dtype=bool)[[target[name] for name in scores]]
    ks = (1, TOP) if len(labelled.labels) > TOP else (1,)
    return top_k(first_right(torch.stack([*scores.values()]).numpy(), right), ks)


def read_tasks(tasks: Mapping[str, Classification]) -> dict[str, LabelledImages]:
    """The labelled images of each task. Raises UserError, with the name of the task, if there are none."""
    found = {}
    for name, task in tasks.items():
        try:
            found[name] = read_labelled_images(task.data, task.label_column)
        except UserError as error:
            raise UserError(f"evaluation.classification.{name}: {error}") from None
    return found


def measure(
    tasks: Mapping[str, Classification],
    load: Callable[[Sequence[str], Classification], Classifier],
    *,
    console: Console,
    processes: Processes = Processes(),
    watch: Watch = iter,
) -> dict[str, dict[str, Any]]:
    """Rows for the metrics of a summary, `NAME_top_1` and `NAME_top_5`, with those that a random order would have as
    `blind_score`. `load` makes a classifier of labels. Of several `processes`, which all call it, each does its share.

    Raises UserError for a task none of whose images opens.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, labelled in read_tasks(tasks).items():
        mine = dict(processes.share([*labelled.images.items()]))
        scores, broken = classify(load(labelled.labels, tasks[name]), mine, console=console, watch=watch)
        scores = dict(processes.gather([*scores.items()]))
        why = [*map(str, labelled.problems), *processes.gather([*map(str, broken)])]
        if not scores:
            raise UserError(f"evaluation.classification.{name}: no image could be opened, of {len(labelled.images)}")
        if processes.index == 0:
            for problem in why:
                console.print(f"left out: {problem}", markup=False, highlight=False, soft_wrap=True)
        for k, share in accuracy(labelled, scores).items():
            if processes.index == 0:
                console.print(in_words(share, k, labelled, scores, name), highlight=False, soft_wrap=True)
            chance = k / len(labelled.labels)
            rows[f"{name}_top_{k}"] = {
                "score": share.value,
                "interval": [share.low, share.high],
                "blind_score": chance,
                "blind_interval": None,
                "n_items": len(scores),
                "n_images": len(scores),
                "n_broken": len(why),
                "data": Path(tasks[name].data).name if existing(tasks[name].data) else tasks[name].data,
                "sees": share.low > chance,
            }
    return rows


def in_words(share: Share, k: int, labelled: LabelledImages, scores: Mapping[str, Tensor], name: str = "") -> str:
    of = f"{name}: " if name else ""
    return f"{of}top-{k} accuracy {share}, {len(scores):,} images, {len(labelled.labels)} labels"


def _opened(images: Mapping[str, ImageSource], broken: list[ImageError]) -> Iterator[dict[str, Image.Image]]:
    rest = iter(images.items())
    while batch := list(islice(rest, BATCH_IMAGES)):
        opened = {}
        for name, source in batch:
            try:
                opened[name] = open_image(source)
            except ImageError as error:
                broken.append(error)
        if opened:
            yield opened
