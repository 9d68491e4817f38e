"""transformers' Trainer with a learning rate for each part of the model, and its traps closed."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from vlm.disk_faults import DiskError, is_disk_fault, reason
from vlm.errors import UserError
from vlm.files import sync
from vlm.precision import frozen_layers_in
from vlm.training.callbacks import EvaluationStopped
from vlm.training.checkpoints import mark_diverged, read_manifest, remove_older, seal, why_broken
from vlm.training.finite import NonFiniteWeights, not_finite, some
from vlm.training.norms import gradient_norms, parameter_norms
from vlm.training.parts import loose_parameters, named_parts
from vlm.training.processes import GlobalBatch, of_first, sharded
from vlm.training.skipped import SkippedSteps
from vlm.training.step import keep_gradients_out
from vlm.training.throughput import Throughput
from vlm.training.weights import LOOSE, load_checkpoint

logger = logging.getLogger(__name__)

SAVING = ".saving"
"""The folder in which a checkpoint is written until it is whole."""


class NonFiniteGradients(RuntimeError):  # noqa: N818 - named for what happened
    """Too many steps in a row had gradients that are not finite."""


def precision_of(args: TrainingArguments) -> str:
    """Return what training computes in, by torch's name."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


class LeftEvaluation(TrainerCallback):
    """Makes up for the evaluation that a run was stopped in, before the first step after its checkpoint. The random
    numbers of those steps are read from the checkpoint afterwards."""

    def __init__(self, trainer: PartTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.best_model_checkpoint:  # the folder may have been moved
            state.best_model_checkpoint = os.path.join(args.output_dir, Path(state.best_model_checkpoint).name)
        stopped = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        if state.global_step and stopped.get("should_evaluate"):
            metrics = self.trainer._evaluate(None, None, skip_scheduler=False)
            if self.trainer._determine_best_metric(metrics=metrics, trial=None):
                state.best_model_checkpoint = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")


class PartTrainer(Trainer):
    """Trains the parts in `rates` (part to learning rate), each at its own.

    Steps whose gradients are not finite are noted in `skipped`, and `data_fingerprint` in each checkpoint. Batches come
    with their `examples`, by file and row, and with `counts`, `[B, 3]`: images, texts and tokens.

    Raises NonFiniteGradients after `max_bad_steps` such steps in a row; each is skipped. Raises NonFiniteWeights if a
    weight that is trained is not finite: when a step is skipped, before a checkpoint is saved, and at the end.
    """

    max_bad_steps = 5
    less_memory: str
    """What may be done about a batch that does not fit into memory."""

    def __init__(
        self,
        *,
        rates: Mapping[str, float],
        skipped: SkippedSteps | None = None,
        data_fingerprint: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.rates = dict(rates)
        self.skipped = skipped or SkippedSteps(Path(self.args.output_dir or ".") / "skipped_steps.jsonl", "train")
        self.data_fingerprint = data_fingerprint
        self.batch_shape: tuple[int, ...] = ()
        self.bad_in_a_row = 0
        self.good_steps = 0
        self._owes_checkpoint = False
        self._saving = False
        self.unsaved: str | None = None
        self.throughput = Throughput()
        self.add_callback(self.throughput)
        self._grad_norms: dict[str, float] = {}
        self.add_callback(LeftEvaluation(self))

    def token_places(self, inputs: dict[str, Any]) -> int:
        """How many tokens a batch is computed for, padding included."""
        return int(inputs["input_ids"].numel())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        examples = inputs.pop("examples")
        self.throughput.count(inputs.pop("counts"), self.token_places(inputs))
        self.batch_shape = inputs["input_ids"].shape
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.skipped.saw(loss, examples)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With how fast the steps were since the last log, or at the end all of them, and norms by part."""
        if "loss" in logs:
            logs |= self.throughput.since_last(self.accelerator) | self._grad_norms
            if self.model is not None and not sharded(self.args):
                logs |= parameter_norms(self.model)
        elif "train_loss" in logs:
            logs |= self.throughput.whole(self.accelerator)
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; frozen layers are cast to the precision of training once, not in each step."""
        with self.frozen_in_half():
            output = super().train(*args, **kwargs)
        self.require_finite_weights()
        self._say_if_the_best_is_another()
        return output

    def _say_if_the_best_is_another(self) -> None:
        best, state = Path(self.state.best_model_checkpoint or "").name, self.state
        if not self.args.load_best_model_at_end or best == f"checkpoint-{state.best_global_step}":
            return
        wanted = f"The best model, of step {state.best_global_step}, has no checkpoint"
        logger.warning(
            "%s; the model is that of %s.",
            wanted if state.best_global_step else f"No {self.args.metric_for_best_model} was finite",
            best or f"step {state.global_step}, the last",
        )

    def require_finite_weights(self) -> None:
        """Raise NonFiniteWeights, on all processes, if a trained weight of any of them is not finite."""
        model: Any = self.accelerator.unwrap_model(self.model)
        if names := sorted(set(gather_object(not_finite(model, trained_only=True)))):
            raise NonFiniteWeights(
                f"the weights are not finite after step {self.state.global_step} ({some(names)}), and are not saved. "
                "Lower the learning rates."
            )

    def frozen_in_half(self) -> AbstractContextManager[None]:
        """Within it frozen layers are in the precision of training; where the model is sharded, all parameters have to
        be of one kind."""
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        model: Any = self.model
        return nullcontext() if half is None or sharded(self.args) else frozen_layers_in(half, model)

    def _logs_next(self) -> bool:
        """Whether the step that is being taken may be logged; epochs end where they end."""
        step, every = self.state.global_step + 1, self.state.logging_steps
        return self.args.logging_strategy != "steps" or step == 1 or step % max(int(every), 1) == 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As in Trainer, with a parameter group for each part and for decayed and undecayed weights."""
        if self.optimizer is None:
            model = model or self.model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
            for part, name, parameter in named_parts(model):
                if parameter.requires_grad:
                    groups.setdefault((part, name in decayed), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.rates[part],
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                        "part": part,
                    }
                    for (part, decay), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def why_no_gradient(self) -> str:
        """Why the first steps had no gradient, if that is known; else an empty text."""
        return ""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """A step whose gradients are not finite changes nothing. Trainer would apply it, and log a loss of 0.0."""
        norm = super()._get_grad_norm(model, grad_norm)
        # DeepSpeed has none before its first step.
        finite = norm is None or bool(torch.isfinite(torch.as_tensor(norm)))
        if not finite and self._loss_scale_too_large():
            self.skipped.step_ends(self.state.global_step + 1, skipped=False)
            return norm
        self.skipped.step_ends(self.state.global_step + 1, skipped=not finite)
        if finite:
            self.bad_in_a_row = 0
            self.good_steps += 1
            if norm is not None and not sharded(self.args) and self._logs_next():
                self._grad_norms = gradient_norms(model, float(norm))
            return norm
        self.bad_in_a_row += 1
        model.zero_grad()
        if self.bad_in_a_row == 1:  # the reason may be those
            self.require_finite_weights()
        if self.bad_in_a_row >= self.max_bad_steps:
            self.mark_diverged(self.state.global_step + 1 - self.bad_in_a_row)
            raise NonFiniteGradients(
                f"the gradients of {self.bad_in_a_row} steps in a row up to step {self.state.global_step + 1} are not "
                f"finite; {self.skipped.path} names their examples. Look at those, lower the learning rates, or train "
                "in float32 (train.bf16: false)."
            )
        return norm

    def _loss_scale_too_large(self) -> bool:
        """Whether gradients that are not finite may be so for fp16's loss scale alone. Its scaler starts high, takes no
        step that overflows, and halves the scale for the next one."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def mark_diverged(self, step: int) -> None:
        """Have no run resumed from checkpoints of the weights after `step`: steps that are skipped do not change them,
        so that it would fail again, whatever the learning rates."""
        if self.is_world_process_zero():
            mark_diverged(Path(self.args.output_dir or "."), step, precision_of(self.args))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, and with activation checkpointing no gradient goes through a frozen encoder."""
        if self.args.activation_checkpointing:
            keep_gradients_out(self)
        return super()._prepare_for_training(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, which takes one step too many if it resumes after the last one in the middle of an epoch."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            if self.is_world_process_zero():  # it may have been killed as it removed the last ones
                self._remove_older(Path(self.args.output_dir or "."))
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """As in Trainer, with two differences. Among steps that are skipped no checkpoint is saved, but after the next
        good one: a run that ends for them goes on from before. And one that is told to stop during the evaluation saves
        what it had before that, and leaves."""
        if not self.control.should_training_stop:
            self._owes_checkpoint |= self.control.should_save
            self.control.should_save = self._owes_checkpoint and not self.bad_in_a_row
            self._owes_checkpoint &= not self.control.should_save
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except EvaluationStopped:
            self._save_checkpoint(model, trial)  # which says that an evaluation was due
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.control.should_evaluate, self.control.should_training_stop = False, True

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, SAVING) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Written in a folder beside and renamed when whole, so that what is called a checkpoint is one. Trainer writes
        it in place, and a run that was killed meanwhile goes on from half a checkpoint.

        What cannot be written is said, and training goes on: `unsaved` tells why until a later checkpoint is whole.
        """
        self.require_finite_weights()
        folder = Path(self._get_output_dir(trial))
        fault: Exception | None = None
        try:
            self._write_checkpoint(model, trial, folder / SAVING)
        except Exception as error:
            if not is_disk_fault(error):
                raise
            fault = error
        faults: list[str] = gather_object([reason(fault)] if fault else [])  # of all processes, which wait here
        if not faults and self.is_world_process_zero():
            try:
                self._name_checkpoint(folder)
            except (OSError, DiskError) as error:
                fault, faults = error, [reason(error)]
        faults = broadcast_object_list([faults])[0]
        self.unsaved = faults[0] if faults else None
        if self.unsaved:
            if self.is_world_process_zero():
                shutil.rmtree(folder / SAVING, ignore_errors=True)
            logger.warning(
                "The checkpoint of step %d could not be saved in %s: %s. Training goes on, and the next one is tried; "
                "make room for it.", self.state.global_step, folder, self.unsaved,
            )  # fmt: skip

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the weights under the names that the model has in memory. Trainer saves those that it has on the Hub,
        and does not find them again (transformers#43701). With LoRA, also save what peft leaves out."""
        folder = output_dir or str(self.args.output_dir)
        model: Any = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel):
            if self.args.should_save:
                model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
            return
        super()._save(folder, state_dict)
        whole = self.args.should_save and isinstance(model, PeftModel) and not sharded(self.args)
        if whole and (loose := loose_parameters(model)):
            kept = {name: parameter.detach().cpu().contiguous() for name, parameter in loose.items()}
            save_file(kept, os.path.join(folder, LOOSE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load all weights, or raise WrongWeights. Trainer goes on without those that it does not find."""
        if sharded(self.args):  # by torch, which is as strict
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_checkpoint(model or self.model, Path(resume_from_checkpoint))
            if names := not_finite(self.accelerator.unwrap_model(model or self.model)):
                self.mark_diverged(read_manifest(Path(resume_from_checkpoint))["step"])
                raise NonFiniteWeights(f"{resume_from_checkpoint} has weights that are not finite: {some(names)}.")

    def _load_best_model(self) -> None:
        """As in Trainer, but all weights, also those that peft leaves out; raises WrongWeights, and UserError if files
        have changed."""
        best = Path(self.state.best_model_checkpoint or "")
        if why := of_first(lambda: why_broken(best)):
            raise UserError(
                f"the best checkpoint, {best}, is broken: {why}. Put back a copy and go on with --resume, which takes "
                "no further step; with train.load_best_model_at_end: false it saves the last model"
            )
        if sharded(self.args):
            super()._load_best_model()
        else:
            load_checkpoint(self.model, best)

    def _write_checkpoint(self, model: nn.Module, trial: Any, beside: Path) -> None:
        if self.is_world_process_zero():
            shutil.rmtree(beside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # Trainer would look for the best one's folder between barriers, which a process that cannot write never meets.
        best, self.state.best_global_step = self.state.best_global_step, None
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
            self.state.best_global_step = best

    def _name_checkpoint(self, folder: Path) -> None:
        """Give what was written its name, and remove the oldest beyond `save_total_limit`: only now."""
        name, beside = f"checkpoint-{self.state.global_step}", folder / SAVING
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder / name)
        self.state.save_to_json(str(beside / name / TRAINER_STATE_NAME))
        batch = vars(GlobalBatch.of(self))
        about = {"step": self.state.global_step, "batch": batch, "data": self.data_fingerprint}
        if self.bad_in_a_row:
            about["skipped_before"] = self.bad_in_a_row
        seal(beside / name, about)
        if (folder / name).exists():  # of an earlier try, from before the run was resumed
            (folder / name).rename(beside / "replaced")
        (beside / name).rename(folder / name)
        sync(folder)
        shutil.rmtree(beside)
        self._remove_older(folder)

    def _remove_older(self, folder: Path) -> None:
        remove_older(folder, self.state.global_step, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in Trainer, but at the rates of the recipe, which may be others now. Trainer takes the old ones."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.bad_in_a_row = read_manifest(Path(checkpoint)).get("skipped_before", 0)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        for index, group in enumerate(optimizer.param_groups):
            rate, before = self.rates.get(group.get("part", "")), group.get("initial_lr")
            if rate and before and rate != before:
                group["initial_lr"], group["lr"] = rate, group["lr"] * rate / before
                scheduler.base_lrs[index], scheduler._last_lr[index] = rate, group["lr"]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As in Trainer, which says nothing where there is no such state, and goes on otherwise than it would have.

        The states of another number of processes are of no use: numbers are drawn anew, others on each process.
        """
        world, rank = self.args.world_size, self.args.process_index
        before = None if checkpoint is None else GlobalBatch.in_checkpoint(Path(checkpoint))
        if before is not None and before.processes != world:
            step = self.state.global_step
            set_seed(random.Random(f"{self.args.seed}, {step}, {rank} of {world}").randrange(2**32))
            return
        name = f"rng_state_{rank}.pth" if world > 1 else "rng_state.pth"
        if checkpoint is not None and not os.path.isfile(os.path.join(checkpoint, name)):
            raise UserError(
                f"{checkpoint} holds no {name}: it was saved with save_only_model, or is not whole. Begin anew with "
                "--overwrite."
            )
        super()._load_rng_state(checkpoint)
