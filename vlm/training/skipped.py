"""Which examples were in the steps that were skipped, for who wants to look at them."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from vlm.printing import json_text


class SkippedSteps:
    """Appends to the file `path` a line of JSON for each step whose gradients are not finite: the batches of the step,
    each with its loss and the places in the data (file and row) of its examples. `count` says how many there were."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage = path, stage
        self.count = 0
        self.batches: list[tuple[Tensor, list[str]]] = []

    def saw(self, loss: Tensor, examples: list[str]) -> None:
        """Note a batch of the step that is being taken."""
        self.batches.append((loss.detach(), examples))

    def step_ends(self, step: int, *, skipped: bool) -> None:
        """Forget the step's batches, after they were written if it was `skipped`. All processes call it together."""
        batches, self.batches = self.batches, []
        if not skipped:
            return
        self.count += 1
        mine = [{"loss": _number(float(loss)), "examples": examples} for loss, examples in batches]
        entry = {"stage": self.stage, "step": step, "batches": gather_object(mine)}
        if PartialState().is_main_process:
            with suppress(OSError), self.path.open("a", encoding="utf-8") as file:  # a full disk is no reason to stop
                file.write(json_text(entry) + "\n")


def _number(loss: float) -> float | str:
    return loss if math.isfinite(loss) else str(loss)  # JSON has no word for it
