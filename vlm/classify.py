"""`vlm classify`: which of some labels is in an image, by a model that was not trained on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from vlm import generation
from vlm.batches import MAX_BATCH_TOKENS
from vlm.data.encoding import BATCH_IMAGES
from vlm.data.example import ImageSource
from vlm.data.images import ImageError, find_images, open_image
from vlm.dual_encoder import is_dual_encoder
from vlm.embedding import load_embedder
from vlm.errors import UserError
from vlm.eval.top_k import first_right, top_k
from vlm.recognition.labelled_images import LabelledImages, read_labelled_images
from vlm.recognition.labels import PHOTO, read_labels, read_templates
from vlm.recognition.likelihood import ANSWER, PROMPT, LabelLikelihood
from vlm.recognition.zero_shot import ZeroShot

SHOWN = 3
"""Labels an image in the terminal."""
TOP = 5


class Classifier(Protocol):
    def scores(self, images: Sequence[Image.Image]) -> Tensor: ...

    def probabilities(self, scores: Tensor) -> Tensor: ...


def run(
    model: str,
    patterns: Sequence[str],
    *,
    labels: str | None = None,
    data: str | None = None,
    label_column: str | None = None,
    template: Sequence[str] = (),
    templates: str | None = None,
    prompt: str | None = None,
    output: Path | None = None,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    console: Console,
) -> None:
    """Classify the images in `patterns` among `labels`, or those of `data`, which say their own and are scored.

    Raises UserError for options that do not go together, and as the readers of labels, templates and data do.
    """
    if (data is None) == (not patterns):
        raise UserError("give images and --labels, or --data, a folder with a folder for each label")
    if (labels is None) == (data is None):
        raise UserError("--labels says what the images may be; --data has labels of its own")
    if label_column is not None and data is None:
        raise UserError("--label-column is a column of --data")
    if output is not None and output.exists():
        raise UserError(f"{output} is there already; choose another --output, or remove the file")
    texts = read_templates(template, templates)
    labelled = read_labelled_images(data, label_column) if data else None
    names = labelled.labels if labelled else read_labels(labels or "")
    images = labelled.images if labelled else {path: path for path in find_images(patterns)}
    with console.status("loading the model"):
        classifier = load(model, names, texts, prompt, max_batch_tokens)
    broken: list[ImageError] = []
    opened: list[str] = []
    scores: list[Tensor] = []
    total = -(-len(images) // BATCH_IMAGES)
    batches = track(_opened(images, broken), "classifying", total, console=console, disable=not console.is_terminal)
    for batch in batches:
        opened += batch
        scores.append(classifier.scores(list(batch.values())))
    for problem in [*(labelled.problems if labelled else ()), *broken]:
        console.print(f"left out: {problem}", markup=False, highlight=False, soft_wrap=True)
    if not opened:
        raise UserError(f"no image could be opened, of {len(images)}")
    everything = torch.cat(scores)
    probabilities = classifier.probabilities(everything)
    if output is not None:
        _write(output, opened, names, probabilities)
    if labelled:
        _score(labelled, opened, everything, console)
    else:
        _show(opened, names, probabilities, console)


def load(
    model: str, labels: Sequence[str], templates: Sequence[str], prompt: str | None, max_batch_tokens: int
) -> Classifier:
    """By a dual encoder's vectors, or by likelihood under a vision-language model.

    Raises UserError for options of the other kind, and a model that is neither.
    """
    config = generation.load_config(model)
    if is_dual_encoder(config):
        if prompt is not None:
            raise UserError("--prompt is what a vision-language model is asked; a dual encoder takes --template")
        return ZeroShot(load_embedder(model), labels, templates or PHOTO)
    if len(templates) > 1:
        raise UserError("a vision-language model takes one --template, the answer as it would write it: 'A {}.'")
    network, processor = generation.load(model)
    return LabelLikelihood(
        network,
        processor,
        labels,
        prompt=prompt or PROMPT,
        answer=templates[0] if templates else ANSWER,
        max_batch_tokens=max_batch_tokens,
    )


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


def _write(output: Path, opened: Sequence[str], names: Sequence[str], probabilities: Tensor) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", encoding="utf-8") as file:
        for image, row in zip(opened, probabilities.tolist(), strict=True):
            best = names[max(range(len(names)), key=row.__getitem__)]
            line: dict[str, Any] = {"image": image, "label": best, "probabilities": dict(zip(names, row, strict=True))}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _score(labelled: LabelledImages, opened: Sequence[str], scores: Tensor, console: Console) -> None:
    target = dict(zip(labelled.images, labelled.targets, strict=True))
    right = np.eye(len(labelled.labels), dtype=bool)[[target[name] for name in opened]]
    for k, share in top_k(first_right(scores.numpy(), right), (1, TOP) if right.shape[1] > TOP else (1,)).items():
        console.print(
            f"top-{k} accuracy {share}, {len(opened):,} images, {len(labelled.labels)} labels",
            highlight=False,
            soft_wrap=True,
        )


def _show(opened: Sequence[str], names: Sequence[str], probabilities: Tensor, console: Console) -> None:
    for image, row in zip(opened, probabilities, strict=True):
        best = row.topk(min(SHOWN, len(names)))
        found = ", ".join(f"{names[i]} {value:.1%}" for value, i in zip(best.values, best.indices, strict=True))
        console.print(f"{image}: {found}", markup=False, highlight=False, soft_wrap=True)
