"""`vlm classify`: which of some labels is in an image, by a model that was not trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from vlm import generation
from vlm.batches import MAX_BATCH_TOKENS
from vlm.data.image_files import ImageFiles, find_images
from vlm.dual_encoder import is_dual_encoder
from vlm.embedding import load_embedder
from vlm.errors import UserError
from vlm.files import atomic_write, new_file
from vlm.loading import Placement
from vlm.printing import json_text, require_unicode
from vlm.recognition.labelled_images import read_labelled_images
from vlm.recognition.labels import read_labels, read_templates
from vlm.recognition.likelihood import LabelLikelihood
from vlm.recognition.tasks import Classifier, accuracy, classify, in_words
from vlm.recognition.zero_shot import ZeroShot

SHOWN = 3
"""Labels an image in the terminal."""


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
    placement: Placement = Placement(),
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
    require_unicode(prompt or "", "--prompt")
    with new_file(output):
        texts = read_templates(template, templates)
        labelled = read_labelled_images(data, label_column) if data else None
        names = labelled.labels if labelled else read_labels(labels or "")
        found = ImageFiles() if labelled else find_images(patterns)
        found.show_left_out(console)
        images = labelled.images if labelled else {path: path for path in found.paths}
        with console.status("loading the model"):
            classifier = load(model, names, texts, prompt, max_batch_tokens, placement)
        scores, broken = classify(classifier, images, console=console)
        for problem in [*(labelled.problems if labelled else ()), *broken]:
            console.print(f"left out: {problem}", markup=False, highlight=False, soft_wrap=True)
        if not scores:
            raise UserError(f"no image could be opened, of {len(images)}")
        probabilities = classifier.probabilities(torch.stack([*scores.values()]))
        if output is not None:
            _write(output, [*scores], names, probabilities)
        if labelled:
            for k, share in accuracy(labelled, scores).items():
                console.print(in_words(share, k, labelled, scores), highlight=False, soft_wrap=True)
        else:
            _show([*scores], names, probabilities, console)


def load(
    model: str,
    labels: Sequence[str],
    templates: Sequence[str],
    prompt: str | None,
    max_batch_tokens: int,
    placement: Placement = Placement(),
) -> Classifier:
    """By a dual encoder's vectors, or by likelihood under a vision-language model.

    Raises UserError for options of the other kind, and a model that is neither.
    """
    if is_dual_encoder(generation.load_config(model)):
        if prompt is not None:
            raise UserError("--prompt is what a vision-language model is asked; a dual encoder takes --template")
        return ZeroShot(load_embedder(model, **placement.options()), labels, templates)
    if len(templates) > 1:
        raise UserError("a vision-language model takes one --template, the answer as it would write it: 'A {}.'")
    network, processor = generation.load(model, **placement.options())
    answer = templates[0] if templates else None
    return LabelLikelihood(network, processor, labels, prompt=prompt, answer=answer, max_batch_tokens=max_batch_tokens)


def _write(output: Path, opened: Sequence[str], names: Sequence[str], probabilities: Tensor) -> None:
    with atomic_write(output) as file:
        for image, row in zip(opened, probabilities.tolist(), strict=True):
            best = names[max(range(len(names)), key=row.__getitem__)]
            line: dict[str, Any] = {"image": image, "label": best, "probabilities": dict(zip(names, row, strict=True))}
            file.write(json_text(line) + "\n")


def _show(opened: Sequence[str], names: Sequence[str], probabilities: Tensor, console: Console) -> None:
    for image, row in zip(opened, probabilities, strict=True):
        best = row.topk(min(SHOWN, len(names)))
        found = ", ".join(f"{names[i]} {value:.1%}" for value, i in zip(best.values, best.indices, strict=True))
        console.print(f"{image}: {found}", markup=False, highlight=False, soft_wrap=True)
