"""What is tried before a stage trains: whether trees are exact for its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from vlm.data.conversation import IGNORE
from vlm.data.dataset import Row, TreeCollator, one_row_an_answer, shifted
from vlm.data.tree_masks import NotATree
from vlm.training.trainer import token_losses

TOLERANCE = 1e-3
"""How far apart the losses of a token may be on average: rounding makes 1e-5, a rule not followed 1e-2 and more."""


@torch.no_grad()
def why_not_trees(model: Any, collator: TreeCollator, rows: Sequence[Row], device: torch.device) -> str | None:
    """Why `model` must have one row an answer; None if the losses of trees equal those.

    They do not where layers go their own way past the mask and the positions that they are given: M-RoPE, recurrence,
    a prefix that sees ahead. Tried on the row with the longest conversation, that with the example of most answers and
    that with most examples. Whatever the model raises over a mask is a reason too.
    """
    model.to(device).eval()
    plain = replace(collator, plain=True)
    for row in _telling(rows):
        wanted = _losses(model, plain, one_row_an_answer(row), device)
        try:
            found = _losses(model, collator, row, device)
        except torch.OutOfMemoryError:
            raise
        except NotATree as error:
            return str(error)
        except Exception as error:
            return f"it takes no mask of trees ({type(error).__name__}: {str(error).splitlines()[0]})"
        apart = (found - wanted).abs().mean().item()
        if not apart <= TOLERANCE * max(1.0, wanted.mean().item()):
            return (
                f"the loss of a row of several answers is {found.mean():.4f}, and one by one {wanted.mean():.4f}: its "
                "layers do not follow the mask and the positions that they are given"
            )
    return None


def _telling(rows: Sequence[Row]) -> list[Row]:
    longest = max(rows, key=lambda row: max(max(item.tree.position_ids) for item in row))
    answers = max(rows, key=lambda row: max(item.answers for item in row))
    examples = max(rows, key=len)
    return list({id(row): row for row in (longest, answers, examples)}.values())


def _losses(model: Any, collator: TreeCollator, row: Row, device: torch.device) -> Tensor:
    """The loss of each supervised token, answer by answer."""
    batch = send_to_device(collator([row]), device)
    labels, _ = batch.pop("labels"), batch.pop("loss_weights", None)
    outputs = model(**batch, logits_to_keep=shifted(labels) != IGNORE, use_cache=False)
    return token_losses(outputs, labels)[0]
