"""Images with the texts that belong to them, for training that pulls the two together: items, batches, who is whose."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm.data.augmentation import Augmentation
from vlm.data.check import image_problem
from vlm.data.dataset import Progress, opened_images
from vlm.data.example import Example, Problem
from vlm.data.features import FeatureCache
from vlm.data.image_inputs import SizeCheck
from vlm.data.images import ImageError, RefusedImages, open_image
from vlm.dual_encoder import longest_text, text_lengths, tokenize
from vlm.errors import UserError


@dataclass
class PairItem:
    """An image and its texts: what is answered about it, each once.

    `features` are the keys of its image in a [`FeatureCache`]; `augmentation` is what is done to the image, and the
    seed that it follows; `num_tokens` counts those of all its texts. What is `blank` fills a batch and counts nowhere.
    """

    example: Example
    texts: tuple[str, ...]
    num_tokens: int
    features: tuple[str, ...] = ()
    augmentation: tuple[Augmentation, str] | None = None
    blank: bool = False

    @property
    def answers(self) -> int:
        return len(self.texts)

    @property
    def content(self) -> bytes:
        """What is learned from it."""
        return json.dumps(self.texts).encode()


@dataclass
class CutTexts:
    """Texts that are longer than the `limit` of tokens that the text encoder reads, counted."""

    limit: int
    count: int = 0
    longest: int = 0

    def saw(self, lengths: Iterable[int]) -> None:
        """Count texts of these lengths in tokens."""
        for length in lengths:
            self.count += length > self.limit
            self.longest = max(self.longest, length)

    def __str__(self) -> str:
        return (
            f"{self.count:,} texts are cut to the {self.limit} tokens that the text encoder reads; the longest has "
            f"{self.longest:,}"
        )


def make_pairs(
    examples: Sequence[Example],
    processor: Any,
    config: Any,
    *,
    report: Callable[[Problem], None],
    features: Mapping[int, tuple[str, ...]] | None = None,
    progress: Progress[int],
) -> tuple[list[PairItem], CutTexts]:
    """`examples` as pairs for the dual encoder of `config` and `processor`; what has not one image, or no text, goes to
    `report`.

    `features` gives for each example the key of its image in a [`FeatureCache`]; examples that it lacks are broken and
    left out (whoever built it reported them). Without it every image is opened here, so that a broken one is reported
    now and does not stop the training later.
    """
    items = []
    cut = CutTexts(longest_text(processor.tokenizer, config))
    check = SizeCheck(processor)
    for index in progress(range(len(examples)), len(examples)):
        example = examples[index]
        if features is not None and index not in features:
            continue
        texts = tuple(dict.fromkeys(text for branch in example.branches if (text := branch.answer.strip())))
        if len(example.images) != 1 or not texts:
            why = f"has {len(example.images)} images, where a pair has one" if texts else "has no text"
            report(Problem(example.where, "", why, lost=len(example.branches)))
            continue
        if features is None:
            try:
                image = open_image(example.images[0], where=example.where)
                check([image])
            except ImageError as error:
                report(image_problem(error, example))
                continue
            except RefusedImages as refused:
                report(image_problem(refused.error_of(image, example.images[0], example.where), example))
                continue
        lengths = text_lengths(processor.tokenizer, texts)
        cut.saw(lengths)
        tokens = sum(min(length, cut.limit) for length in lengths)
        items.append(PairItem(example, texts, tokens, features[index] if features is not None else ()))
    return items, cut


class PairDataset(Dataset[PairItem]):
    """The items, in a random order, another one in each epoch. `row_lengths` are the tokens of their texts, in the
    order of the epoch. The index `~i` gives item i blank. `augmentation` changes the images, in each epoch in another
    way."""

    def __init__(self, items: Sequence[PairItem], seed: int = 0, augmentation: Augmentation | None = None) -> None:
        self.items = list(items)
        self.seed = seed
        self.augmentation = augmentation
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.order = random.Random(f"{self.seed}, {epoch}").sample(range(len(self.items)), len(self.items))

    @property
    def row_lengths(self) -> list[int]:
        return [self.items[index].num_tokens for index in self.order]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> PairItem:
        if index < 0:
            return replace(self[~index], blank=True)
        item = self.items[self.order[index]]
        if self.augmentation is None:
            return item
        # By a seed and not in turn, so that a resumed run and any number of workers see the same.
        return replace(item, augmentation=(self.augmentation, f"{self.seed}, {self.epoch}, {item.example.where}"))


@dataclass
class PairCollator:
    """A batch of items for the dual encoder of `config` and `processor`.

    Gives of the texts `input_ids`, `attention_mask` `[T, L]`, and of the images `pixel_values [B, 3, H, W]`, or
    `vision_features [B, 1, D]` where they are kept; who is whose by `image_ids [B]`, `images_of_texts [T]` and
    `text_ids [T]` (see [`positives`]), which images and texts are not blank by `real_images [B]` and `real_texts [T]`;
    and for the record `examples`, by file and row, and `counts [B, 3]`: images,
    texts and tokens.
    """

    processor: Any
    config: Any
    features: FeatureCache | None = None

    def __call__(self, items: Sequence[PairItem]) -> dict[str, Any]:
        texts = [text for item in items for text in item.texts]
        ids = [_number(item.example.image_id) for item in items]
        batch = dict(tokenize(self.processor.tokenizer, self.config, texts))
        if self.features is not None:
            batch["vision_features"] = torch.stack([self.features[item.features[0]] for item in items])
        else:
            images = [opened_images(item.example, item.augmentation)[0] for item in items]
            batch["pixel_values"] = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return batch | {
            "image_ids": torch.tensor(ids),
            "images_of_texts": torch.tensor([n for n, item in zip(ids, items, strict=True) for _ in item.texts]),
            "text_ids": torch.tensor([text_number(text) for text in texts]),
            "real_images": torch.tensor([not item.blank for item in items]),
            "real_texts": torch.tensor([not item.blank for item in items for _ in item.texts]),
            "examples": [item.example.where for item in items if not item.blank],
            "counts": torch.tensor(
                [[1, item.answers, item.num_tokens] if not item.blank else [0] * 3 for item in items]
            ),
        }


def positives(image_ids: Tensor, images_of_texts: Tensor, text_ids: Tensor) -> Tensor:
    """`[images, texts]`, true where the text belongs to the image, or says the same as one that does: the number of an
    image is in `image_ids [images]`, of a text's image in `images_of_texts [texts]`, of what it says in `text_ids
    [texts]`."""
    own = image_ids[:, None] == images_of_texts[None]
    # Not by a product of matrices, of texts by texts: each image's texts, as numbers, are looked for among all.
    kinds, kind_of_text = text_ids.unique(return_inverse=True)
    says = torch.zeros(len(image_ids), len(kinds), dtype=torch.bool, device=own.device)
    rows, texts = own.nonzero(as_tuple=True)
    says[rows, kind_of_text[texts]] = True
    return says[:, kind_of_text]


def require_negatives(items: Sequence[PairItem], batch_size: int) -> None:
    """Raise UserError if no batch of `batch_size` items has a text that does not belong to each of its images. A loss
    that tells texts apart has no gradient then."""
    if batch_size == 1:
        raise UserError(
            "contrastive.loss: infonce tells the texts of a batch apart, and a batch has one image only: raise "
            "train.per_device_train_batch_size, or use sigmoid"
        )
    texts = {frozenset(map(text_number, item.texts)) for item in items}
    if len(texts) == 1 and len(items) > 1:
        said = " and ".join(map(repr, items[0].texts[:3]))
        raise UserError(
            f"the texts of all images are the same ({said}), so that there is nothing to tell the images apart by: "
            "give images captions that differ"
        )


def text_number(text: str) -> int:
    """A number for what a text says, whatever its case and spaces."""
    return _number(" ".join(text.lower().split()))


def _number(name: str) -> int:
    """63 bits of a hash."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogatepass")).digest()[:8], "big") >> 1
