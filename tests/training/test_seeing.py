"""What a run shows as it goes: norms, the blind loss, samples, the best checkpoint, trackers."""

import json
import logging
import math
from contextlib import suppress

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from transformers.integrations import integration_utils

from tests.tiny import tiny
from tests.training.helpers import examples, recipe_values, rows_of, train, trainer_of
from vlm import recipe
from vlm.data.example import Example, question_and_answer
from vlm.errors import UserError
from vlm.training.blind import BlindLoss, dealt
from vlm.training.parts import named_parts
from vlm.training.tracking import in_a_line, require_trackers


def entries_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- norms


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e6])
def test_norms_by_part(tmp_path, max_grad_norm):
    """Together the whole gradient's, clipped or not; of the weights, those after the step."""
    rates = {"projector": 1e-3, "language": 1e-4}
    made = tiny()
    trainer = trainer_of(tmp_path, rates, made=made, max_steps=2, logging_steps=2, max_grad_norm=max_grad_norm)
    logged = []
    trainer.log = lambda logs, *args: logged.append(dict(logs)) or type(trainer).log(trainer, logs, *args)
    seen = []
    clip = trainer._clip_grad_norm
    trainer._clip_grad_norm = lambda model: seen.append(by_hand(model)) or clip(model)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    for part, wanted in seen[-1].items():
        assert entry[f"grad_norm_{part}"] == pytest.approx(wanted, rel=1e-3)
    assert math.hypot(*seen[-1].values()) == pytest.approx(entry["grad_norm"], rel=1e-3)
    for part in rates:
        wanted = math.sqrt(
            sum(float(p.detach().double().square().sum()) for q, _, p in named_parts(made[0]) if q == part)
        )
        assert entry[f"param_norm_{part}"] == pytest.approx(wanted, rel=1e-5)
    assert not {"grad_norm_vision", "param_norm_vision"} & entry.keys(), "frozen"


def by_hand(model):
    found = {}
    for part, _, parameter in named_parts(model):
        if parameter.grad is not None:
            found[part] = found.get(part, 0.0) + float(parameter.grad.double().square().sum())
    return {part: math.sqrt(value) for part, value in found.items()}


# --- the blind loss


def test_images_are_dealt_to_other_examples_and_all_else_stays():
    _, processor = tiny()
    rows = rows_of(processor, examples(6), max_tokens=150)
    blind = dealt(rows)
    assert [len(row) for row in blind.rows] == [len(row) for row in rows.rows]
    before = [item for row in rows.rows for item in row]
    after = [item for row in blind.rows for item in row]
    assert [item.tree for item in before] == [item.tree for item in after]
    shown = {item.example.image_id: item.example.images for item in before}
    for old, new in zip(before, after, strict=True):
        assert new.example.images != old.example.images
        assert new.example.images in shown.values()
    assert len({id(item.example.images[0]) for item in after}) == 6, "each once"


def test_one_image_is_dealt_to_nobody():
    _, processor = tiny()
    assert dealt(rows_of(processor, examples(1))) is None


def evaluated(tmp_path, made):
    trainer = trainer_of(tmp_path, made=made, eval_data=examples(6), report_to="none")
    blind = BlindLoss(trainer, rows_of(made[1], examples(6), 150))
    trainer.measures = [blind]
    return trainer, blind


def test_a_model_that_does_not_look_is_warned_of(tmp_path, caplog):
    """Gates at zero: cross-attention lets nothing through."""
    trainer, blind = evaluated(tmp_path, tiny(fusion="cross_attention", gates=False))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            metrics = trainer.evaluate()
    assert metrics["eval_blind_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-6)
    assert caplog.text.count("the images make no difference") == 2
    assert not blind.seen


@pytest.mark.slow
def test_a_model_that_looks_is_asked_once(tmp_path, caplog):
    """One that learnt colours: with another image its answers are wrong."""
    colours = ["red", "lime", "blue", "white"]
    shown = [
        Example((Image.new("RGB", (32, 32), colour),), (question_and_answer("what", str(n)),), colour, colour)
        for n, colour in enumerate(colours)
    ]
    rates = {"projector": 1e-2, "language": 1e-2}
    made = tiny()
    trainer = trainer_of(tmp_path, rates, made=made, data=shown, eval_data=shown, max_steps=60, logging_steps=60)
    trainer.measures = [BlindLoss(trainer, rows_of(made[1], shown, 150))]
    trainer.train()
    with caplog.at_level(logging.WARNING):
        first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_blind_loss"] > 2 * first["eval_loss"]
    assert "eval_blind_loss" not in second
    assert "no difference" not in caplog.text


def test_what_is_measured_beside_draws_no_random_numbers_of_training(tmp_path):
    """A resumed run measures anew what an undisturbed one has done with; the dropout of the next step is the same."""
    trainer, blind = evaluated(tmp_path, tiny())
    states = []
    for seen in (False, True):
        torch.manual_seed(0)
        blind.seen = seen
        assert ("eval_blind_loss" in trainer.evaluate()) != seen
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# --- samples, the best checkpoint, early stopping: a run with all of them


@pytest.fixture(scope="module")
def shown(parts, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    values = recipe_values(parts, images, folder / "run")
    values["lora"]["learning_rate"] = values["trainable"]["projector"] = 3e-2
    values["train"] |= {
        "max_steps": 12,
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "early_stopping_patience": 1,
        "report_to": "tensorboard",
    }
    values["evaluation"]["samples"] = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_HOME", str(folder / "home"))
        said = train(values)
    return folder / "run", said


def test_samples_are_answered_and_scored_in_each_evaluation(shown):
    folder, _ = shown
    steps = [entry["step"] for entry in entries_of(folder) if "eval_loss" in entry]
    assert {path.name for path in (folder / "samples/train").iterdir()} == {f"step-{step}" for step in steps}
    for entry in (entry for entry in entries_of(folder) if "eval_loss" in entry):
        beside = folder / f"samples/train/step-{entry['step']}"
        rows = [json.loads(line) for line in (beside / "predictions.jsonl").read_text().splitlines()]
        assert len({row["image_id"] for row in rows}) == 2
        assert entry["eval_exact_match"] == sum(row["scores"]["exact_match"] for row in rows) / len(rows)
        assert "<html" in (beside / "samples.html").read_text()


def test_it_stops_when_the_loss_no_longer_falls_and_keeps_the_best(shown):
    folder, said = shown
    losses = {entry["step"]: entry["eval_loss"] for entry in entries_of(folder) if "eval_loss" in entry}
    last = max(losses)
    assert last < 12, "else nothing was stopped"
    assert losses[last] >= min(losses.values())
    best = min(losses, key=losses.get)
    assert best == last - 1
    state = json.loads((folder / f"checkpoints/train/checkpoint-{last}/trainer_state.json").read_text())
    assert state["best_global_step"] == best
    kept = load_file(folder / f"checkpoints/train/checkpoint-{best}/adapter_model.safetensors")
    saved = load_file(folder / "adapter/adapter_model.safetensors")
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[name], saved[name]) for name in kept)
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    ours = {name: value for name, value in kept.items() if "multi_modal_projector" in name}
    assert ours
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert any(key.endswith(name) and torch.equal(value, parameter) for key, value in ours.items()), name
    assert "done: " in said


def test_tensorboard_has_what_the_metrics_have(shown):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, _ = shown
    events = accumulator.EventAccumulator(str(folder / "tensorboard/train"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    wanted = {entry["step"]: entry["loss"] for entry in entries_of(folder) if "loss" in entry}
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_samples_change_no_step(values, tmp_path):
    """Neither random numbers nor the mode that layers are in, dropout among them."""
    for name, samples in (("without", 0), ("with", 2)):
        evaluation = values["evaluation"] | {"samples": samples}
        train(values | {"evaluation": evaluation, "output_dir": str(tmp_path / name)})
    losses = [
        [entry["loss"] for entry in entries_of(tmp_path / name) if "loss" in entry] for name in ("without", "with")
    ]
    assert losses[0] == losses[1]


# --- recipes and trackers


@pytest.mark.parametrize(
    ("train_section", "evaluation", "why"),
    [
        ({"early_stopping_patience": 2}, {}, "needs `eval_strategy`"),
        ({"early_stopping_threshold": 0.1}, {}, "has no effect without `early_stopping_patience`"),
        ({"early_stopping_patience": "2"}, {}, "must be a whole number"),
        (
            {"metric_for_best_model": "cider", "eval_strategy": "epoch"},
            {},
            "is not measured during training; known: loss",
        ),
        ({"metric_for_best_model": "eval_exact_match", "eval_strategy": "epoch"}, {}, "only with `evaluation.samples`"),
        ({}, {"samples": 4, "metrics": []}, "name `metrics`"),
        ({}, {"samples": 4}, "set `eval_strategy` in `train`"),
    ],
)
def test_recipes_that_cannot_work(values, train_section, evaluation, why):
    evaluation = values["evaluation"] | evaluation
    with pytest.raises(recipe.RecipeError, match=why):
        recipe.from_dict(values | {"train": train_section, "evaluation": evaluation})


def test_a_metric_of_samples_can_choose(values):
    section = {"metric_for_best_model": "exact_match", "eval_strategy": "epoch"}
    assert recipe.from_dict(values | {"train": section, "evaluation": {"metrics": ["exact_match"], "samples": 4}})


def test_what_transformers_refuses_is_said_in_its_words(values):
    section = {"optim": "sgd", "optim_args": "momentum"}
    with pytest.raises(UserError, match=r"train\.optim_args: 'momentum' cannot be used: not enough values to unpack"):
        train(values | {"train": section})


def test_trackers_are_looked_for_first(values, monkeypatch):
    with pytest.raises(UserError, match="there is no tracker 'tensorbord'; did you mean"):
        train(values | {"train": {"report_to": "tensorbord"}})
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb"):
        train(values | {"train": {"report_to": ["wandb"]}})
    require_trackers("none")
    require_trackers(None)


def test_every_tracker_of_transformers_can_be_looked_for():
    """It is installed or it is not; the name under which transformers knows that is not always the tracker's."""
    for name in integration_utils.INTEGRATION_TO_CALLBACK:
        with suppress(UserError):
            require_trackers(name)


def test_a_line_of_the_log():
    logs = {"loss": 2.34567, "grad_norm": 1.5, "answers_per_second": 12.345, "padding": 0.1, "learning_rate": 1e-3}
    assert in_a_line(logs) == "loss 2.346, grad_norm 1.5, 12.35 answers/s"
    assert in_a_line({"eval_loss": 2.0, "eval_runtime": 3.0, "eval_cider_d": 0.5}) == "eval_loss 2, eval_cider_d 0.5"
    assert in_a_line({"train_runtime": 3.0}) == ""
