"""From examples to batches: conversations tokenized, trees made, rows packed, pixels or kept features beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm.data.conversation import IGNORE, TokenizedBranch, tokenize_branch
from vlm.data.example import Branch, Example, Problem
from vlm.data.features import FeatureCache
from vlm.data.images import ImageError, open_image
from vlm.data.trees import Tree, lay_out, make_tree, pack

T = TypeVar("T")
Progress = Callable[[Iterable[T], int], Iterable[T]]


@dataclass
class TreeItem:
    """One example, ready: its tree, and where its images come from (kept features, or the images themselves)."""

    tree: Tree
    example: Example
    features: tuple[str, ...] = ()


@dataclass
class LeftOut:
    """What did not fit into `max_length`, counted by branch."""

    examples: int = 0
    branches: int = 0
    longest: int = 0


def make_items(
    examples: Sequence[Example],
    processor: Any,
    *,
    max_length: int,
    too_long: Literal["skip", "drop_branches", "error"],
    report: Callable[[Problem], None],
    features: Mapping[int, tuple[str, ...]] | None = None,
    progress: Progress[int],
) -> tuple[list[TreeItem], LeftOut]:
    """Tokenize `examples` into trees.

    `features` gives for each example the keys of its images in a [`FeatureCache`]; examples that it lacks are broken
    and left out (whoever built it reported them). What is longer than `max_length` tokens is handled as `too_long`
    says and counted; an image is never cut, and neither is an answer.
    Raises ValueError for `too_long="error"`.
    """
    items: list[TreeItem] = []
    left_out = LeftOut()
    memory: dict[str, TokenizedBranch] = {}
    for index in progress(range(len(examples)), len(examples)):
        example = examples[index]
        if features is not None and index not in features:
            continue
        try:
            branches = [
                _tokenize(processor, branch, example, memory, features is not None) for branch in example.branches
            ]
        except ImageError as error:
            report(Problem(example.where, "image", str(error), len(example.branches)))
            continue
        kept = _fit(branches, max_length, too_long, example, left_out)
        if kept:
            items.append(TreeItem(make_tree(kept), example, features[index] if features is not None else ()))
    return items, left_out


def _tokenize(
    processor: Any, branch: Branch, example: Example, memory: dict[str, TokenizedBranch], ids_only: bool
) -> TokenizedBranch:
    # Our own processor gives an image the same number of tokens whatever it shows, so equal conversations about
    # different images have equal ids.
    if not getattr(processor, "fixed_image_tokens", False):
        images = [open_image(source, where=example.where) for source in example.images]
        return tokenize_branch(processor, branch, images)
    key = repr(branch.messages)
    if key not in memory:
        memory[key] = tokenize_branch(processor, branch)
    return memory[key]


def _fit(
    branches: list[TokenizedBranch], max_length: int, too_long: str, example: Example, left_out: LeftOut
) -> list[TokenizedBranch]:
    """The branches whose tree is at most `max_length` tokens."""
    size = len(make_tree(branches))
    if size <= max_length:
        return branches
    left_out.longest = max(left_out.longest, size)
    if too_long == "error":
        raise ValueError(
            f"{example.where}: {size} tokens with all its answers, over data.max_length {max_length}. "
            "Raise it, or set data.too_long to skip or drop_branches."
        )
    kept: list[TokenizedBranch] = []
    if too_long == "drop_branches":
        for branch in branches:
            if len(make_tree([*kept, branch])) <= max_length:
                kept.append(branch)
    left_out.branches += len(branches) - len(kept)
    left_out.examples += not kept
    return kept


class TreeDataset(Dataset[TreeItem]):
    """The items, by index. What is expensive, opening images or reading features, is left to the collator."""

    def __init__(self, items: Sequence[TreeItem]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> TreeItem:
        return self.items[index]


@dataclass
class TreeCollator:
    """Packs a batch of items into rows of at most `max_tokens_per_row` and adds what the model sees of their images.

    Gives `input_ids`, `labels`, `position_ids` `[B, L]`, `attention_mask` `[B, 1, L, L]` (boolean) and either
    `pixel_values [images, 3, H, W]` or `vision_features [images, N, D]` with `vision_grid`, images in row order.
    """

    processor: Any
    max_tokens_per_row: int
    features: FeatureCache | None = None

    def __call__(self, items: Sequence[TreeItem]) -> dict[str, Any]:
        rows = pack([len(item.tree) for item in items], self.max_tokens_per_row)
        batch: dict[str, Any] = lay_out(
            [[items[i].tree for i in row] for row in rows], self.processor.tokenizer.pad_token_id
        )
        return batch | self._images([items[i] for row in rows for i in row])

    def _images(self, items: Sequence[TreeItem]) -> dict[str, Any]:
        if self.features is not None:
            kept = [self.features[key] for item in items for key in item.features]
            return {"vision_features": torch.stack(kept), "vision_grid": self.features.grid} if kept else {}
        images = [open_image(source, where=item.example.where) for item in items for source in item.example.images]
        if not images:
            return {}
        return dict(self.processor.image_processor(images, return_tensors="pt"))


def supervised_tokens(items: Sequence[TreeItem]) -> int:
    """How many tokens are supervised."""
    return sum(label != IGNORE for item in items for label in item.tree.labels)


def shifted(labels: Tensor) -> Tensor:
    """`[B, L]` labels as the target of each position: the label of the next one, -100 at the end."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
