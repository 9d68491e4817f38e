"""Labels by a vision-language model: how likely each is as its answer to a question.

    score(label) = log p(label | image, question) - log p(label | blank image, question)

log p is summed over the tokens of the answer, its end token among them, so that `cat` is not half of `catfish`. What
is likely whatever is seen is taken off by an image without content, as "Calibrate Before Use" does it for texts (arXiv
2102.09690: probabilities are divided by those given a content-free input), in the logarithm. Sums are not divided by
the number of tokens: what a long label loses by its length, it loses with the blank image too (arXiv 2104.08315).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor

from vlm.batches import MAX_BATCH_TOKENS, batches_of
from vlm.data.conversation import IGNORE
from vlm.data.dataset import TreeCollator, TreeItem, make_items, one_row_an_answer
from vlm.data.encoding import BATCH_IMAGES, tile_keys
from vlm.data.example import Example, Problem, question_and_answer
from vlm.data.image_inputs import naming_refused
from vlm.data.images import RefusedImages
from vlm.data.tree_masks import TreeMasks
from vlm.data.trees import paths
from vlm.errors import UserError
from vlm.generation import encode_images, fixed_image_tokens
from vlm.positions import learned_positions, warn_beyond
from vlm.precision import input_device
from vlm.recipe_evaluation import Classification
from vlm.recognition.labels import fill
from vlm.tiling import size_of
from vlm.training.checks import why_not_trees
from vlm.training.inputs import scoring_inputs
from vlm.training.trainer import token_losses

PROMPT = "What is in the image?"
ANSWER = "{}"
LABELS_AT_ONCE = 256
"""A tree has so many branches at most: its mask grows with the square of its tokens."""
BLANK_SIDE = 224  # px


class LabelLikelihood:
    """Scores `labels`, written into the template `answer` (default: `ANSWER`), as answers to `prompt` (`PROMPT`).

    All labels of an image are the branches of one tree, which has image and question once, where that is
    [exact][`why_not_trees`]; elsewhere each label has a row of its own. Our own models encode an image once.
    `max_batch_tokens` is the most that a batch takes, with padding, unless one row is longer.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        labels: Sequence[str],
        *,
        prompt: str | None = None,
        answer: str | None = None,
        max_batch_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        self.model, self.processor, self.max_batch_tokens = model, processor, max_batch_tokens
        self.max_positions = learned_positions(model)
        self.prompt, self.answers = prompt or PROMPT, [fill(answer or ANSWER, label) for label in labels]
        self._fits_blank = False
        blank = blank_image(processor)
        trees = TreeCollator(processor, masks=TreeMasks(model))
        self.why_plain = why_not_trees(model, trees, self._items([blank, blank], None), input_device(model))
        """Why each label has a row of its own; None if all labels of an image have one."""
        self.collator = trees if self.why_plain is None else TreeCollator(processor, plain=True)
        self.prior = self.log_likelihoods([blank])
        """`[1, labels]`, of a blank image."""
        self._fits_blank = True

    def scores(self, images: Sequence[Image.Image]) -> Tensor:
        """`[images, labels]`: how much likelier, in nats, each label is with the image than with a blank one."""
        return self.log_likelihoods(images) - self.prior

    def probabilities(self, scores: Tensor) -> Tensor:
        """`[images, labels]`, with a softmax over the labels."""
        return scores.softmax(dim=-1)

    @torch.no_grad()
    def log_likelihoods(self, images: Sequence[Image.Image]) -> Tensor:
        """`[images, labels]`: the summed log-probability of each answer's tokens, in nats.

        Raises UserError when a batch does not fit into the memory of the accelerator, or an answer into the model's
        learned positions, and RefusedImages if the image processor does not take an image.
        """
        features = self._encode(images) if fixed_image_tokens(self.model, self.processor) else None
        with naming_refused(self.processor, images):
            items = self._items(images, features)
        if self.collator.plain:
            items = one_row_an_answer(items)
        collator = replace(self.collator, features=features)  # type: ignore[arg-type]  # in memory, not on disk
        ends = list(accumulate(item.answers for item in items))  # image by image, and in each label by label
        found = torch.zeros(ends[-1])
        lengths, keys = [len(item.tree) for item in items], [item.example.image_id for item in items]
        for batch in batches_of(lengths, keys, self.max_batch_tokens):
            try:
                losses = self._losses(collator, [items[row] for row in batch])
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"a batch of {len(batch)} rows of up to {max(lengths[row] for row in batch)} tokens does not fit "
                    f"into memory; lower --max-batch-tokens, which is {self.max_batch_tokens} ({error})"
                ) from None
            answers = [
                ends[row] - items[row].answers + branch - 1
                for row in batch
                for label, branch in zip(items[row].tree.labels, items[row].tree.branch_ids, strict=True)
                if label != IGNORE
            ]
            found.index_add_(0, torch.tensor(answers), -losses)
        return found.view(len(images), len(self.answers))

    def _losses(self, collator: TreeCollator, items: Sequence[TreeItem]) -> Tensor:
        """The cross-entropy of each supervised token, row by row."""
        batch = send_to_device(collator([[item] for item in items]), input_device(self.model))
        labels = batch.pop("labels")
        inputs = scoring_inputs(self.model, batch, labels)
        return token_losses(self.model(**inputs), labels)[0].cpu()

    def _items(self, images: Sequence[Image.Image], features: _Features | None) -> list[TreeItem]:
        """The trees of each image in turn, their branches in the order of the labels."""
        examples = [
            Example(
                (image,),
                tuple(
                    question_and_answer(self.prompt, answer, where=f"label {answer!r}")
                    for answer in self.answers[start : start + LABELS_AT_ONCE]
                ),
                image_id=str(number),
                where=f"image {number}",
            )
            for number, image in enumerate(images)
            for start in range(0, len(self.answers), LABELS_AT_ONCE)
        ]
        keys = None if features is None else {i: features.keys[int(e.image_id)] for i, e in enumerate(examples)}
        items, _ = make_items(
            examples,
            self.processor,
            max_length=sys.maxsize,
            too_long="error",
            report=_refuse,
            features=keys,
            progress=lambda each, total: each,
        )
        self._require_positions(items, images)
        return items

    def _require_positions(self, items: Sequence[TreeItem], images: Sequence[Image.Image]) -> None:
        """Raise RefusedImages for images with which an answer ends after the model's learned positions, and UserError
        if one does even with a blank image."""
        longest = max((max(item.tree.position_ids) + 1 for item in items), default=0)
        if self.max_positions is None:
            warn_beyond(self.model, longest - 1)
        if self.max_positions is None or longest <= self.max_positions:
            return
        refused: dict[int, tuple[Image.Image, str]] = {}
        lengths = ((max(path.position_ids) + 1, item) for item in items for path in paths(item.tree))
        for number, (length, item) in enumerate(lengths):
            if length > self.max_positions:
                answer = self.answers[number % len(self.answers)]
                places = f"{self.max_positions:,} positions"
                why = f"image, prompt and label have {length:,} tokens, and the model has {places}"
                if not self._fits_blank:
                    raise UserError(f"label {answer!r}: {why}; shorten the prompt or the label")
                image = int(item.example.image_id)
                refused.setdefault(image, (images[image], f"label {answer!r}: {why}"))
        raise RefusedImages([*refused.values()])

    def _encode(self, images: Sequence[Image.Image]) -> _Features:
        keys = [tile_keys(self.processor, str(number), size_of(image)) for number, image in enumerate(images)]
        kept: dict[str, Tensor] = {}
        for start in range(0, len(images), BATCH_IMAGES):
            encoded, grid = encode_images(self.model, self.processor, images[start : start + BATCH_IMAGES])
            for of_image, tiles in zip(keys[start : start + BATCH_IMAGES], encoded, strict=True):
                kept |= zip(of_image, tiles, strict=True)
        return _Features(keys, kept, grid)


def _refuse(problem: Problem) -> None:
    """These images are open: what is wrong is that the image processor refuses one."""
    raise UserError(str(problem))


def label_likelihood(
    model: Any, processor: Any, max_batch_tokens: int, labels: Sequence[str], task: Classification
) -> LabelLikelihood:
    """The classifier of a recipe's task. Raises UserError for several templates, of which an answer has one."""
    if len(task.templates) > 1:
        raise UserError("evaluation.classification: a model that writes takes one of `templates`: ['A {}.']")
    answer = task.templates[0] if task.templates else None
    return LabelLikelihood(
        model, processor, labels, prompt=task.prompt, answer=answer, max_batch_tokens=max_batch_tokens
    )


@dataclass
class _Features:
    """Features of images, in the words of `FeatureCache`; `keys` are those of each image's tiles."""

    keys: list[tuple[str, ...]]
    kept: dict[str, Tensor]
    grid: tuple[int, int]

    def __getitem__(self, key: str) -> Tensor:
        return self.kept[key]


def blank_image(processor: Any) -> Image.Image:
    """A square of the mean colour of the images that the encoder was trained on, which is normalised to zeros; grey for
    an image processor that does not say."""
    mean = getattr(processor.image_processor, "image_mean", None) or (0.5, 0.5, 0.5)
    red, green, blue = (round(255 * channel) for channel in mean)
    return Image.new("RGB", (BLANK_SIDE, BLANK_SIDE), (red, green, blue))
