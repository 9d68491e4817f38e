"""Ctrl-C and SIGTERM: what is done is kept, wherever the run is; the exit code is that of the signal."""

import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.training.helpers import TRAIN, examples, lora_trainer, train, weights
from vlm import generation
from vlm.training import features, run
from vlm.training.callbacks import StopOnSignal, Stopped


class Tell(TrainerCallback):
    """The signal comes in the middle of a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.few(1)
def test_a_signal_ends_the_step_and_saves(whole, tmp_path, number):
    before = signal.getsignal(number)
    with StopOnSignal() as stop:
        trainer = lora_trainer(tmp_path / "run", [Tell(3, number), stop])
        trainer.train()
    assert signal.getsignal(number) is before
    assert stop.stopped
    assert trainer.state.global_step == 3
    assert Path(get_last_checkpoint(str(tmp_path / "run"))).name == "checkpoint-3"
    resumed = lora_trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    wanted, found = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_a_signal_at_the_last_step_stops_nothing(tmp_path):
    with StopOnSignal() as stop:
        trainer = lora_trainer(tmp_path / "run", [Tell(6, signal.SIGTERM), stop])
        trainer.train()
    assert not stop.stopped


def test_a_second_signal_acts_at_once(tmp_path):
    # What a terminal starts; what a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopOnSignal() as stop, pytest.raises(KeyboardInterrupt):
            lora_trainer(tmp_path / "run", [Tell(2, signal.SIGINT), Tell(2, signal.SIGINT), stop]).train()
    finally:
        signal.signal(signal.SIGINT, before)


EVALUATED = {"eval_data": examples(5), "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}


def history(trainer):
    """Losses by step, without the times."""
    keys = ("step", "loss", "eval_loss")
    entries = [{key: entry[key] for key in keys if key in entry} for entry in trainer.state.log_history]
    return [entry for entry in entries if len(entry) > 1]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    trainer = lora_trainer(tmp_path_factory.mktemp("evaluated"), **EVALUATED, **BEST)
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.few(1)
def test_a_signal_during_the_evaluation_leaves_it_for_the_resumed_run(evaluated, tmp_path, step):
    """The held-out loss of that step is in the log as if nothing had happened, and the best model is the same; in the
    last step too."""

    class TellInEvaluation(TrainerCallback):
        batches = 0

        def on_prediction_step(self, args, state, control, **kwargs):
            if state.global_step == step:
                self.batches += 1
                os.kill(os.getpid(), signal.SIGTERM)

    with StopOnSignal() as stop:
        tell = TellInEvaluation()
        stopped = lora_trainer(tmp_path / "run", [tell, stop], **EVALUATED, **BEST)
        stopped.train()
    assert stop.stopped
    assert tell.batches == 1, "it was left at once"
    last = get_last_checkpoint(str(tmp_path / "run"))
    assert Path(last).name == f"checkpoint-{step}"
    torch.manual_seed(99)
    resumed = lora_trainer(tmp_path / "run", **EVALUATED, **BEST)
    resumed.train(resume_from_checkpoint=last)
    assert history(resumed) == history(evaluated)
    assert resumed.state.best_global_step == evaluated.state.best_global_step
    assert Path(resumed.state.best_model_checkpoint).name == Path(evaluated.state.best_model_checkpoint).name
    wanted, found = weights(evaluated.model), weights(resumed.model)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def tell_in(monkeypatch, module, name, number=signal.SIGTERM):
    """Have the signal come while a function runs."""
    original = getattr(module, name)

    def told(*args, **kwargs):
        os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, told)


def test_a_signal_while_images_are_encoded_keeps_what_is_encoded(values, monkeypatch):
    values |= {"evaluation": {}, "train": TRAIN | {"max_steps": 1, "eval_strategy": "no"}}
    values["data"]["cache_features"] = True
    encoded = []
    original = features.keep

    def keep(cache, batches):
        shards = original(cache, batches)
        encoded.append(shards)
        return shards

    monkeypatch.setattr(features, "keep", keep)
    monkeypatch.setattr("vlm.data.encoding.BATCH_IMAGES", 1)
    with monkeypatch.context() as patch:
        tell_in(patch, features, "choose")
        with pytest.raises(Stopped, match=r"while encoding images; .* are kept; go on with --resume") as told:
            train(values)
    assert told.value.exit_code == 143
    assert not encoded[-1], "told before the first of the rest"
    said = train(values, resume=True)
    assert "5 of 10 images found on disk" in said


def test_a_signal_while_questions_are_answered_leaves_the_scores_to_the_resumed_run(values, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        tell_in(patch, generation, "_answers", signal.SIGINT)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(Stopped, match=r"answering the .* the model is saved; .*--resume") as told:
                train(values)
        finally:
            signal.signal(signal.SIGINT, before)
    assert told.value.exit_code == 130
    saved = (tmp_path / "run/model/model.safetensors").read_bytes()
    assert not (tmp_path / "run/evaluation").exists()
    monkeypatch.setattr(run, "run_stage", lambda *args, **kwargs: pytest.fail("it is trained already"))
    assert "exact_match" in train(values, resume=True)
    assert (tmp_path / "run/evaluation/summary.json").is_file()
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == saved
