"""How a stage ends: whether there is anything to train, whether anything was, and where a run goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import has_length

from vlm.data.dataset import TreeDataset
from vlm.data.pairs import PairDataset
from vlm.errors import UserError
from vlm.training.checkpoints import newest
from vlm.training.part_trainer import NonFiniteGradients, PartTrainer, precision_of
from vlm.training.processes import sharded
from vlm.training.step import untouched

TRIED = 5
"""Batches that are tried at the end of a run whose last steps were skipped."""


def steps_to_train(trainer: PartTrainer) -> int:
    """Return how many optimizer steps a whole run takes. Raises UserError if there are none, with the key to change."""
    args, loader = trainer.args, trainer.get_train_dataloader()
    why = ""
    if args.max_steps == 0:
        why = "train.max_steps is 0"
    elif args.max_steps < 0 and args.num_train_epochs <= 0:
        why = f"train.num_train_epochs is {args.num_train_epochs:g}"
    elif has_length(loader) and not len(loader):
        dataset: Any = trainer.train_dataset
        rows, batch = len(dataset), trainer._train_batch_size * args.world_size
        why = (
            f"train.dataloader_drop_last leaves out the only batch, which is not full: it has {rows:,} of {batch:,} "
            "rows. Lower train.per_device_train_batch_size, or remove dataloader_drop_last"
        )
    if why:
        raise UserError(f"no step would be trained: {why}")
    return int(trainer.set_initial_training_values(args, loader)[-1])


def require_trained(trainer: PartTrainer, rows: TreeDataset | PairDataset, *, resumed: bool) -> None:
    """Raise NonFiniteGradients unless steps were trained, and give weights that have a finite loss on some of `rows`:
    where the last steps were skipped, nothing else shows it."""
    step = trainer.state.global_step
    if not step:
        raise UserError("no step was trained: the data gave no batch")
    if not trainer.bad_in_a_row:
        return
    if not resumed and not trainer.good_steps:
        raise NonFiniteGradients(
            f"nothing was trained: the gradients of all {step} steps are not finite; {trainer.skipped.path} names "
            "their examples. Look at those, or train in float32 (train.bf16: false)."
        )
    if not has_finite_loss(trainer, rows):
        trainer.mark_diverged(step - trainer.bad_in_a_row)
        raise NonFiniteGradients(
            f"the training has diverged: the gradients of the last {trainer.bad_in_a_row} steps are not finite, and no "
            "loss is with the weights before them, so that no model is saved. Lower the learning rates."
        )


@torch.no_grad()
def has_finite_loss(trainer: PartTrainer, rows: TreeDataset | PairDataset) -> bool:
    """Return whether the loss of one of a few batches, spread over `rows`, is finite. Not tried for a model of which
    each process holds a part."""
    if sharded(trainer.args):
        return True
    size = trainer._train_batch_size
    starts = {n * max(len(rows) - size, 0) // (TRIED - 1) for n in range(TRIED)}
    with untouched(trainer):
        for start in sorted(starts):
            of_batch: Any = [rows[row] for row in range(start, min(start + size, len(rows)))]
            batch: Any = trainer.data_collator(of_batch)
            with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                loss: Any = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))  # type: ignore[arg-type]
            if bool(torch.isfinite(loss)):
                return True
    return False


def how_to_go_on(trainer: PartTrainer, checkpoints: Path) -> str:
    """Return a sentence that names the checkpoint to go on from, or says that there is none."""
    try:
        found = newest(checkpoints, lambda line: None, precision=precision_of(trainer.args), contents=False)
    except UserError:
        return (
            f"No checkpoint is of use: begin anew with --overwrite, or remove {checkpoints} and begin this stage anew "
            "with --resume."
        )
    return f"Then go on with --resume, {f'from {found}' if found else 'from the start: there is no checkpoint yet'}."
