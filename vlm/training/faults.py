"""What ends a stage, in words that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlm.data.images import ImageError
from vlm.errors import UserError
from vlm.training.ending import how_to_go_on
from vlm.training.finite import NonFiniteWeights
from vlm.training.part_trainer import NonFiniteGradients


class TrainingError(UserError):
    """A stage ended before its time, and not by a mistake in the code."""


def in_words(error: Exception, trainer: Any, checkpoints: Path) -> Exception:
    """`error`, which ended the training by `trainer`, as a TrainingError where it is known what to do; others as they
    are, with a note on where to go on from."""
    step = trainer.state.global_step + 1
    go_on = how_to_go_on(trainer, checkpoints)
    if memory := _exhausted(error, trainer.args.device):
        args = trainer.args
        if trainer.control.should_evaluate:
            return TrainingError(
                f"the evaluation after step {trainer.state.global_step} does not fit into the memory of {memory}: "
                f"lower train.per_device_eval_batch_size, which is {args.per_device_eval_batch_size}. {go_on}"
            )
        rows, tokens = [*trainer.batch_shape[:2], 0, 0][:2]
        return TrainingError(
            f"step {step} does not fit into the memory of {memory}: a batch of {rows} rows (train."
            f"per_device_train_batch_size is {args.per_device_train_batch_size}) of {tokens:,} tokens, as many as the "
            f"longest has. {trainer.less_memory}. {go_on}"
        )
    if "DataLoader worker (pid" in str(error):
        return TrainingError(
            f"a process that reads data was killed before step {step}: {str(error).strip(' .')}. Mostly memory has run "
            f"out, or /dev/shm; lower train.dataloader_num_workers, which is {trainer.args.dataloader_num_workers}. "
            f"{go_on}"
        )
    if image := _image_error(error):
        return TrainingError(f"step {step}: {image}. It opened as the run began. {go_on}")
    if isinstance(error, NonFiniteGradients | NonFiniteWeights):
        return TrainingError(f"{error} {go_on}")
    error.add_note(f"{go_on} The run is in {checkpoints.parent.parent}.")
    return error


def _image_error(error: Exception) -> str | None:
    if isinstance(error, ImageError):
        return str(error)
    # torch makes a RuntimeError of what a process that reads data has raised, with the traceback in its text.
    return str(error).strip().rpartition("ImageError: ")[2] if str(error).startswith("Caught ImageError") else None


def _exhausted(error: Exception, device: torch.device) -> torch.device | None:
    """Return the device whose memory `error` says is exhausted: that of training, or the host."""
    if isinstance(error, torch.OutOfMemoryError):
        return device
    on_host = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return torch.device("cpu") if on_host or isinstance(error, MemoryError) else None
