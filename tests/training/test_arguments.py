"""What no run can do is refused before models are loaded, with its key and value."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames

from vlm import recipe
from vlm.errors import UserError
from vlm.training import arguments, run
from vlm.training.arguments import require_arguments, training_arguments
from vlm.training.processes import idle_gpus


def made(**train: Any) -> recipe.Recipe:
    values = {
        "model": {"vision": "some/encoder", "language": "some/llm"},
        "data": {"train": {"format": "image_folder", "path": "images"}},
        "trainable": {"projector": 1e-3},
        "train": {"max_steps": 5, "use_cpu": True, **train},
    }
    return recipe.from_dict(values)


def refusal(**train: Any) -> str:
    with pytest.raises(UserError) as caught:
        require_arguments(made(**train))
    return str(caught.value)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        pytest.param({"fp16": True}, "train.fp16: True cannot be used: float16 is for GPUs", marks=pytest.mark.cpu),
        ({"bf16": True, "fp16": True}, "cannot be used: At most one of fp16 and bf16"),
        ({"lr_scheduler_kwargs": {"cycles": 1}}, "train.lr_scheduler_kwargs: {'cycles': 1} cannot be used"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "x"}},
            "train.lr_scheduler_kwargs: {'num_cycles': 'x'} cannot be used",
        ),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 9.0}}, "train.lr_scheduler_kwargs"),
        ({"optim": "sgd", "optim_args": "x"}, "train.optim_args: 'x' cannot be used"),
        ({"debug": "x"}, "train.debug: 'x' cannot be used"),
        ({"deepspeed": "nothing.json"}, "train.deepspeed: 'nothing.json' cannot be used"),
        ({"accelerator_config": {"x": 1}}, "train.accelerator_config: {'x': 1} cannot be used"),
        ({"accelerator_config": {"split_batches": "x"}}, "train.accelerator_config"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"x": 1}},
            "train.activation_checkpointing_kwargs: {'x': 1} cannot",
        ),
    ],
)
def test_a_value_is_named(train: dict[str, Any], said: str) -> None:
    assert said in refusal(**train)


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_every_optimizer_is_built_or_refused(optim: str) -> None:
    """Those without their package, and those that no list of parameter groups makes."""
    said = ""
    try:
        require_arguments(made(optim=optim))
    except UserError as error:
        said = str(error)
    assert not said or said.startswith(f"train.optim: '{optim}' cannot be used: ")
    assert not said or optim not in ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial"])
def test_schedules_that_need_nothing_more_are_taken(kind: str) -> None:
    warmup = {} if kind == "constant" else {"warmup_steps": 0.1}
    require_arguments(made(lr_scheduler_type=kind, **warmup))


@pytest.mark.cpu
def test_a_stage_is_named_by_its_number() -> None:
    two = made().resolved()
    two["stages"] = [two["stages"][0], {**two["stages"][0], "name": "b", "train": {"use_cpu": True, "fp16": True}}]
    with pytest.raises(UserError, match=r"^stages\.1\.train\.fp16: True"):
        require_arguments(recipe.from_dict(two))


def test_it_is_said_before_data_and_models_are_read(tmp_path: Path) -> None:
    """Neither of them is there."""
    with pytest.raises(UserError, match=r"train\.lr_scheduler_kwargs"):
        run.train(made(lr_scheduler_kwargs={"x": 1}), console=Console(quiet=True), dry_run=True)


def test_a_run_is_resumed_or_replaced() -> None:
    with pytest.raises(UserError, match="--overwrite removes it; give one of the two"):
        run.train(made(), console=Console(quiet=True), resume=True, overwrite=True)


def test_a_schedule_is_tried_as_the_trainer_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        arguments, "get_scheduler", lambda name, **given: seen.update(given) or get_scheduler(name, **given)
    )
    require_arguments(made(lr_scheduler_type="cosine", lr_scheduler_kwargs={"num_cycles": 2}, warmup_steps=10))
    assert (seen["num_warmup_steps"], seen["scheduler_specific_kwargs"]) == (10, {"num_cycles": 2})


def test_one_process_uses_one_gpu(monkeypatch, tmp_path):
    """DataParallel would divide a batch, and rows of trees from their layout."""

    class OnFourGPUs(TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 4

    monkeypatch.setattr(arguments, "TrainingArguments", OnFourGPUs)
    one = made()
    assert training_arguments(one, one.stages[0], tmp_path).n_gpu == 1


def test_gpus_that_are_not_used_are_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    assert "uses 1 of 4 GPUs" in idle_gpus(SimpleNamespace(device=gpu, num_processes=1))
    assert idle_gpus(SimpleNamespace(device=gpu, num_processes=4)) is None
    assert idle_gpus(SimpleNamespace(device=cpu, num_processes=1)) is None
