"""How a stage ends: no model and no checkpoint with weights that are not finite, and none that nothing has trained."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.tiny import tiny
from tests.training.helpers import LORA, TRAIN, examples, lora_trainer, rows_of, train, trainer_of, weights
from vlm.errors import UserError
from vlm.training.checkpoints import MANIFEST, newest
from vlm.training.ending import require_trained, steps_to_train
from vlm.training.faults import TrainingError
from vlm.training.finite import NonFiniteWeights, not_finite
from vlm.training.folder import save_stage
from vlm.training.part_trainer import NonFiniteGradients, PartTrainer
from vlm.training.parts import add_lora
from vlm.training.stage import say_how_it_ended
from vlm.training.trainer import VLMTrainer


class Spoil(TrainerCallback):
    """Set the weights that are trained to `value` after a step."""

    def __init__(self, step, value):
        self.step, self.value = step, value

    @torch.no_grad()
    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(self.value)


def spoil_loss(monkeypatch, *steps):
    """The loss of these steps is not a number; the weights are as they should be."""
    original = VLMTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * math.nan if self.is_in_train and self.state.global_step + 1 in steps else loss

    monkeypatch.setattr(VLMTrainer, "compute_loss", compute_loss)


def silent(line):
    return None


# --- weights


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_named(value):
    model, _ = tiny()
    assert not not_finite(model)
    name = "model.multi_modal_projector.linear_1.weight"
    with torch.no_grad():
        model.get_parameter(name)[1, 2] = value
    assert not_finite(model) == [name]
    model.requires_grad_(False)
    assert not_finite(model, trained_only=True) == []


@pytest.mark.few(1)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_checkpoint_is_saved_of_weights_that_are_not_finite(tmp_path, value):
    trainer = lora_trainer(tmp_path, [Spoil(4, value)])
    with pytest.raises(NonFiniteWeights, match=r"not finite after step 4 .*lora_A.* more\), and are not saved"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(
        tensor.isfinite().all() for tensor in load_file(tmp_path / "checkpoint-2/adapter_model.safetensors").values()
    )


@pytest.mark.slow
def test_it_ends_at_once_or_after_the_last_step(tmp_path):
    """Without checkpoints: at the next step, whose gradients show it, or at the end."""
    for step, at in ((2, 3), (6, 6)):
        trainer = lora_trainer(tmp_path, [Spoil(step, math.nan)], save_strategy="no")
        with pytest.raises(NonFiniteWeights):
            trainer.train()
        assert trainer.state.global_step + (step < 6) == at


@pytest.mark.parametrize("kind", ["one answers", "contrastive"])
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.slow
def test_such_a_run_names_the_last_good_checkpoint(request, tmp_path, monkeypatch, kind, step):
    """Without the fault it then goes on from there, and ends as the undisturbed run does."""
    values = request.getfixturevalue("values" if kind == "one answers" else "pair_values")
    values |= {"evaluation": {}, "train": values["train"] | {"eval_strategy": "no"}}
    train(values | {"output_dir": str(tmp_path / "undisturbed")})
    original = PartTrainer._maybe_log_save_evaluate

    def spoiled(self, *args, **kwargs):
        if self.state.global_step == step:
            Spoil(step, math.nan).on_step_end(self.args, self.state, self.control, model=self.model)
        original(self, *args, **kwargs)

    found = {1: "from the start: there is no checkpoint yet", 3: r"from .*/checkpoint-2\."}[step]
    with monkeypatch.context() as patch:
        patch.setattr(PartTrainer, "_maybe_log_save_evaluate", spoiled)
        with pytest.raises(TrainingError, match=rf"not finite after step {step} .*--resume, {found}"):
            train(values)
    assert not (tmp_path / "run/model").exists()
    train(values, resume=True)
    one, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("undisturbed", "run"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_merged_weights_that_overflow_are_not_saved(tmp_path):
    """LoRA and the weights are finite, their sum is not."""
    model, processor = tiny()
    rates = {"lora": 1e-2}
    adapted = add_lora(model, LORA, rates)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.fill_(1e38)
    assert not not_finite(adapted)
    with pytest.raises(NonFiniteWeights, match=r"with LoRA merged in has weights that are not finite: model\.lang"):
        save_stage(tmp_path, adapted, adapted, processor)
    assert not [*tmp_path.iterdir()]


def test_a_model_that_is_not_finite_is_refused_before_the_first_step(values, parts, tmp_path):
    for part in tiny():
        if isinstance(part, torch.nn.Module):
            part.lm_head.weight.data[0, 0] = math.nan
        part.save_pretrained(tmp_path / "start")
    values |= {"model": {"pretrained": str(tmp_path / "start")}, "lora": None}
    with pytest.raises(UserError, match=r"this stage starts from has weights that are not finite: .*lm_head\.weight"):
        train(values, dry_run=True)


@pytest.mark.slow
def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(tmp_path):
    """As older versions saved them."""
    lora_trainer(tmp_path).train()
    trainer = lora_trainer(tmp_path)
    real, seen = PartTrainer.require_finite_weights, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartTrainer, "require_finite_weights", lambda self: seen.append(real))
        broken = lora_trainer(tmp_path, [Spoil(6, math.nan)])
        broken.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(NonFiniteWeights, match=r"checkpoint-6 has weights that are not finite"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert newest(tmp_path, silent, precision="float32") == tmp_path / "checkpoint-4"


# --- weights that are finite, and too large


def test_a_checkpoint_of_weights_that_have_blown_up_is_passed_over(whole, tmp_path, monkeypatch):
    """With its weights no step has finite gradients; the one before was gone on from, so that it works."""
    monkeypatch.setattr(PartTrainer, "max_bad_steps", 2)
    with pytest.raises(NonFiniteGradients, match=r"2 steps in a row up to step 6 are not finite"):
        lora_trainer(tmp_path, [Spoil(4, 1e30)]).train()
    said = []
    assert newest(tmp_path, said.append, precision="float32") == tmp_path / "checkpoint-2"
    assert said == ["checkpoint-4 has diverged: with its weights no gradients are finite; going on from checkpoint-2"]
    assert newest(tmp_path, silent, precision="bfloat16") == tmp_path / "checkpoint-4", "it may have been the precision"
    resumed = lora_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    wanted, found = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert newest(tmp_path, silent, precision="float32") == tmp_path / "checkpoint-6"


@pytest.mark.slow
def test_without_one_that_works_one_is_told_to_begin_anew(values, tmp_path, monkeypatch):
    original = PartTrainer._maybe_log_save_evaluate

    def spoiled(self, *args, **kwargs):
        if self.state.global_step == 1:
            Spoil(1, 1e30).on_step_end(self.args, self.state, self.control, model=self.model)
        original(self, *args, **kwargs)

    values["train"] |= {"save_steps": 1, "max_steps": 9, "eval_strategy": "no"}
    with monkeypatch.context() as patch:
        patch.setattr(PartTrainer, "_maybe_log_save_evaluate", spoiled)
        with pytest.raises(TrainingError, match=r"No checkpoint is of use: begin anew with --overwrite, or remove"):
            train(values)
    with pytest.raises(UserError, match=r"checkpoint-1 has diverged: .* Begin anew with --overwrite and lower"):
        train(values, resume=True)


def ended(trainer, resumed=False):
    require_trained(trainer, rows_of(tiny()[1], examples(7)), resumed=resumed)


@pytest.mark.few(1)
@pytest.mark.parametrize("cause", ["the weights", "the data"])
def test_a_run_whose_last_steps_were_skipped_is_done_if_its_weights_are_good(tmp_path, monkeypatch, cause):
    if cause == "the data":
        spoil_loss(monkeypatch, 5, 6)
    trainer = lora_trainer(tmp_path, [Spoil(4, 1e30)] if cause == "the weights" else [])
    trainer.train()
    assert trainer.skipped.count == 2
    if cause == "the data":
        ended(trainer)
    else:
        with pytest.raises(NonFiniteGradients, match=r"diverged: the gradients of the last 2 steps"):
            ended(trainer)
        assert newest(tmp_path, silent, precision="float32") == tmp_path / "checkpoint-2"


def test_steps_that_were_all_skipped_have_trained_nothing(tmp_path, monkeypatch):
    spoil_loss(monkeypatch, 1, 2, 3)
    trainer = trainer_of(tmp_path, max_steps=3)
    trainer.train()
    told = SimpleNamespace(stopped=False)
    with pytest.raises(TrainingError, match=r"nothing was trained: the gradients of all 3 steps are not finite"):
        say_how_it_ended(trainer, rows_of(tiny()[1], examples(2)), None, told, Console(quiet=True))


@pytest.mark.slow
def test_a_resumed_run_goes_on_counting_steps_that_are_skipped(tmp_path, monkeypatch):
    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                control.should_save = control.should_training_stop = True

    spoil_loss(monkeypatch, *range(3, 13))
    lora_trainer(tmp_path, [StopAt()], max_steps=12).train()
    assert json.loads((tmp_path / "checkpoint-4" / MANIFEST).read_text())["skipped_before"] == 2
    resumed = lora_trainer(tmp_path, max_steps=12)
    with pytest.raises(NonFiniteGradients, match="of 5 steps in a row up to step 7"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(UserError, match=r"checkpoint-4 has diverged.*checkpoint-2 has diverged"):
        newest(tmp_path, silent, precision="float32")  # they have the same weights


@pytest.mark.slow
def test_a_held_out_loss_that_is_not_finite_is_never_the_best(tmp_path, caplog):
    options = {"eval_data": examples(2), "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = lora_trainer(tmp_path, metric_for_best_model="score", greater_is_better=False, **options)
    trainer.measures.append(lambda loss: {"eval_score": math.nan})
    trainer.train()
    assert "No score was finite; the model is that of step 6, the last." in caplog.text


# --- nothing to train


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"max_steps": -1, "num_train_epochs": 0}, "train.num_train_epochs is 0"),
        ({"max_steps": 0}, "train.max_steps is 0"),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 9},
            r"train\.dataloader_drop_last leaves out the only batch, which is not full: it has 8 of 9 rows\. Lower",
        ),
    ],
)
def test_a_run_without_a_step_is_refused(tmp_path, changes, why):
    with pytest.raises(UserError, match=rf"no step would be trained: {why}"):
        steps_to_train(trainer_of(tmp_path, data=examples(8), **changes))


@pytest.mark.parametrize("kind", ["values", "pair_values"])
def test_a_dry_run_says_so_too(request, kind, tmp_path):
    values = request.getfixturevalue(kind)
    values |= {"train": TRAIN | {"dataloader_drop_last": True, "per_device_train_batch_size": 50}, "evaluation": {}}
    with pytest.raises(UserError, match=r"no step would be trained: train\.dataloader_drop_last"):
        train(values, dry_run=True)
    assert not Path(values["output_dir"]).exists()
