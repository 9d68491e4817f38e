"""What is tried before a stage trains: whether trees are exact for its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from vlm.data.conversation import TokenizedBranch
from vlm.data.dataset import Row, TreeCollator, TreeItem, one_row_an_answer
from vlm.data.tree_masks import NotATree
from vlm.data.trees import make_tree, paths
from vlm.training.inputs import scoring_inputs
from vlm.training.trainer import token_losses

TOLERANCE = 3e-4
"""How far apart the losses of a token may be on average: rounding makes 1e-5, a rule not followed 1e-2 and more."""


@torch.no_grad()
def why_not_trees(model: Any, collator: TreeCollator, items: Sequence[TreeItem], device: torch.device) -> str | None:
    """Why `model` must have one row an answer; None if the losses of trees equal those.

    They do not where layers go their own way past the mask and the positions that they are given: M-RoPE, recurrence.
    Tried on one row of two examples and up to four answers. Whatever the model raises over a mask is a reason too.
    """
    model.eval()
    if not hasattr(model, "hf_device_map"):  # one that has a device map is where it should be
        model.to(device)
    row = _probe(items)
    wanted = _losses(model, replace(collator, plain=True), one_row_an_answer(row), device)
    try:
        found = _losses(model, collator, row, device)
    except torch.OutOfMemoryError:
        raise
    except NotATree as error:
        return str(error)
    except Exception as error:
        return f"it takes no mask of trees ({type(error).__name__}: {str(error).splitlines()[0]})"
    apart = (found - wanted).abs().mean()
    if apart <= TOLERANCE * wanted.mean().clamp(min=1):
        return None
    return (
        f"several answers in a row have a loss of {found.mean():.4f}, and one by one {wanted.mean():.4f}; its layers "
        "do not follow the mask and the positions that they are given"
    )


def _probe(items: Sequence[TreeItem]) -> Row:
    """A row of two small trees: of the example with most answers, and of that with the longest conversation."""
    most = max(items, key=lambda item: item.answers)
    rest = [item for item in items if item is not most]
    longest = max(rest, key=lambda item: max(item.tree.position_ids), default=None)
    return [_two_longest(item) for item in (most, longest) if item is not None]


def _two_longest(item: TreeItem) -> TreeItem:
    longest = sorted(paths(item.tree), key=len)[-2:]
    tree = make_tree(
        [TokenizedBranch(path.input_ids, path.labels, path.token_types, path.qformer_inputs) for path in longest]
    )
    return replace(item, tree=tree)


def _losses(model: Any, collator: TreeCollator, row: Row, device: torch.device) -> Tensor:
    """The loss of each supervised token, answer by answer."""
    batch = send_to_device(collator([row]), device)
    labels, _ = batch.pop("labels"), batch.pop("loss_weights", None)
    outputs = model(**scoring_inputs(model, batch, labels))
    return token_losses(outputs, labels)[0]
