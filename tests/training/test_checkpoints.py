"""Resuming: bit for bit what would have been, from whole checkpoints only."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.training.helpers import RATES, examples, lora_trainer, weights
from vlm.errors import UserError
from vlm.training.checkpoints import newest, remove_older, why_broken


class Killed(BaseException):
    """As SIGKILL: nothing in the code may catch it."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("step", [3, 5])
def test_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path, step):
    with pytest.raises(Killed):
        lora_trainer(tmp_path / "run", [KillAt(step)]).train()
    torch.manual_seed(99)  # another process has another state
    resumed = lora_trainer(tmp_path / "run")
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


@pytest.mark.few(2)
@pytest.mark.parametrize("where", ["weights", "optimizer", "random state", "rename"])
def test_a_run_killed_while_saving_goes_on_from_the_checkpoint_before(whole, tmp_path, monkeypatch, where):
    with monkeypatch.context() as patch:
        kill_when(patch, where)
        with pytest.raises(Killed):
            lora_trainer(tmp_path / "run").train()
    last = get_last_checkpoint(str(tmp_path / "run"))
    assert Path(last).name == "checkpoint-2"
    resumed = lora_trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=last)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    wanted, found = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_old_checkpoints_are_removed_and_the_best_is_kept(tmp_path):
    """The best is the one of step 2 here: the rate is so high that it only gets worse."""
    trainer = lora_trainer(
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
    lora_trainer(tmp_path / "run").train()
    os.remove(tmp_path / "run" / "checkpoint-4" / "rng_state.pth")
    with pytest.raises(UserError, match=r"checkpoint-4 holds no rng_state\.pth: .*--overwrite"):
        lora_trainer(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


@pytest.mark.parametrize("writer", ["save_model", "_save_optimizer_and_scheduler"])
def test_a_full_disk_costs_one_checkpoint_and_nothing_else(whole, tmp_path, monkeypatch, caplog, writer):
    """No file may grow at step 4, so that safetensors and torch fail as their libraries do."""
    original = getattr(Trainer, writer)

    def write(self, *args, **kwargs):
        if self.state.global_step != 4:
            return original(self, *args, **kwargs)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            return original(self, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(Trainer, writer, write)
    trainer = lora_trainer(tmp_path / "run")
    unsaved = []
    trainer.add_callback(
        type("Look", (TrainerCallback,), {"on_save": lambda *_, **__: unsaved.append(trainer.unsaved)})
    )
    trainer.train()
    assert [why is None for why in unsaved] == [True, False, True]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-2", "checkpoint-6"]
    assert "The checkpoint of step 4 could not be saved" in caplog.text
    assert "Training goes on" in caplog.text
    wanted, found = weights(whole.model), weights(trainer.model)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert newest(tmp_path / "run", caplog.messages.append) == tmp_path / "run/checkpoint-6"


def test_what_is_no_full_disk_is_no_full_disk(tmp_path, monkeypatch):
    def wrong(self, folder):
        raise RuntimeError("a mistake in the code")

    monkeypatch.setattr(Trainer, "_save_rng_state", wrong)
    with pytest.raises(RuntimeError, match="a mistake"):
        lora_trainer(tmp_path / "run").train()


def test_old_checkpoints_go_after_the_new_one_is_there(tmp_path, monkeypatch):
    from vlm.training import part_trainer as module

    seen = []

    def remove(folder, *args):
        seen.append(sorted(path.name for path in folder.glob("checkpoint-*") if why_broken(path) is None))
        remove_older(folder, *args)

    monkeypatch.setattr(module, "remove_older", remove)
    lora_trainer(tmp_path / "run", save_total_limit=1).train()
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-6"]


@pytest.mark.parametrize("limit", [1, 2])
def test_a_new_checkpoint_stays_though_files_have_later_times(tmp_path, limit):
    """As on a machine whose clock is behind, or after the folder was copied."""
    run = tmp_path / "run"
    with pytest.raises(Killed):
        lora_trainer(run, [KillAt(3)]).train()
    os.utime(run / "checkpoint-2", (4e9, 4e9))
    lora_trainer(run, save_total_limit=limit).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    left = ["checkpoint-6"] if limit == 1 else ["checkpoint-4", "checkpoint-6"]
    assert sorted(path.name for path in run.iterdir()) == left


@pytest.mark.parametrize(
    ("names", "limit", "best", "left"),
    [
        ([2, 4, 6, 8], 2, None, [4, 6]),  # the run was resumed from 4: 8 is older than 6
        ([2, 4, 6, 8, 10], 3, "old/checkpoint-2", [2, 4, 6]),
        ([8, 10, 6], 1, None, [6]),
        ([2, 4, 6], 1, "checkpoint-2", [2, 6]),
        ([2, 4, 6], None, None, [2, 4, 6]),
        ([2, "4.bak", 6], 1, None, ["4.bak", 6]),
    ],
)
def test_which_checkpoints_go(tmp_path, names, limit, best, left):
    for name in names:
        (tmp_path / f"checkpoint-{name}").mkdir()
    remove_older(tmp_path, 6, limit, best)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{name}" for name in left}


def test_a_rate_that_was_lowered_is_that_of_the_steps_to_come(whole, tmp_path, monkeypatch):
    """By the rates in the log: the cosine goes on, at half its height."""
    before = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    for part, rate in RATES.items():
        monkeypatch.setitem(RATES, part, rate / 2)
    resumed = lora_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
    log = [entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry]
    assert log == pytest.approx([*before[:4], before[4] / 2, before[5] / 2])


def test_a_run_resumed_after_its_last_step_takes_no_other(whole, tmp_path):
    """That step is in the middle of an epoch, where Trainer would go on."""
    resumed = lora_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-6")
    assert resumed.state.global_step == 6
    wanted, found = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_what_is_left_of_a_checkpoint_that_was_being_removed_at_the_end_goes(tmp_path):
    run = tmp_path / "run"
    lora_trainer(run, save_total_limit=1).train()
    (run / "checkpoint-4").mkdir()
    (run / "checkpoint-4" / "optimizer.pt").touch()
    lora_trainer(run, save_total_limit=1).train(resume_from_checkpoint=str(run / "checkpoint-6"))
    assert [path.name for path in run.iterdir()] == ["checkpoint-6"]
