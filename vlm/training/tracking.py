"""Where a run can be watched: the bar in the terminal, and trackers such as TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.integrations import integration_utils
from transformers.trainer_callback import ProgressCallback

from vlm.errors import UserError, nearest

logger = logging.getLogger(__name__)

TRACKERS: dict[str, Any] = integration_utils.INTEGRATION_TO_CALLBACK
EVENTS = ("on_log", "on_save", "on_evaluate", "on_predict", "on_step_end", "on_epoch_end", "on_train_end")
"""When a tracker writes after it was set up."""
MODULES = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
"""Where transformers asks for another name than that of the tracker."""


def require_trackers(report_to: str | Sequence[str] | None) -> None:
    """Raise UserError for a tracker that transformers does not know, or that is not installed."""
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            raise UserError(f"train.report_to: there is no tracker '{name}'; {nearest(name, TRACKERS)}")
        if not getattr(integration_utils, f"is_{MODULES.get(name, name)}_available")():
            raise UserError(f"train.report_to: {name} is not installed; pip install {name.replace('_ml', '-ml')}")


def outlive_trackers(callbacks: Sequence[Any]) -> None:
    """Make each tracker that fails while a run goes on say so once, in a warning, instead of ending the run.

    Errors at the beginning, such as a missing login, stay errors.
    """
    for callback in callbacks:
        if isinstance(callback, tuple(TRACKERS.values())):
            for event in EVENTS:
                setattr(callback, event, _reported(getattr(callback, event), type(callback).__name__))


def _reported(call: Callable[..., Any], tracker: str) -> Callable[..., Any]:
    said = False

    def reported(*args: Any, **kwargs: Any) -> Any:
        nonlocal said
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if not said:
                logger.warning("%s failed (%s: %s); training goes on", tracker, type(error).__name__, error)
            said = True

    return reported


def into_run_folder(callbacks: Sequence[Any], folder: Path) -> None:
    """TensorBoard's files beside what else a run leaves; TENSORBOARD_LOGGING_DIR says otherwise."""
    for callback in callbacks:
        if isinstance(callback, TRACKERS["tensorboard"]) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


class Progress(ProgressCallback):
    """The bar with the stage, its steps a second and the time that is left, and above it a line for each log; all that
    is logged is in `metrics.jsonl`."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.stage)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if self.training_bar is not None and (line := in_a_line(logs or {})):
            self.training_bar.write(f"step {state.global_step}: {line}")


def in_a_line(logs: Mapping[str, float]) -> str:
    """What most look at: losses and scores, the size of the gradient, and the speed."""
    held_out = [name for name in logs if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))]
    shown = [name for name in ("loss", *held_out, "grad_norm") if name in logs]
    words = [f"{name} {logs[name]:.4g}" for name in shown]
    if "loss" in logs and "answers_per_second" in logs:
        words.append(f"{logs['answers_per_second']:.4g} answers/s")
    return ", ".join(words)
