"""What is watched while training: that each part learns that should, and no other; and the metrics file."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from tests.tiny import FUSIONS, tiny
from tests.training.helpers import trainer_of
from vlm.training import memory
from vlm.training.callbacks import MetricsLog, PartCheck, PartNotTraining


def detach(module):
    """A module whose output has lost its way back, the classic silent mistake."""
    module.register_forward_hook(lambda module, args, output: output.detach())


def checked(tmp_path, rates, made, **changes):
    check = PartCheck(made[0], rates)
    trainer_of(tmp_path, rates, made=made, callbacks=[check, *changes.pop("callbacks", [])], **changes).train()
    return check


@pytest.mark.parametrize("fusion", FUSIONS)
def test_healthy_training_passes(tmp_path, fusion):
    rates = {"projector": 1e-3, "language": 1e-4} | ({"fusion": 1e-3} if "cross" in fusion else {})
    assert checked(tmp_path, rates, tiny(fusion=fusion)).done


def test_a_detached_projector_is_found(tmp_path):
    made = tiny()
    detach(made[0].model.multi_modal_projector)
    with pytest.raises(PartNotTraining, match=r"^projector should learn, but got no gradient"):
        checked(tmp_path, {"projector": 1e-3, "language": 1e-4}, made, max_steps=8)


def test_detached_cross_attention_is_found(tmp_path):
    made = tiny(fusion="cross_attention")
    for name, module in made[0].named_modules():
        if name.endswith(".cross_attention"):
            # What a block adds is there, but without a gradient of its own.
            module.register_forward_hook(lambda m, args, output: args[0] + (output - args[0]).detach())
    with pytest.raises(PartNotTraining, match=r"^fusion, projector should learn"):
        checked(tmp_path, {"projector": 1e-3, "fusion": 1e-3, "language": 1e-4}, made, max_steps=8)


def test_a_short_run_is_checked_at_its_end(tmp_path):
    made = tiny()
    detach(made[0].model.multi_modal_projector)
    with pytest.raises(PartNotTraining):
        checked(tmp_path, {"projector": 1e-3, "language": 1e-4}, made, max_steps=2)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's")
def test_looking_at_weights_takes_little_room():
    """A model's weights in float64, all at once, would take twice the room of the model."""
    model = torch.nn.ModuleDict({"language_model": torch.nn.Linear(5_000, 10_000, bias=False)})
    check, device = PartCheck(model, {"language": 1.0}), torch.device("cpu")
    check.on_train_begin(None, None, None)  # once, so that what PyTorch sets up is there
    memory.reset_peak(device)
    before = memory.in_use(device)
    check.on_train_begin(None, None, None)
    assert memory.peak(device) - before < 100e6, "the weights take 200 MB"


class Meddle(TrainerCallback):
    """Changes what is frozen, as a wrong optimizer or tied weights would."""

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        next(model.model.vision_tower.parameters()).add_(1e-3)


def test_a_frozen_part_that_moves_is_found(tmp_path):
    made = tiny()
    rates = {"projector": 1e-3}
    # Before the check, so that it sees the first step's change.
    with pytest.raises(PartNotTraining, match="vision should be frozen"):
        trainer_of(tmp_path, rates, made=made, callbacks=[Meddle(), PartCheck(made[0], rates)]).train()


def test_gates_that_start_at_zero_are_waited_for(tmp_path):
    """A closed gate lets nothing through to the projector at the first step; that is no mistake."""
    made = tiny(fusion="cross_attention", gates=False)
    gradients = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append(max(float(p.grad.abs().max()) for p in model.model.multi_modal_projector.parameters()))

    check = checked(tmp_path, {"projector": 1e-3, "fusion": 1e-3}, made, callbacks=[Watch()], max_steps=4)
    assert gradients[0] == 0
    assert gradients[-1] > 0
    assert check.done


def test_a_warm_up_from_zero_is_waited_for(tmp_path):
    changes = {"lr_scheduler_type": "linear", "warmup_steps": 3, "max_steps": 6}
    assert checked(tmp_path, {"projector": 1e-3}, tiny(), **changes).done


def test_the_metrics_file_has_a_line_for_each_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    trainer_of(tmp_path, callbacks=[MetricsLog(path, "align")]).train()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in losses] == [1, 2, 3]
    assert all(entry["stage"] == "align" and entry["seconds"] >= 0 for entry in entries)
    assert all({"grad_norm", "learning_rate", "epoch"} <= entry.keys() for entry in losses)


def test_the_metrics_file_is_json_also_where_a_loss_is_not_finite(tmp_path):
    def strict(name):
        raise AssertionError(name)

    log = MetricsLog(tmp_path / "metrics.jsonl", "train")
    state = SimpleNamespace(is_world_process_zero=True, global_step=3)
    log.on_log(None, state, None, {"loss": math.nan, "eval_loss": math.inf, "grad_norm": 2.0})
    state.global_step = 4
    log.on_train_begin(None, state, None)  # which writes what was there anew
    entry = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=strict)
    assert (entry["loss"], entry["eval_loss"], entry["grad_norm"]) == (None, None, 2.0)


def test_a_run_that_begins_again_replaces_what_it_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "align", "step": 9, "loss": 1.0}\n{"stage": "tune", "step": 2, "loss": 5.0}\n')
    trainer_of(tmp_path, callbacks=[MetricsLog(path, "tune")]).train()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(e["stage"], e["step"]) for e in entries if "loss" in e] == [
        ("align", 9),
        ("tune", 1),
        ("tune", 2),
        ("tune", 3),
    ]
    assert 5.0 not in [e.get("loss") for e in entries]
