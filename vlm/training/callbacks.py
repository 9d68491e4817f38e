"""What watches a training run: the metrics file, and the check that what should learn does and nothing else."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback

from vlm.data.dataset import TreeDataset
from vlm.data.pairs import PairDataset
from vlm.data.stream import StreamDataset
from vlm.disk_faults import going_on
from vlm.errors import UserError
from vlm.files import write_text
from vlm.printing import json_text
from vlm.training.finite import own_share
from vlm.training.history import read_metrics
from vlm.training.parts import named_parts, part_of

logger = logging.getLogger(__name__)

T = TypeVar("T")


class PartNotTraining(RuntimeError):  # noqa: N818 - named for what happened
    """A part that should learn does not, or a frozen one does."""


class Stopped(UserError):  # noqa: N818 - named for what happened
    """The run was told to stop, and what it had done is saved. The exit code is what a shell gives for the signal."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class EvaluationStopped(Exception):  # noqa: N818 - named for what happened
    """The run was told to stop while the held-out loss was taken."""


class NewRows(TrainerCallback):
    """Deals the examples into other rows in each epoch. Left to accelerate, the data set is not told the epoch after a
    resume, nor on several processes."""

    def __init__(self, rows: TreeDataset | StreamDataset | PairDataset) -> None:
        self.rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.set_epoch(int(state.epoch or 0))


SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""What tells a run to stop: Ctrl-C, a scheduler, a terminal that is closed."""


class StopOnSignal(TrainerCallback):
    """At one of `SIGNALS` the step is ended, or the evaluation left, a checkpoint saved and training left; `stopped`
    tells. The second time the signal does what it always does. Every process stops at the same step, whichever was
    told.

    Used as a context, after which signals act as before. What is no training calls `check` wherever it may stop.
    """

    def __init__(self) -> None:
        self.told: int | None = None
        self.stopped = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow it
            numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            heeded = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores one
            self.before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number: int, frame: object) -> None:
        self.told = number
        signal.signal(number, self.before[number])
        if os.environ.get("RANK", "0") == "0":
            # Not by print: the signal may have come in the middle of one.
            with suppress(OSError):  # the terminal may be gone
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: saving and stopping; a second one stops at once\n".encode())

    def check(self, doing: str) -> None:
        """Raise Stopped if this process was told to stop, with a word on what it was `doing`."""
        if self.told is not None:
            raise Stopped(f"stopped while {doing}; go on with --resume", self.told)

    def until_told(self, steps: Iterable[T]) -> Iterator[T]:
        """The steps of some work, which end early if this process is told to stop."""
        for step in steps:
            if self.told is not None:
                return
            yield step

    def checked(self, doing: str, steps: Iterable[T]) -> Iterator[T]:
        """The steps of some work, with a `check` before each."""
        for step in steps:
            self.check(doing)
            yield step

    def check_all(self, doing: str) -> None:
        """As `check`, if any process was told; all call it together."""
        self.told = max((number for number in gather_object([self.told]) if number is not None), default=None)
        self.check(doing)

    def _any_told(self, args: Any) -> bool:
        if args.world_size > 1:
            told = torch.tensor(self.told or 0, device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.told = int(told) or None
        return self.told is not None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._any_told(args) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._any_told(args):
            self.stopped = True
            raise EvaluationStopped


class MetricsLog(TrainerCallback):
    """Appends what the Trainer logs to `metrics.jsonl`, one JSON object a line, with stage, step and seconds. A number
    that is not finite is null.

    A resumed run takes out first what it had logged after its checkpoint: those steps come again. A line that cannot be
    written, as on a full disk, is said once and left out.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self.path, self.stage, self.start = path, stage, time.monotonic()
        self.said = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.path.is_file():
            kept = [
                entry
                for entry in read_metrics(self.path)
                if entry["stage"] != self.stage or entry["step"] <= state.global_step
            ]
            with going_on(self.path):
                write_text(self.path, "".join(json_text(entry) + "\n" for entry in kept))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            entry = {"stage": self.stage, "step": state.global_step, "seconds": round(time.monotonic() - self.start, 2)}
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json_text(entry | dict(logs or {})) + "\n")
            except OSError as error:
                if not self.said:
                    logger.warning("%s cannot be written (%s); training goes on without", self.path, error)
                self.said = True


PIECE = 2**20
"""Numbers of a weight that are looked at together."""


def _fingerprint(tensor: torch.Tensor) -> tuple[float, float]:
    """Sum and sum of magnitudes in float64, a piece at a time: a whole weight would take three times its room."""
    sums = torch.zeros(2, dtype=torch.float64, device=tensor.device)
    for piece in tensor.flatten().split(PIECE):
        exact = piece.double()
        sums += torch.stack([exact.sum(), exact.abs().sum()])
    total, magnitudes = sums.tolist()
    return total, magnitudes


UNUSED = "Is the part used by this model and this data? A learning rate of 0 has the same effect."


class PartCheck(TrainerCallback):
    """After the first steps every part in `rates` must have had a gradient and moved, and no other part moved.

    Some parts move a few steps late by design: the rate may start at zero, and a zero gate of cross-attention lets no
    gradient through to the projector until it has opened. So it waits `patience` steps before it calls that an error.
    `reason` says why there was no gradient, if it is known. Raises PartNotTraining.
    """

    patience = 5

    def __init__(self, model: nn.Module, rates: Mapping[str, float], reason: Callable[[], str] | None = None) -> None:
        self.model, self.rates, self.reason = model, rates, reason
        self.before: dict[str, tuple[float, float]] = {}
        self.with_gradient: set[str] = set()
        self.steps = 0
        self.skipped = False
        self.done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = self._fingerprints()  # now, since a checkpoint may have been loaded

    @torch.no_grad()
    def _fingerprints(self) -> dict[str, tuple[float, float]]:
        return {name: _fingerprint(own_share(parameter)) for _, name, parameter in named_parts(self.model)}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.skipped = True
        if not self.done:
            for part, _, parameter in named_parts(self.model):
                if parameter.grad is not None:
                    self.skipped = False
                    if bool(own_share(parameter.grad).any()):
                        self.with_gradient.add(part)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.done and not self.skipped:
            self.steps += 1
            self._check(last=self.steps >= self.patience)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.done and self.steps:
            self._check(last=self.steps > 1, ended=True)

    def _check(self, last: bool, ended: bool = False) -> None:
        after = self._fingerprints()
        moved = {part_of(name) for name, value in after.items() if value != self.before[name]}
        # The processes decide alike, though of a sharded model each sees its share alone.
        moved, self.with_gradient = (set(gather_object([*parts])) for parts in (moved, self.with_gradient))
        if wrong := sorted(moved - set(self.rates)):
            raise PartNotTraining(f"{', '.join(wrong)} should be frozen, but the first steps changed it")
        still = sorted(part for part in self.rates if part not in moved or part not in self.with_gradient)
        if still and (last or (ended and not moved)):
            raise PartNotTraining(
                f"{', '.join(still)} should learn, but got no gradient or did not move in the first steps. "
                + ((self.reason and self.reason()) or UNUSED)
            )
        if not still:
            self.done = True
            self.before = {}
