"""Fields of `train` that have no effect, or that the Trainer refuses together, against what transformers does."""

from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from vlm import recipe
from vlm.recipe import RecipeError
from vlm.recipe_train import check
from vlm.recipe_train_effects import NOT_ADAM, WITHOUT_ARGS, WITHOUT_OPTIONS, WITHOUT_WARMUP, without_effect

STEPS = {"eval_strategy": "steps", "eval_steps": 10}


@pytest.mark.parametrize(
    ("train", "key", "said"),
    [
        ({"eval_steps": 5}, "eval_steps", "add `eval_strategy: steps`"),
        ({"eval_steps": 5, "eval_strategy": "epoch"}, "eval_steps", "has no effect with `eval_strategy: epoch`"),
        ({"eval_delay": 5}, "eval_delay", "add `eval_strategy: epoch`"),
        ({"eval_on_start": True}, "eval_on_start", "nothing is evaluated during training"),
        ({"per_device_eval_batch_size": 5}, "per_device_eval_batch_size", "nothing is evaluated"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model", "nothing is evaluated"),
        ({"greater_is_better": False}, "greater_is_better", "nothing is evaluated"),
        ({**STEPS, "greater_is_better": False}, "greater_is_better", "without `metric_for_best_model`"),
        ({"save_steps": 5, "save_strategy": "epoch"}, "save_steps", "has no effect with `save_strategy: epoch`"),
        ({**STEPS, "save_steps": 5, "save_strategy": "best"}, "save_steps", "with `save_strategy: best`"),
        ({"logging_steps": 5, "logging_strategy": "epoch"}, "logging_steps", "with `logging_strategy: epoch`"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end", "needs `eval_strategy`"),
        ({**STEPS, "load_best_model_at_end": True, "save_strategy": "epoch"}, "load_best_model_at_end", "set both to"),
        ({**STEPS, "load_best_model_at_end": True, "save_steps": 15}, "load_best_model_at_end", "15 is not one of 10"),
        ({**STEPS, "load_best_model_at_end": True, "save_steps": 0.5}, "load_best_model_at_end", "not 10 and 0.5"),
        ({"early_stopping_patience": 2, "eval_strategy": "no"}, "early_stopping_patience", "needs `eval_strategy`"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_threshold", "without `early_stopping_patience`"),
        ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, "warmup_steps", "choose constant_with_warmup"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type", "follows what is evaluated"),
        ({"lr_scheduler_kwargs": {"a": 1}, "lr_scheduler_type": "constant"}, "lr_scheduler_kwargs", "no options"),
        ({"adam_beta1": 0.8, "optim": "sgd"}, "adam_beta1", "has no effect with `optim: sgd`"),
        ({"optim_args": "a=1"}, "optim_args", "has no effect with `optim: adamw"),
        ({"optim_target_modules": "q"}, "optim_target_modules", "for galore and apollo"),
        ({"dataloader_prefetch_factor": 2}, "dataloader_prefetch_factor", "without `dataloader_num_workers`"),
        ({"dataloader_multiprocessing_context": "fork"}, "dataloader_multiprocessing_context", "num_workers"),
        ({"activation_checkpointing_kwargs": {}}, "activation_checkpointing_kwargs", "`activation_checkpointing`"),
        ({"liger_kernel_config": {}}, "liger_kernel_config", "without `use_liger_kernel`"),
        ({"fsdp_config": {}}, "fsdp_config", "without `fsdp`"),
        ({"run_name": "a"}, "run_name", "without `report_to`"),
        ({"bf16_full_eval": True}, "bf16_full_eval", "in the number format of training"),
    ],
)
def test_a_field_without_effect_is_named(train: dict[str, Any], key: str, said: str) -> None:
    found = dict(check(train))
    assert [*found] == [key]
    assert said in found[key]


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"save_steps": 5, "save_strategy": "no", "eval_strategy": "no", "eval_steps": 5, "eval_delay": 2},
        {"logging_strategy": "no", "logging_steps": 5},
        {"eval_strategy": "steps", "logging_strategy": "epoch", "logging_steps": 5},  # evaluations follow it
        {**STEPS, "load_best_model_at_end": True, "save_steps": 20, "greater_is_better": False},
        {**STEPS, "load_best_model_at_end": True, "save_strategy": "best"},
        {"eval_strategy": "epoch", "load_best_model_at_end": True, "save_strategy": "epoch"},
        {**STEPS, "eval_steps": 0.1, "load_best_model_at_end": True, "save_steps": 0.3},
        {**STEPS, "metric_for_best_model": "loss", "greater_is_better": False, "early_stopping_patience": 2},
        {"warmup_steps": 5, "lr_scheduler_type": "constant_with_warmup"},
        {"warmup_steps": 0, "lr_scheduler_type": "constant"},
        {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1},
        {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 1},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"run_name": "a", "report_to": "tensorboard"},
    ],
)
def test_what_has_an_effect_is_taken(train: dict[str, Any], tmp_path) -> None:
    assert check(train) == []
    plain = {key: value for key, value in train.items() if not key.startswith("early_stopping")}
    TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **plain)


@pytest.mark.parametrize("kind", [*WITHOUT_WARMUP, *WITHOUT_OPTIONS])
def test_these_schedules_ignore_warmup_or_options_in_transformers_too(kind: str) -> None:
    def rates(warmup: int, **options: Any) -> list[float]:
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        schedule = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=9, **options)
        found = []
        for _ in range(4):
            optimizer.step()
            schedule.step() if kind.startswith("constant") else schedule.step(1.0)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    if kind in WITHOUT_WARMUP:
        assert rates(0) == rates(3)
    if kind in WITHOUT_OPTIONS:
        assert rates(3) == rates(3, scheduler_specific_kwargs={"no_such_option": 1})


def test_the_optimizers_are_known() -> None:
    assert {*NOT_ADAM, *WITHOUT_ARGS} <= {name.value for name in OptimizerNames}


def test_it_is_said_with_its_place(tmp_path) -> None:
    text = """\
model: {vision: some/encoder, language: some/llm}
data: {train: {format: image_folder, path: images}}
trainable: {projector: 1e-3}
train:
  max_steps: 5
  eval_steps: 2
"""
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"mine.yaml:6  train.eval_steps: has no effect without `eval_strategy`"):
        recipe.load(tmp_path / "mine.yaml")
    assert [*without_effect({"eval_steps": None})] == [], "null is as if it were not there"
