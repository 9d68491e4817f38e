"""The `train` section of a stage as transformers.TrainingArguments, tried before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.utils import is_liger_kernel_available

from vlm.errors import UserError, shown
from vlm.precision import default_device, fast_bfloat16
from vlm.recipe import Recipe, Stage
from vlm.recipe_train import STOPPING

_Made = TypeVar("_Made")
_TRIED_STEPS = 1_000_000
"""Steps of the schedule that is tried; how many there will be is known when the data is read."""


def training_arguments(recipe: Recipe, stage: Stage, folder: Path) -> TrainingArguments:
    """Return the arguments of a stage: its `train` section, and what vlm sets itself; precision by the device unless
    the recipe says it.

    Raises UserError, with the key and its value, for what TrainingArguments refuses.
    """
    return _attempt(recipe, stage, lambda train: _arguments(recipe, stage, train, folder))


def require_arguments(recipe: Recipe) -> None:
    """Build the arguments, the optimizer and the schedule of every stage, of a model with one weight.

    Raises UserError, with the key and its value, for what transformers, torch or an optimizer refuses, what needs a
    package that is not installed, and what this device cannot do.
    """
    for stage in recipe.stages:
        _require_stage(recipe, stage)


def _require_stage(recipe: Recipe, stage: Stage) -> None:
    folder = Path(recipe.output_dir) / "checkpoints" / stage.name
    _attempt(recipe, stage, lambda train: _try(_arguments(recipe, stage, train, folder)))


def _arguments(recipe: Recipe, stage: Stage, train: Mapping[str, Any], folder: Path) -> TrainingArguments:
    chosen = {
        "use_cpu": default_device() == "cpu",
        "report_to": "none",
        "run_name": f"{recipe.name}-{stage.name}",
        **train,
    }
    if not {"bf16", "fp16"} & set(chosen):
        chosen["bf16"] = fast_bfloat16("cpu" if chosen["use_cpu"] else default_device())
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):  # as they were called before 5.24
        if old in chosen:
            chosen[old.replace("gradient", "activation")] = chosen.pop(old)
    if chosen.get("activation_checkpointing") and not _is_reentrant(chosen):
        # As without it. transformers turns this off, since the other kind of checkpointing needs that.
        chosen.setdefault("ddp_find_unused_parameters", True)
    chosen = {key: value for key, value in chosen.items() if key not in STOPPING}
    if "early_stopping_patience" in train:
        chosen.setdefault("metric_for_best_model", "loss")
    args = TrainingArguments(
        output_dir=str(folder),
        seed=recipe.seed,
        data_seed=recipe.seed,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        **chosen,
    )
    # One process would use all visible GPUs by DataParallel, which divides the tensors of a batch by their first
    # dimension. That of a tree layout is not the number of rows.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _is_reentrant(train: Mapping[str, Any]) -> bool:
    options = train.get("activation_checkpointing_kwargs")
    return isinstance(options, Mapping) and bool(options.get("use_reentrant"))


def _attempt(recipe: Recipe, stage: Stage, make: Callable[[Mapping[str, Any]], _Made]) -> _Made:
    """Return `make` of the `train` section. Raises UserError with the key without which it would have succeeded."""
    try:
        return make(stage.train)
    except Exception as error:
        where = "train" if len(recipe.stages) == 1 else f"stages.{recipe.stages.index(stage)}.train"
        why = str(error).strip() or type(error).__name__
        for key, value in stage.train.items():
            try:
                make({name: other for name, other in stage.train.items() if name != key})
            except Exception:
                continue
            raise UserError(f"{where}.{key}: {shown(value)} cannot be used: {why}") from error
        raise UserError(f"{where}: {why}") from error


def _try(args: Any) -> None:
    """Raise what training with `args` would raise when the models are loaded."""
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("float16 is for GPUs; without fp16 and bf16 a format is chosen that the CPU is fast in")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("pip install liger-kernel")
    if args.torch_compile:
        torch.compile(nn.Identity(), backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    if options := args.activation_checkpointing_kwargs:
        checkpoint(torch.neg, torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **options})
    for key, value in vars(args.accelerator_config).items():
        if value not in (None, True, False) and not isinstance(value, dict):
            raise ValueError(f"{key} must be true or false, not {shown(value)}")
    model = nn.Linear(1, 1)
    optimizer_class, options = _optimizer(args, model)
    if optimizer_class is None:
        return
    group = {"params": list(model.parameters()), "lr": args.learning_rate, "weight_decay": args.weight_decay}
    schedule: Any = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer_class([group], **options),
        num_warmup_steps=(warmup := args.get_warmup_steps(_TRIED_STEPS)),
        num_training_steps=_TRIED_STEPS,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    if isinstance(schedule, LambdaLR):
        for step in (0, warmup, _TRIED_STEPS // 2, _TRIED_STEPS):
            float(schedule.lr_lambdas[0](step))


def _optimizer(args: TrainingArguments, model: nn.Module) -> tuple[Any, dict[str, Any]]:
    """The optimizer's class and options; None where it asks for modules by name, which only the real model has."""
    try:
        return Trainer.get_optimizer_cls_and_kwargs(args, model)  # type: ignore[arg-type]  # any module does
    except ImportError:
        raise
    except Exception:
        if args.optim_target_modules is None:
            raise
        return None, {}
