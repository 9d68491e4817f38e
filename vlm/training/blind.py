"""Whether the bridge is used: the held-out loss beside that with images dealt to other examples."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

from vlm.data.dataset import TreeDataset, TreeItem
from vlm.eval.runner import derangement

logger = logging.getLogger(__name__)

SAME = 0.01
"""So little, as a share of the loss, is no difference: what a model that does not look has by chance."""


class BlindLoss:
    """Called after an evaluation it gives `eval_blind_loss`, until that is larger than the held-out loss: then the
    images are seen to matter, and it costs no more time. While it is not, a warning says so.

    The same is measured of answers after training (vlm.eval); the loss tells much earlier.
    """

    def __init__(self, trainer: Any, rows: TreeDataset) -> None:
        self.trainer, self.rows, self.seen = trainer, dealt(rows), False

    def __call__(self, sighted: float) -> dict[str, float]:
        if self.seen or self.rows is None:
            return {}
        loader = self.trainer.get_eval_dataloader(self.rows)
        blind = self.trainer.evaluation_loop(loader, "blind", prediction_loss_only=True, metric_key_prefix="blind")
        loss = blind.metrics["blind_loss"]
        self.seen = loss > sighted * (1 + SAME)
        if not self.seen and self.trainer.is_world_process_zero():
            logger.warning(
                "step %d: the held-out loss is %.4f, and %.4f with the images of other examples: so far the images "
                "make no difference. If that stays so, the bridge is not used: look at the data, at the learning rate "
                "of the projector, and at which parts learn.",
                self.trainer.state.global_step,
                sighted,
                loss,
            )
        return {"eval_blind_loss": loss}


def dealt(rows: TreeDataset) -> TreeDataset | None:
    """`rows` in which each example has the images of another with as many tokens for images; None if there are not two
    such, with different images."""
    alike: dict[Any, list[TreeItem]] = {}
    for item in rows.items:
        if item.example.images:
            alike.setdefault((len(item.example.images), item.image_sizes), []).append(item)
    changed: dict[int, TreeItem] = {}
    for items in alike.values():
        shown = {item.example.image_id: item for item in items}
        if len(shown) > 1:
            other = derangement([*shown], seed=0)
            for item in items:
                new = shown[other[item.example.image_id]]
                example = replace(item.example, images=new.example.images)
                changed[id(item)] = replace(item, example=example, features=new.features)
    if not changed:
        return None
    blind = copy.copy(rows)
    blind.items = [changed.get(id(item), item) for item in rows.items]
    blind.set_epoch(rows.epoch)
    return blind
