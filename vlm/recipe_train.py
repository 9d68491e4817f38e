"""The `train:` section of a recipe: the fields of transformers.TrainingArguments, less the ones we set ourselves."""

import enum
import functools
import math
import types
import typing
from typing import Any

from vlm.errors import nearest, shown
from vlm.recipe_train_effects import without_effect

_PUSH = "not set in a recipe; when the run is done: vlm push RUN user/name"
_BATCHES = "set by vlm, which builds the batches itself"
_METRICS = "set by vlm; what is measured is set in the `evaluation:` section"
_PRECISION = "has no effect: evaluations during training are in the number format of training (`bf16`, `fp16`)"

REFUSED: dict[str, str] = {
    "output_dir": "set `output_dir` at the top of the recipe",
    "seed": "set `seed` at the top of the recipe",
    "data_seed": "follows `seed` at the top of the recipe",
    "resume_from_checkpoint": "resume with `vlm train RECIPE --resume`",
    "do_train": "not needed: `vlm train` trains and then evaluates",
    "do_eval": "not needed: `vlm train` trains and then evaluates",
    "do_predict": "not needed; use `vlm predict`",
    "local_rank": "set by `accelerate launch` and torchrun",
    "parallelism_config": "set in the file given to `accelerate launch --config_file`",
    "remove_unused_columns": _BATCHES,
    "label_names": _BATCHES,
    "length_column_name": _BATCHES,
    "train_sampling_strategy": _BATCHES,
    "dataloader_persistent_workers": "kept off: with dropout a resumed run would differ",
    "average_tokens_across_devices": "kept on: without it the loss depends on the number of devices",
    "logging_nan_inf_filter": "kept off: it hides bad steps; vlm skips them (gradients not finite) and says so",
    "label_smoothing_factor": "not supported: the loss is summed over the supervised tokens by vlm itself",
    "enable_jit_checkpoint": "not needed: on SIGTERM and Ctrl-C vlm ends the step, saves, and says how to resume",
    "prediction_loss_only": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "bf16_full_eval": _PRECISION,
    "fp16_full_eval": _PRECISION,
    "push_to_hub": _PUSH,
    "hub_model_id": _PUSH,
    "hub_strategy": _PUSH,
    "hub_private_repo": _PUSH,
    "hub_always_push": _PUSH,
    "hub_revision": _PUSH,
    "hub_token": "never write a token into a recipe; log in with `hf auth login`",
}
"""Fields of TrainingArguments that a recipe may not set, each with what to do instead."""

STOPPING: dict[str, Any] = {"early_stopping_patience": int, "early_stopping_threshold": float}
"""Arguments of transformers.EarlyStoppingCallback, which stand in the `train:` section too."""

LIMITS: dict[str, str] = {
    "per_device_train_batch_size": "[1, 1000000]",
    "per_device_eval_batch_size": "[1, 1000000]",
    "gradient_accumulation_steps": "[1, 1000000]",
    "eval_accumulation_steps": "[1, 1000000]",
    "num_train_epochs": "(0, 1000000]",
    "warmup_steps": "[0, 1000000000]",
    "weight_decay": "[0, 1000]",
    "adam_beta1": "[0, 1)",
    "adam_beta2": "[0, 1)",
    "adam_epsilon": "(0, 1]",
    "max_grad_norm": "[0, 1e30]",
    "neftune_noise_alpha": "[0, 1000000]",
    "torch_empty_cache_steps": "[1, 1000000000]",
    "logging_steps": "(0, 1000000000]",
    "eval_steps": "(0, 1000000000]",
    "save_steps": "(0, 1000000000]",
    "eval_delay": "[0, 1000000000]",
    "save_total_limit": "[1, 1000000]",
    "dataloader_num_workers": "[0, 1024]",
    "dataloader_prefetch_factor": "[1, 1024]",
    "ddp_bucket_cap_mb": "[1, 1000000]",
    "ddp_timeout": "[1, 1000000000]",
    "early_stopping_patience": "[1, 1000000]",
    "early_stopping_threshold": "[0, 1e30]",
}
"""Numbers that a field may have: from and to, exclusive where the bracket is round. Beyond them the Trainer fails after
the models are loaded, or trains nothing."""

CHOICES: dict[str, tuple[str, ...]] = {
    "log_level": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
    "ddp_backend": ("nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", "xccl", "ucc"),
}
"""Values of fields of text, which the Trainer looks up after the models are loaded."""

_IN_STEPS = ("logging_steps", "eval_steps", "save_steps", "warmup_steps")

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a section",
    type(None): "null",
}


@functools.cache
def training_fields() -> dict[str, Any]:
    """Return the fields a recipe may set, name to type. Imports transformers, hence torch: a second or so."""
    from transformers import TrainingArguments

    return {name: hint for name, hint in typing.get_type_hints(TrainingArguments).items() if _settable(name)} | STOPPING


def _settable(name: str) -> bool:
    from transformers import TrainingArguments

    return name in TrainingArguments.__dataclass_fields__ and name not in REFUSED


def default_learning_rate() -> float:
    """Return the rate TrainingArguments uses when none is given."""
    from transformers import TrainingArguments

    return float(TrainingArguments.learning_rate)


def check(train: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (key, what is wrong) for every bad key or value of a `train:` section."""
    known = training_fields() if train else {}
    problems = []
    for key, value in train.items():
        if key in REFUSED:
            problems.append((key, REFUSED[key]))
        elif key not in known:
            problems.append((key, f"no such field of TrainingArguments; {_suggest(key, known)}"))
        elif why := _wrong(value, known[key]) or _out_of_range(key, value):
            problems.append((key, why))
    return problems or list(without_effect(train))


def _out_of_range(key: str, value: Any) -> str:
    """Say why a value of the right type is one that no run can have, or return an empty string."""
    if key in CHOICES and isinstance(value, str) and value not in CHOICES[key]:
        return f"{shown(value)} is not one of its values; {nearest(value, CHOICES[key])}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not math.isfinite(value):
        return f"must be a finite number, not {value}"
    if key == "max_steps" and value != -1 and not 1 <= value < 2**31:
        return f"must be at least 1, or -1 to train for num_train_epochs, not {shown(value)}"
    if key in _IN_STEPS and value > 1 and value != int(value):
        return f"must be a whole number of steps, or a share of all below 1, not {shown(value)}"
    if limit := LIMITS.get(key):
        least, most = (float(number) for number in limit[1:-1].split(","))
        if value < least or (value == least and limit[0] == "("):
            return f"must be {'more than' if limit[0] == '(' else 'at least'} {least:.10g}, not {shown(value)}"
        if value > most or (value == most and limit[-1] == ")"):
            return f"must be {'less than' if limit[-1] == ')' else 'at most'} {most:.10g}, not {shown(value)}"
    return ""


def _suggest(key: str, known: dict[str, Any]) -> str:
    # The list of all the fields is too long to read, so nothing is listed when no name is near.
    close = nearest(key, known)
    return close if close.startswith("did") else "the documentation of transformers lists them"


def _wrong(value: Any, hint: Any) -> str:
    """Say why `value` is not of the type `hint`, or return an empty string."""
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    kinds = [typing.get_origin(option) or option for option in options]
    choices = [
        member.value for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum) for member in kind
    ]
    if isinstance(value, str) and choices:
        return "" if value in choices else f"'{value}' is not one of its values; {nearest(value, choices)}"
    if isinstance(value, list) and list in kinds and not all(isinstance(item, str) for item in value):
        return f"must be a list of names, not {shown(value)}"
    if any(kind is Any or _is(value, kind) for kind in kinds):
        return ""
    names = [_NAMES[kind] for kind in kinds if kind in _NAMES and not (kind is str and choices)]
    return f"must be {' or '.join(names or ['one of ' + ', '.join(map(str, choices))])}, not {shown(value)}"


def _is(value: Any, kind: Any) -> bool:
    if kind is typing.Literal:
        return value is False  # the only literal in TrainingArguments (trackio_static_space_id)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)
