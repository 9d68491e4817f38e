"""One image, many answers, one row: message trees.

The conversations about an image share their beginning: the image, and often the question. A tree keeps that beginning
once, as a trunk, and lays the rest out as branches behind it:

    tokens     trunk ............ | branch 1 ...... | branch 2 ...
    positions  0 1 2 ... t-1      | t t+1 ...       | t t+1 ...
    attends to trunk so far       | trunk, branch 1 | trunk, branch 2

so that every token sees exactly what it would see in a row of its own, and loss and gradients equal those of one row an
answer. Molmo trains so (arXiv 2409.17146, 2601.10611: "message trees"). Where an answer begins right after the trunk,
each branch starts with the last shared token once more, so that the ordinary shifted labels work unchanged. Several
trees stand in one row; none sees another.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.data.conversation import IGNORE, TokenizedBranch
from vlm.tree_attention import TRUNK

PADDING = -1


@dataclass
class Tree:
    """A trunk and its branches, laid out in a line; all lists have the same length.

    `branch_ids` is 0 in the trunk and counts the branches from 1.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    branch_ids: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


def make_tree(branches: Sequence[TokenizedBranch]) -> Tree:
    """The tree of conversations about the same images."""
    start = trunk_length(branches) if len(branches) > 1 else 0
    trunk = branches[0].input_ids[:start]
    tree = Tree(list(trunk), [IGNORE] * start, list(range(start)), [TRUNK] * start)
    for number, branch in enumerate(branches, start=1):
        length = len(branch.input_ids) - start
        tree.input_ids += branch.input_ids[start:]
        tree.labels += [IGNORE, *branch.labels[start + 1 :]]
        tree.position_ids += range(start, start + length)
        tree.branch_ids += [number] * length
    return tree


def trunk_length(branches: Sequence[TokenizedBranch]) -> int:
    """How many tokens the branches begin with in common, up to the first supervised one: a token that one answer
    supervises must count once an answer, even where answers begin alike.

    One less if a branch supervises the token that follows: what predicts that token must then stand before it. A branch
    has at least one token.
    """
    first = branches[0]
    shared = min(min(len(b.input_ids) - 1, _first_supervised(b)) for b in branches)
    for other in branches[1:]:
        shared = next((i for i in range(shared) if first.input_ids[i] != other.input_ids[i]), shared)
    supervised = any(b.labels[shared] != IGNORE for b in branches)
    return max(shared - 1, 0) if supervised else shared


def _first_supervised(branch: TokenizedBranch) -> int:
    return next((i for i, label in enumerate(branch.labels) if label != IGNORE), len(branch.labels))


def paths(tree: Tree) -> list[Tree]:
    """Each branch with its trunk, as a tree of its own: the rows that `tree` stands for."""
    found = []
    for number in range(1, max(tree.branch_ids) + 1):
        kept = [i for i, branch in enumerate(tree.branch_ids) if branch in (TRUNK, number)]
        columns = (tree.input_ids, tree.labels, tree.position_ids)
        ids, labels, positions = ([column[i] for i in kept] for column in columns)
        found.append(Tree(ids, labels, positions, [min(tree.branch_ids[i], 1) for i in kept]))
    return found


def pack(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of `lengths` grouped into rows of at most `max_tokens`, longest first into the fullest row with room.

    One that is longer than `max_tokens` has a row of its own. Rows keep the given order inside.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is free in each row, in order: data sets have 100,000 images
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = max_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        bisect.insort(room, (free - lengths[index], row))
    return [sorted(row) for row in rows]


def lay_out(rows: Sequence[Sequence[Tree]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows of trees as the model's inputs: `input_ids`, `labels`, `position_ids` `[B, L]` and the boolean
    `attention_mask` `[B, 1, L, L]`."""
    length = max(sum(map(len, row)) for row in rows)
    fill = {"input_ids": pad_token_id, "labels": IGNORE, "position_ids": 0}
    columns = {name: torch.full((len(rows), length), value) for name, value in fill.items()}
    tree_ids = torch.full((len(rows), length), PADDING)
    branch_ids = torch.full((len(rows), length), PADDING)
    for r, row in enumerate(rows):
        start = 0
        for t, tree in enumerate(row):
            span = slice(start, start + len(tree))
            for name, column in columns.items():
                column[r, span] = torch.tensor(getattr(tree, name))
            tree_ids[r, span] = t
            branch_ids[r, span] = torch.tensor(tree.branch_ids)
            start += len(tree)
    return {**columns, "attention_mask": tree_mask(tree_ids, branch_ids)}


def tree_mask(tree_ids: Tensor, branch_ids: Tensor) -> Tensor:
    """`[B, 1, L, L]`: which token (row) attends to which (column), from `[B, L]` numbers of tree and branch.

    A padding token attends to itself, since a softmax over nothing is NaN.
    """
    length = tree_ids.shape[1]
    same_tree = tree_ids[:, :, None] == tree_ids[:, None, :]
    on_the_way = (branch_ids[:, None, :] == TRUNK) | (branch_ids[:, :, None] == branch_ids[:, None, :])
    causal = torch.ones(length, length, dtype=torch.bool, device=tree_ids.device).tril()
    real = (tree_ids != PADDING)[:, None, :]
    itself = torch.eye(length, dtype=torch.bool, device=tree_ids.device)
    return ((same_tree & on_the_way & causal & real) | itself).unsqueeze(1)
