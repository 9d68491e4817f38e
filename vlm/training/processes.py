"""The processes of a run: joining those that were started together, what each holds of the model, what of a batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer, TrainingArguments

from vlm.errors import UserError
from vlm.precision import default_device
from vlm.recipe import Recipe
from vlm.training.checkpoints import read_manifest

T = TypeVar("T")


def join_processes(recipe: Recipe) -> PartialState:
    """The processes that `accelerate launch` or torchrun started, or this one alone.

    Whoever waits for another for more than `train.ddp_timeout` seconds fails. transformers drops that number on a CPU,
    and anywhere if the processes have met before it makes its arguments, so it is given here.
    Raises UserError if the model is to be sharded on a CPU, where accelerate would train with DDP and not say so.
    """
    stages = [stage.train for stage in recipe.stages]
    cpu = any(train.get("use_cpu", default_device() == "cpu") for train in stages)
    asked_for = [*_launched_with(), *(key for key in ("fsdp", "deepspeed") for train in stages if train.get(key))]
    if cpu and asked_for:
        raise UserError(
            f"{asked_for[0]} shards the model over GPUs, and this run is on the CPU, where every process holds all of "
            "it. Start it with torchrun, or with the configuration that `vlm recipes show accelerate/ddp` prints."
        )
    seconds = max(train.get("ddp_timeout", TrainingArguments.ddp_timeout) for train in stages)
    return PartialState(cpu=cpu, timeout=timedelta(seconds=seconds))


def idle_gpus(processes: PartialState) -> str | None:
    """Return how to train on all GPUs, if there are several and one process was started; None otherwise."""
    count = torch.cuda.device_count() if processes.device.type == "cuda" else 0
    if processes.num_processes > 1 or count < 2:
        return None
    return (
        f"this run uses 1 of {count} GPUs. To train on all: accelerate launch --num_processes {count} -m vlm train ... "
        "(docs/scaling.md)"
    )


def of_first(make: Callable[[], T]) -> T:
    """Return on all processes what `make` gives on the first, or raise the UserError that it raises there."""
    found: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = make()
        except UserError as error:
            found[1] = error
    result, fault = broadcast_object_list(found)
    if fault:
        raise fault
    return cast(T, result)


def sharded(args: TrainingArguments) -> bool:
    """Whether a process holds a part of the model only: FSDP and DeepSpeed."""
    return bool(_launched_with() or args.fsdp_plugin_args or args.deepspeed)


def _launched_with() -> list[str]:
    """What the file given to `accelerate launch` shards with."""
    kinds = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
    return [name for key, name in kinds.items() if os.environ.get(key, "").lower() == "true"]


def units(model: nn.Module) -> list[str]:
    """The classes of the modules that are sharded one by one: those that must not be split, as far as they are there.

    transformers names them for whole families, and accelerate fails at the first that a model does not have.
    """
    named = set(getattr(model, "_no_split_modules", None) or ())
    return sorted(named & {type(module).__name__ for module in model.modules()})


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of an optimizer step, and how they are divided."""

    processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int

    @classmethod
    def of(cls, trainer: Trainer) -> GlobalBatch:
        return cls(trainer.args.world_size, trainer._train_batch_size, trainer.args.gradient_accumulation_steps)

    @classmethod
    def in_checkpoint(cls, checkpoint: Path) -> GlobalBatch:
        """That which `checkpoint` was saved with."""
        return cls(**read_manifest(checkpoint)["batch"])

    @property
    def rows(self) -> int:
        return self.processes * self.per_device_train_batch_size * self.gradient_accumulation_steps

    def __str__(self) -> str:
        processes = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        each = f"{self.per_device_train_batch_size} x {self.gradient_accumulation_steps} accumulated"
        return f"{self.rows} rows ({processes} x {each})"


def what_differs(checkpoint: Path, now: GlobalBatch) -> str | None:
    """What a run does otherwise that goes on from `checkpoint` on another number of processes; None on the same.

    Raises UserError if a step would have another number of rows: the place in the data is counted in steps.
    """
    before = GlobalBatch.in_checkpoint(checkpoint)
    if before.rows != now.rows:
        raise UserError(
            f"a step had {before} when {checkpoint} was saved, and would have {now}. Set "
            "train.per_device_train_batch_size and train.gradient_accumulation_steps so that it has "
            f"{before.rows} again, or begin anew with --overwrite."
        )
    if before.processes == now.processes:
        return None
    return (
        f"the checkpoint was saved on {before.processes} processes, and this run has {now.processes}: weights, "
        "optimizer, schedule and place in the data go on from it; dropout and other random numbers are drawn anew"
    )
