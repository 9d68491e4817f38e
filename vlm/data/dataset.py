"""From examples to batches: conversations tokenized, trees made, rows packed, pixels or kept features beside them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from vlm.chat_templates import Refused
from vlm.data.augmentation import Augmentation
from vlm.data.check import image_problem
from vlm.data.conversation import IGNORE, TokenizedBranch, tokenize_branch
from vlm.data.example import Branch, Example, Problem
from vlm.data.features import FeatureCache
from vlm.data.image_inputs import image_inputs, naming_refused, processed_once
from vlm.data.images import ImageError, RefusedImages, image_size, open_image
from vlm.data.prompts import is_prefix_lm
from vlm.data.tree_masks import TreeMasks, require_trees
from vlm.data.trees import Tree, lay_out, lay_out_plain, make_tree, pack, paths, trunk_length
from vlm.errors import UserError
from vlm.tiling import Size, size_of

T = TypeVar("T")
Progress = Callable[[Iterable[T], int], Iterable[T]]


@dataclass
class TreeItem:
    """One example, ready: its tree, and where its images come from (kept features, or the images themselves).

    `answers` counts the branches in the tree, `answers_of_example` those of all trees about its images. `features` are
    the keys of all tiles of its images, and `image_sizes` are known, where there is tiling. `augmentation` is what is
    done to the images, and the seed that it follows; `opened` are the images where that has been done.
    """

    tree: Tree
    example: Example
    features: tuple[str, ...] = ()
    answers_of_example: int = 1
    image_sizes: tuple[Size, ...] = ()
    augmentation: tuple[Augmentation, str] | None = None
    opened: tuple[Image.Image, ...] | None = None

    @property
    def answers(self) -> int:
        return max(self.tree.branch_ids)

    @property
    def content(self) -> bytes:
        """What is learned from it."""
        return np.array([self.tree.input_ids, self.tree.labels], dtype=np.int64).tobytes()

    def blank(self) -> TreeItem:
        """The same without labels."""
        return replace(self, tree=replace(self.tree, labels=[IGNORE] * len(self.tree)))

    def open_images(self) -> list[Image.Image]:
        if self.opened is not None:
            return list(self.opened)
        return opened_images(self.example, self.augmentation)


def opened_images(example: Example, augmentation: tuple[Augmentation, str] | None) -> list[Image.Image]:
    """The images of `example`, changed by the augmentation, which follows the seed beside it."""
    images = [open_image(source, where=example.where) for source in example.images]
    if augmentation is None:
        return images
    augment, seed = augmentation
    return [augment(image, f"{seed}, {number}") for number, image in enumerate(images)]


Row = list[TreeItem]
"""Items whose trees stand in one row."""


@dataclass
class LeftOut:
    """What did not fit into `max_length`, or into the model's learned positions, counted by branch. `positions` is
    their number if something did not fit into them, else 0."""

    examples: int = 0
    branches: int = 0
    longest: int = 0
    positions: int = 0

    def in_words(self, max_length: int, name: str) -> str:
        model = f" or the {self.positions} positions of the model" if self.positions else ""
        return (
            f"{name}: {self.branches} answers left out ({self.examples} whole examples), with which an example is "
            f"longer than data.max_length {max_length} tokens{model}; the longest is {self.longest}"
        )


def make_items(
    examples: Sequence[Example],
    processor: Any,
    *,
    max_length: int,
    max_positions: int | None = None,
    too_long: Literal["skip", "drop_branches", "error"],
    report: Callable[[Problem], None],
    features: Mapping[int, tuple[str, ...]] | None = None,
    open_images: bool = True,
    progress: Progress[int],
) -> tuple[list[TreeItem], LeftOut]:
    """Tokenize `examples` into trees.

    `features` gives for each example the keys of its images in a [`FeatureCache`]; examples that it lacks are broken
    and left out (whoever built it reported them). Without it every image is opened here, so that a broken one is
    reported now and does not stop the training later, unless `open_images` is false. What is longer than `max_length`
    tokens, or has an answer that with its prompt is longer than `max_positions`, is handled as `too_long` says and
    counted; an image is never cut, and neither is an answer. Where text stands
    before an image and differs between the branches, they do not share the image, and each becomes a tree of its own;
    so does each prompt of a prefix LM, whose image sees it.
    Raises ValueError for `too_long="error"`, and UserError for a model that needs as many images in each example.
    """
    _require_one_count(examples, processor)
    items: list[TreeItem] = []
    left_out = LeftOut()
    memory: dict[str, TokenizedBranch] = {}
    with processed_once(processor):
        for index in progress(range(len(examples)), len(examples)):
            example = examples[index]
            if features is not None and index not in features:
                continue
            try:
                # Kept features were made of images that open.
                opened = features is None and open_images
                images = [open_image(source, where=example.where) for source in example.images] if opened else []
                if not getattr(processor, "tiling", None):
                    sizes = []
                elif opened:
                    sizes = [size_of(image) for image in images]
                else:
                    sizes = [image_size(source, where=example.where) for source in example.images]
            except ImageError as error:
                report(image_problem(error, example))
                continue
            try:
                with naming_refused(processor, images):
                    branches = [_tokenize(processor, branch, images, sizes, memory) for branch in example.branches]
            except RefusedImages as error:
                pairs = zip(images, example.images, strict=True)
                named = [found for image, source in pairs if (found := error.of(image, source, example.where))]
                report(image_problem(named[0], example))
                continue
            except Refused as error:
                report(Problem(example.where, "", str(error), lost=len(example.branches)))
                continue
            groups = _groups(branches, processor)
            limits = (max_length, max_positions)
            kept = [fitting for group in groups if (fitting := _fit(group, limits, too_long, example, left_out))]
            left_out.examples += not kept
            keys = features[index] if features is not None else ()
            answers = sum(map(len, kept))
            items += [TreeItem(make_tree(group), example, keys, answers, tuple(sizes)) for group in kept]
    return items, left_out


def _groups(branches: list[TokenizedBranch], processor: Any) -> list[list[TokenizedBranch]]:
    """The branches that make a tree together: those whose images saw or read the same question, if they do at all, and
    have all image tokens in the trunk, so that each image is in the row once."""
    by_question: dict[Any, list[TokenizedBranch]] = {}
    for branch in branches:
        prompt = branch.token_types["token_type_ids"].count(0) if is_prefix_lm(processor) else 0
        by_question.setdefault(repr((branch.input_ids[:prompt], branch.qformer_inputs)), []).append(branch)
    image_tokens = set(processor.image_token_ids)
    groups = []
    for group in by_question.values():
        start = trunk_length(group)
        shared = all(image_tokens.isdisjoint(branch.input_ids[start:]) for branch in group)
        groups += [group] if shared else [[branch] for branch in group]
    return groups


def _tokenize(
    processor: Any, branch: Branch, images: list[Image.Image], sizes: list[Size], memory: dict[str, TokenizedBranch]
) -> TokenizedBranch:
    # Our own processor gives images the same number of tokens whatever they show, with tiling if they are of one size,
    # so equal conversations about different images have equal ids.
    if not getattr(processor, "fixed_image_tokens", False):
        return tokenize_branch(processor, branch, images)
    key = repr((branch.messages, sizes))
    if key not in memory:
        memory[key] = tokenize_branch(processor, branch, image_sizes=sizes)
    return memory[key]


def _fit(
    branches: list[TokenizedBranch],
    limits: tuple[int, int | None],
    too_long: str,
    example: Example,
    left_out: LeftOut,
) -> list[TokenizedBranch]:
    """The branches whose tree is within `limits`: its tokens, and those of each path, whose positions begin at 0."""
    max_length, max_positions = limits
    size, path = len(make_tree(branches)), max(len(branch.input_ids) for branch in branches)
    ends = max_positions is not None and path > max_positions
    if size <= max_length and not ends:
        return branches
    left_out.longest = max(left_out.longest, size)
    left_out.positions = (max_positions or 0) if ends else left_out.positions
    if too_long == "error" and ends:
        raise UserError(
            f"{example.where}: {path} tokens with an answer, and the model has {max_positions} positions. "
            "Set data.too_long to skip or drop_branches."
        )
    if too_long == "error":
        raise ValueError(
            f"{example.where}: {size} tokens with all its answers, over data.max_length {max_length}. "
            "Raise it, or set data.too_long to skip or drop_branches."
        )
    kept: list[TokenizedBranch] = []
    if too_long == "drop_branches":
        for branch in branches:
            fits = max_positions is None or len(branch.input_ids) <= max_positions
            if fits and len(make_tree([*kept, branch])) <= max_length:
                kept.append(branch)
    left_out.branches += len(branches) - len(kept)
    return kept


def one_row_an_answer(items: Sequence[TreeItem]) -> list[TreeItem]:
    """The items with each branch in a tree of its own: what a model needs for which trees are not exact."""
    return [replace(item, tree=path) for item in items for path in paths(item.tree)]


class TreeDataset(Dataset[Row]):
    """The items, packed into rows of at most `max_tokens` tokens; an index gives a row.

    Neighbours in the data are often alike, so rows are packed from the items in a random order, another one in each
    epoch. What is expensive, opening images or reading features, is left to the collator. The longest row is the first:
    neighbours make batches with little padding. `row_lengths` are their tokens, the same in each epoch. The index `~i`
    gives row i blank: nothing is learned from it, and it counts nowhere.

    `augmentation` changes the images, of an example alike wherever it stands, and in each epoch in another way.
    """

    def __init__(
        self, items: Sequence[TreeItem], max_tokens: int, seed: int | str = 0, augmentation: Augmentation | None = None
    ) -> None:
        self.items = random.Random(seed).sample(items, len(items))
        self.seed = seed
        self.augmentation = augmentation
        lengths = [len(item.tree) for item in self.items]
        self._packed = sorted(pack(lengths, max_tokens), key=lambda row: -sum(lengths[i] for i in row))
        self.row_lengths = [sum(lengths[i] for i in row) for row in self._packed]
        self._alike: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            self._alike.setdefault(length, []).append(index)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Deal the items into the rows of `epoch`. Items of equal length change places, so that there are as many rows
        as before, and as full."""
        self.epoch = epoch
        dealt = list(self.items)
        rng = random.Random(f"{self.seed}, {epoch}")
        for places in self._alike.values():
            for place, index in zip(places, rng.sample(places, len(places)), strict=True):
                dealt[place] = self.items[index]
        self.rows = [[dealt[i] for i in row] for row in self._packed]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        if index < 0:
            return [item.blank() for item in self[~index]]
        row = self.rows[index]
        if self.augmentation is None:
            return row
        # By a seed and not in turn, so that a resumed run and any number of workers see the same.
        seeds = [f"{self.seed}, {self.epoch}, {item.example.where}" for item in row]
        return [replace(item, augmentation=(self.augmentation, seed)) for item, seed in zip(row, seeds, strict=True)]


@dataclass
class TreeCollator:
    """Lays rows of items out and adds what the model sees of their images.

    Gives `input_ids`, `labels`, `position_ids` `[B, L]`, what `masks` makes of the trees, by default an
    `attention_mask` `[B, 1, L, L]` (boolean), and what the image processor makes of the images, in row order
    (`pixel_values [images, 3, H, W]` with most), or `vision_features [images, N, D]` with `vision_grid`.

    `plain` gives each item, of one branch then, a row of its own, without `position_ids` and with an `attention_mask`
    `[B, L]`. `answer_weighting` is that of the recipe; `root_answers` adds `loss_weights [B, L]`.
    A `blank` row, with images and without labels, is added to batches without images.
    """

    processor: Any
    features: FeatureCache | None = None
    masks: TreeMasks | None = None
    plain: bool = False
    answer_weighting: Literal["equal_tokens", "root_answers"] = "equal_tokens"
    blank: Row | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        if self.blank is not None and not any(item.example.images for row in rows for item in row):
            rows = [*rows, self.blank]
        if self.plain:
            rows = [[item] for row in rows for item in row]
        items = [item for row in rows for item in row]
        trees = [[item.tree for item in row] for row in rows]
        batch: dict[str, Any]
        if self.plain:
            batch = lay_out_plain([item.tree for item in items], self._padding())
        else:
            require_trees(trees)
            batch = lay_out(trees, self._padding())
            batch |= self.masks(trees, batch["attention_mask"]) if self.masks is not None else {}
        if self.answer_weighting == "root_answers":
            batch["loss_weights"] = _root_weights(rows)
        return batch | self.images(items)

    def _padding(self) -> int:
        tokenizer = self.processor.tokenizer
        return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    def images(self, items: Sequence[TreeItem]) -> dict[str, Any]:
        """What the model sees of the items' images, in order."""
        if self.features is not None:
            kept = [self.features[key] for item in items for key in item.features]
            if not kept:
                return {}
            sizes = [size for item in items for size in item.image_sizes]
            tiled = {"image_sizes": torch.tensor(sizes)} if sizes else {}
            return {"vision_features": torch.stack(kept), "vision_grid": self.features.grid, **tiled}
        rows = [item.open_images() for item in items]
        return image_inputs(self.processor, rows) if any(rows) else {}


def _require_one_count(examples: Sequence[Example], processor: Any) -> None:
    """Raise UserError where a batch would have rows with several numbers of images, and the model takes the difference
    for images: Mllama's words before an image look at all places for images, also at empty ones."""
    counts = sorted({len(example.images) for example in examples})
    if len(counts) > 1 and "cross_attention_mask" in processor.model_input_names:
        raise UserError(
            f"the examples have {' or '.join(map(str, counts))} images, and this model needs the same number in each: "
            "it would look at the places that others leave empty. Take those with one number"
        )


def _root_weights(rows: Sequence[Row]) -> Tensor:
    """`[B, L]`: one over the root of how many answers there are about the images of each token's example."""
    lines = [torch.cat([torch.full((len(item.tree),), item.answers_of_example**-0.5) for item in row]) for row in rows]
    return pad_sequence(lines, batch_first=True)


def supervised_tokens(items: Sequence[TreeItem]) -> int:
    """How many tokens are supervised."""
    return sum(label != IGNORE for item in items for label in item.tree.labels)


def shifted(labels: Tensor) -> Tensor:
    """`[B, L]` labels as the target of each position: the label of the next one, -100 at the end."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
