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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm.data.conversation import IGNORE, TokenizedBranch
from vlm.tree_attention import TRUNK

PADDING = -1


@dataclass
class Tree:
    """A trunk and its branches, laid out in a line; all lists have the same length.

    `branch_ids` is 0 in the trunk and counts the branches from 1. `token_types` and `qformer_inputs` are those of
    `TokenizedBranch`; all branches have the latter in common.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    branch_ids: list[int]
    token_types: dict[str, list[Any]] = field(default_factory=dict)
    qformer_inputs: dict[str, list[list[int]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)


def make_tree(branches: Sequence[TokenizedBranch]) -> Tree:
    """The tree of conversations about the same images."""
    start = trunk_length(branches) if len(branches) > 1 else 0
    first = branches[0]
    types = {name: column[:start] for name, column in first.token_types.items()}
    tree = Tree(
        first.input_ids[:start], [IGNORE] * start, list(range(start)), [TRUNK] * start, types, first.qformer_inputs
    )
    for number, branch in enumerate(branches, start=1):
        length = len(branch.input_ids) - start
        tree.input_ids += branch.input_ids[start:]
        tree.labels += [IGNORE, *branch.labels[start + 1 :]]
        tree.position_ids += range(start, start + length)
        tree.branch_ids += [number] * length
        for name, column in branch.token_types.items():
            tree.token_types[name] += column[start:]
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
    for kept in path_places(tree):
        columns = (tree.input_ids, tree.labels, tree.position_ids, tree.branch_ids)
        ids, labels, positions, branch_ids = ([column[i] for i in kept] for column in columns)
        types = {name: [column[i] for i in kept] for name, column in tree.token_types.items()}
        found.append(
            Tree(ids, labels, positions, [min(branch, 1) for branch in branch_ids], types, tree.qformer_inputs)
        )
    return found


def path_places(tree: Tree) -> list[list[int]]:
    """For each branch, where the tokens of its path are in the tree: those of the trunk, then its own."""
    numbers = range(1, max(tree.branch_ids) + 1)
    return [[i for i, branch in enumerate(tree.branch_ids) if branch in (TRUNK, number)] for number in numbers]


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
    """Rows of trees as the model's inputs: `input_ids`, `labels`, `position_ids` and token types `[B, L]`, and the
    boolean `attention_mask` `[B, 1, L, L]`."""
    fill = {"input_ids": pad_token_id, "labels": IGNORE, "position_ids": 0, "branch_ids": PADDING}
    columns = {name: _column([[getattr(tree, name) for tree in row] for row in rows], fill[name]) for name in fill}
    tree_ids = _column([[[number] * len(tree) for number, tree in enumerate(row)] for row in rows], PADDING)
    mask = tree_mask(tree_ids, columns.pop("branch_ids"))
    return {**columns, **_token_types(rows), **_qformer_inputs(rows), "attention_mask": mask}


def lay_out_plain(paths: Sequence[Tree], pad_token_id: int) -> dict[str, Tensor]:
    """Trees of one branch, a row each, as any model takes them: `input_ids`, `labels`, `attention_mask` and token types
    `[B, L]`, padded at their ends. Positions, and who sees whom, are left to the model."""
    rows = [[path] for path in paths]
    return {
        "input_ids": _column([[path.input_ids] for path in paths], pad_token_id),
        "labels": _column([[path.labels] for path in paths], IGNORE),
        "attention_mask": _column([[[1] * len(path)] for path in paths], 0),
        **_token_types(rows),
        **_qformer_inputs(rows),
    }


def _qformer_inputs(rows: Sequence[Sequence[Tree]]) -> dict[str, Tensor]:
    """`[images, T]` by name, of the images of all rows in their order."""
    trees = [tree for row in rows for tree in row if tree.qformer_inputs]
    return {
        name: _column([[text] for tree in trees for text in tree.qformer_inputs[name]], 0)
        for name in (trees[0].qformer_inputs if trees else ())
    }


def _token_types(rows: Sequence[Sequence[Tree]]) -> dict[str, Tensor]:
    """`[B, L]` by name, or `[B, L, images, ...]` for those with a value for each image; zeros where there is none."""
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in rows for tree in row for name in tree.token_types):
        lines = [
            torch.tensor([value for tree in row for value in tree.token_types.get(name, [0] * len(tree))])
            for row in rows
        ]
        dimensions = max(line.ndim for line in lines)
        lines = [line.view(*line.shape, *[1] * (dimensions - line.ndim)) for line in lines]
        size = [max(sizes) for sizes in zip(*(line.shape for line in lines), strict=True)]
        found[name] = torch.zeros(len(lines), *size, dtype=torch.long)
        for row, line in enumerate(lines):
            found[name][row][tuple(map(slice, line.shape))] = line
    return found


def _column(rows: Sequence[Sequence[list[int]]], fill: int) -> Tensor:
    """What each tree of each row has, one behind the other, `[B, L]`; `fill` behind the shorter rows."""
    lines = [torch.tensor([value for values in row for value in values]) for row in rows]
    return pad_sequence(lines, batch_first=True, padding_value=fill)


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
