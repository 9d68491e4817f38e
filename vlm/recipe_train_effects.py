"""Fields of the `train` section that transformers ignores, or refuses, unless another says something.

A strategy that is written out as `no` is a switch: what says how often or by what may stay for when it is on.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Found = Iterator[tuple[str, str]]
"""Keys, and why each has no effect or cannot be."""

OF_EVALUATIONS = (
    "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "per_device_eval_batch_size",
    "metric_for_best_model", "greater_is_better",
)  # fmt: skip
OF_TRACKERS = {
    "run_name": None, "project": "huggingface",
    "trackio_space_id": None, "trackio_bucket_id": None, "trackio_static_space_id": None,
}  # fmt: skip
"""And what they are when nothing is said."""

NEEDS: dict[str, tuple[str, ...]] = {
    "dataloader_prefetch_factor": ("dataloader_num_workers",),
    "dataloader_multiprocessing_context": ("dataloader_num_workers",),
    "activation_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
    "gradient_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
    "liger_kernel_config": ("use_liger_kernel",),
    "fsdp_config": ("fsdp",),
    "early_stopping_threshold": ("early_stopping_patience",),
}
"""Fields that are read only if one of others is on."""

IN_STEPS = {"eval_steps": "eval_strategy", "save_steps": "save_strategy", "logging_steps": "logging_strategy"}
FOLLOW_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
WITHOUT_WARMUP = ("constant", *FOLLOW_EVALUATIONS)
WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
"""Schedules that read no `lr_scheduler_kwargs`."""

NOT_ADAM = ("sgd", "adagrad", "rmsprop", "adafactor", "lomo", "adalomo")
WITHOUT_ARGS = ("adafactor", "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
"""Optimizers that read no `optim_args`."""


def without_effect(train: Mapping[str, Any]) -> Found:
    """Yield the fields of a `train` section, each of the right type, that have no effect, or that the Trainer refuses
    together with the others."""
    given = {key: value for key, value in train.items() if value is not None}
    yield from _of_evaluations(given)
    yield from _of_steps(given)
    yield from _of_best(given)
    yield from _of_schedule(given)
    yield from _of_optimizer(given)
    for key, others in NEEDS.items():
        if key in given and not any(given.get(other) for other in others):
            yield key, f"has no effect without `{others[0]}`; add that, or remove this"
    if given.get("report_to") in (None, "none", ["none"], []):
        for key in (key for key, default in OF_TRACKERS.items() if given.get(key) not in (None, default)):
            yield key, "has no effect without `report_to`: trackers alone show it; name one, or remove this"


def _of_evaluations(given: Mapping[str, Any]) -> Found:
    strategy = given.get("eval_strategy", "no")
    if "eval_strategy" not in given:
        for key in (key for key in OF_EVALUATIONS if key in given):
            why = "has no effect without `eval_strategy`: nothing is evaluated during training; "
            yield key, why + f"add `eval_strategy: {'steps' if key == 'eval_steps' else 'epoch'}`, or remove this"
    if strategy == "no" and "early_stopping_patience" in given:
        yield "early_stopping_patience", "needs `eval_strategy`: it counts evaluations without a gain"
    if strategy == "no" and given.get("lr_scheduler_type") in FOLLOW_EVALUATIONS:
        yield "lr_scheduler_type", f"{given['lr_scheduler_type']} needs `eval_strategy`: it follows what is evaluated"


def _of_steps(given: Mapping[str, Any]) -> Found:
    default = {"eval_strategy": "no"}
    for key, strategy in IN_STEPS.items():
        chosen = given.get(strategy, default.get(strategy, "steps"))
        if key not in given or chosen in ("steps", "no"):
            continue
        if key == "logging_steps" and given.get("eval_strategy") == "steps" and "eval_steps" not in given:
            continue  # evaluations follow it
        yield key, f"has no effect with `{strategy}: {chosen}`; choose `{strategy}: steps`, or remove this"


def _of_best(given: Mapping[str, Any]) -> Found:
    wants_best = bool(given.get("load_best_model_at_end"))
    follows = wants_best or "early_stopping_patience" in given or given.get("lr_scheduler_type") in FOLLOW_EVALUATIONS
    alone = "greater_is_better" in given and "metric_for_best_model" not in given
    if alone and not follows and given.get("eval_strategy"):
        yield "greater_is_better", "has no effect without `metric_for_best_model`; add that, or remove this"
    if wants_best and (why := _why_no_best(given)):
        yield "load_best_model_at_end", why


def _why_no_best(given: Mapping[str, Any]) -> str:
    """Return why the best model cannot be loaded at the end, or an empty string."""
    evaluates, saves = given.get("eval_strategy", "no"), given.get("save_strategy", "steps")
    if evaluates == "no":
        return "needs `eval_strategy`: the best model is found by evaluations"
    if saves == "best":
        return ""
    if saves != evaluates:
        return (
            f"needs a checkpoint of every model that is evaluated, and `eval_strategy` is {evaluates}, `save_strategy` "
            f"{saves}; set both to the same, or `save_strategy: best`"
        )
    if evaluates != "steps":
        return ""
    every, saved = given.get("eval_steps") or given.get("logging_steps", 500), given.get("save_steps", 500)
    if (every < 1) != (saved < 1):
        return f"needs `eval_steps` and `save_steps` both as steps, or both as a share of all, not {every} and {saved}"
    parts = 1_000_000 if every < 1 else 1
    if round(saved * parts) % round(every * parts):
        return (
            f"needs `save_steps` to be a multiple of `eval_steps`, and {saved} is not one of {every}; a checkpoint "
            "that was not evaluated cannot be the best"
        )
    return ""


def _of_schedule(given: Mapping[str, Any]) -> Found:
    kind = given.get("lr_scheduler_type", "linear")
    if given.get("warmup_steps") and kind in WITHOUT_WARMUP:
        other = "constant_with_warmup" if kind == "constant" else "another"
        yield "warmup_steps", f"has no effect with `lr_scheduler_type: {kind}`; choose {other}, or remove this"
    if given.get("lr_scheduler_kwargs") and kind in WITHOUT_OPTIONS:
        yield "lr_scheduler_kwargs", f"has no effect with `lr_scheduler_type: {kind}`, which has no options; remove it"


def _of_optimizer(given: Mapping[str, Any]) -> Found:
    kind = given.get("optim", "adamw_torch_fused")
    for key in (key for key in ("adam_beta1", "adam_beta2", "adam_epsilon") if key in given and kind in NOT_ADAM):
        yield key, f"has no effect with `optim: {kind}`; remove it"
    if given.get("optim_args") and kind in WITHOUT_ARGS:
        yield "optim_args", f"has no effect with `optim: {kind}`; remove it"
    if given.get("optim_target_modules") and not kind.startswith(("galore", "apollo")):
        yield "optim_target_modules", f"has no effect with `optim: {kind}`; it is for galore and apollo optimizers"
