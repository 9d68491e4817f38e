"""Resuming: bit for bit what would have been, from whole checkpoints only."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.tiny import tiny
from tests.training.helpers import LORA, examples, trainer_of, weights
from vlm.errors import UserError
from vlm.training.callbacks import StopOnSignal
from vlm.training.parts import add_lora

RATES = {"projector": 1e-2, "lora": 1e-2}
WITH_DROPOUT = LORA | {"lora_dropout": 0.3}
OPTIONS = {
    "max_steps": 6,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
}


def make(folder, callbacks=(), **changes):
    """LoRA with dropout, accumulation, several epochs: 7 examples, 2 rows a step."""
    model, processor = tiny()
    torch.manual_seed(1)
    adapted = add_lora(model, WITH_DROPOUT, RATES)
    return trainer_of(
        folder, RATES, made=(adapted, processor), data=examples(7), callbacks=callbacks, **OPTIONS, **changes
    )


class Killed(BaseException):
    """As SIGKILL: nothing in the code may catch it."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing disturbed."""
    trainer = make(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [3, 5])
def test_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path, step):
    with pytest.raises(Killed):
        make(tmp_path / "run", [KillAt(step)]).train()
    torch.manual_seed(99)  # another process has another state
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path / "run")))
    assert resumed.state.global_step == 6
    wanted, found = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    states = [trainer.optimizer.state_dict()["state"] for trainer in (whole, resumed)]
    for key, values in states[0].items():
        assert all(torch.equal(value, states[1][key][name]) for name, value in values.items())
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert losses[0] == losses[1]


def kill_when(monkeypatch, where):
    """Die while step 4 is being saved: at the weights, the optimizer, the state, or just before it gets its name."""
    calls = []

    def dying(original, count):
        def replaced(*args, **kwargs):
            calls.append(where)
            if len(calls) == count:
                raise Killed
            return original(*args, **kwargs)

        return replaced

    if where == "weights":
        monkeypatch.setattr(Trainer, "save_model", dying(Trainer.save_model, 2))
    elif where == "optimizer":
        name = "_save_optimizer_and_scheduler"
        monkeypatch.setattr(Trainer, name, dying(getattr(Trainer, name), 2))
    elif where == "random state":
        monkeypatch.setattr(Trainer, "_save_rng_state", dying(Trainer._save_rng_state, 2))
    else:
        monkeypatch.setattr(Path, "rename", dying(Path.rename, 2))


@pytest.mark.parametrize("where", ["weights", "optimizer", "random state", "rename"])
def test_a_run_killed_while_saving_goes_on_from_the_checkpoint_before(whole, tmp_path, monkeypatch, where):
    with monkeypatch.context() as patch:
        kill_when(patch, where)
        with pytest.raises(Killed):
            make(tmp_path / "run").train()
    last = get_last_checkpoint(str(tmp_path / "run"))
    assert Path(last).name == "checkpoint-2"
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=last)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    wanted, found = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_old_checkpoints_are_removed_and_the_best_is_kept(tmp_path):
    """The best is the one of step 2 here: the rate is so high that it only gets worse."""
    trainer = make(
        tmp_path / "run",
        eval_data=examples(4),
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=2,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    trainer.train()
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    best = Path(trainer.state.best_model_checkpoint)
    assert len(names) == 2
    assert best.is_dir()
    assert best.parent == tmp_path / "run"
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert best.name == f"checkpoint-{max(losses, key=losses.get)}"
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


def test_a_checkpoint_without_random_state_is_refused(tmp_path):
    make(tmp_path / "run").train()
    os.remove(tmp_path / "run" / "checkpoint-4" / "rng_state.pth")
    with pytest.raises(UserError, match=r"checkpoint-4 holds no rng_state\.pth: .*--overwrite"):
        make(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


class Tell(TrainerCallback):
    """The signal comes in the middle of a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(whole, tmp_path, number):
    before = signal.getsignal(number)
    with StopOnSignal() as stop:
        trainer = make(tmp_path / "run", [Tell(3, number), stop])
        trainer.train()
    assert signal.getsignal(number) is before
    assert stop.stopped
    assert trainer.state.global_step == 3
    assert Path(get_last_checkpoint(str(tmp_path / "run"))).name == "checkpoint-3"
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    wanted, found = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_a_signal_at_the_last_step_stops_nothing(tmp_path):
    with StopOnSignal() as stop:
        trainer = make(tmp_path / "run", [Tell(6, signal.SIGTERM), stop])
        trainer.train()
    assert not stop.stopped


def test_a_second_signal_acts_at_once(tmp_path):
    # What a terminal starts; what a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopOnSignal() as stop, pytest.raises(KeyboardInterrupt):
            make(tmp_path / "run", [Tell(2, signal.SIGINT), Tell(2, signal.SIGINT), stop]).train()
    finally:
        signal.signal(signal.SIGINT, before)
