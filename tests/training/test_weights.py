"""All weights of a checkpoint come back, whichever model: a resumed run, the best checkpoint, and a later stage."""

import copy
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback

from tests.dual_encoders import SAVE
from tests.stock import STOCK, stock
from tests.stock_prompted import PROMPTED
from tests.tiny import tiny
from tests.training.helpers import LORA, TRAIN, Killed, examples, kill_in, train, trainer_of, weights
from tests.training.test_stock_runs import save_images
from vlm import generation
from vlm.embedding import load_dual_encoder
from vlm.training.parts import add_lora, named_parts
from vlm.training.weights import WrongWeights, load_checkpoint

FAMILIES = [*STOCK, *PROMPTED]
KINDS = ["one file", "several files", "lora"]
FAST = [("gemma3", "several files"), ("blip-2", "lora")]
"""Renamed on the Hub, with tied weights; trained queries that peft leaves out."""
CASES = [
    pytest.param(name, kind, marks=() if (name, kind) in FAST else pytest.mark.slow)
    for name in [*FAMILIES, "qwen2"]
    for kind in KINDS
]


class Notes(TrainerCallback):
    """Notes the weights after each step, and a score that gets worse with each evaluation."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after[state.global_step] = weights(model)


def trainer_for(made, kind, folder, notes):
    """Four steps that train every part of a copy, a checkpoint every two; the best is that of step 2."""
    made = copy.deepcopy(made)
    rates = {part: 1e-2 for part, _, _ in named_parts(made[0])}
    if kind == "lora":
        rates = {part: rate for part, rate in rates.items() if part not in ("language", "vision")} | {"lora": 1e-2}
        made = (add_lora(made[0], LORA | {"lora_dropout": 0.3}, rates), made[1])
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": False}
    trainer = trainer_of(
        folder, rates, made=made, data=examples(6, 1), eval_data=examples(2, 1), callbacks=[notes], **options, **best
    )
    trainer.data_collator.plain = True
    trainer.measures.append(lambda loss: {"eval_score": trainer.state.global_step})
    return trainer


def equal(wanted, found):
    return wanted.keys() == found.keys() and all(torch.equal(value, found[key]) for key, value in wanted.items())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_resumed_run_and_the_best_model_have_all_weights(name, kind, tmp_path, monkeypatch):
    if kind == "several files":
        save = PreTrainedModel.save_pretrained
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *a, **k: save(*a, **k, max_shard_size="20KB"))
    whole, resumed = Notes(), Notes()
    made = stock(name) if name in FAMILIES else tiny(name)
    undisturbed = trainer_for(made, kind, tmp_path, whole)
    undisturbed.train()
    assert not equal(whole.after[2], whole.after[4])
    assert equal(weights(undisturbed.model), whole.after[2]), "the best is that of step 2"
    files = {path.name for path in (tmp_path / "checkpoint-2").glob("*model*.safetensors")}
    assert (len(files) > 1) == (kind == "several files")
    again = trainer_for(made, kind, tmp_path, resumed)
    with torch.no_grad():
        for _, _, parameter in named_parts(again.model):
            if kind != "lora" or parameter.requires_grad:
                parameter.add_(1.0)  # what remains of this did not come from the checkpoint
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.after.keys() == {3, 4}
    assert equal(whole.after[4], resumed.after[4])


@pytest.mark.parametrize("name", SAVE)
def test_dual_encoders_too(name, tmp_path):
    SAVE[name](tmp_path / "start")
    model, _ = load_dual_encoder(str(tmp_path / "start"))
    model.save_pretrained(tmp_path / "checkpoint-1", save_original_format=False)
    wanted = weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    load_checkpoint(model, tmp_path / "checkpoint-1")
    assert equal(wanted, weights(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_stage_that_was_stopped_goes_on_as_if_it_was_not(name, tmp_path, monkeypatch):
    """Its model is then read from the folder of the first stage, and its LoRA from the checkpoint."""
    for part in stock(name):
        part.save_pretrained(tmp_path / "start")
    images = save_images(tmp_path / "images")
    source = {"format": "image_folder", "path": str(images), "metadata": "captions.jsonl"}
    arguments = TRAIN | {"eval_strategy": "no", "max_steps": 3}
    values = {
        "name": name,
        "model": {"pretrained": str(tmp_path / "start")},
        "data": {"train": source, "max_tokens_per_row": 200},
        "stages": [
            {"name": "first", "trainable": {"language": 1e-2}, "train": arguments},
            {"name": "second", "lora": {"r": 4, "lora_alpha": 8, "learning_rate": 1e-2}, "train": arguments},
        ],
        "evaluation": {},
        "output_dir": str(tmp_path / "whole"),
    }
    train(values)
    values |= {"output_dir": str(tmp_path / "run")}
    with monkeypatch.context() as patch:
        kill_in(patch, "second", 3)
        with pytest.raises(Killed):
            train(values)
    train(values, resume=True)
    wanted, found = (weights(generation.load(str(tmp_path / run), device="cpu")[0]) for run in ("whole", "run"))
    start = weights(generation.load(str(tmp_path / "start"), device="cpu")[0])
    assert equal(wanted, found)
    assert not equal(start, found)


# --- refusals


def test_a_checkpoint_with_other_weights_is_refused_and_they_are_named(tmp_path):
    model, _ = tiny()
    before = weights(model)
    state = dict(before)
    state["model.multi_modal_projector.linear_9.weight"] = state.pop("model.multi_modal_projector.linear_1.weight")
    save_file(state, tmp_path / "model.safetensors")
    words = r"lacks .*projector\.linear_1\.weight, and has unknown model\.multi_modal_projector\.linear_9\.weight\."
    with pytest.raises(WrongWeights, match=words):
        load_checkpoint(model, tmp_path)
    state = {key: value[:1] if key.endswith("linear_1.bias") else value for key, value in before.items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WrongWeights, match=r"other shapes: .*projector\.linear_1\.bias \[1\] instead of"):
        load_checkpoint(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WrongWeights, match=r"model\.safetensors is missing"):
        load_checkpoint(model, tmp_path)
    assert equal(before, weights(model)), "a refused checkpoint changes nothing"


@pytest.mark.parametrize("tied", [False, True])
def test_of_tied_weights_one_is_enough(tmp_path, tied):
    model, _ = tiny(tie_word_embeddings=tied)
    state = {key: value for key, value in weights(model).items() if not key.endswith("lm_head.weight")}
    save_file(state, tmp_path / "model.safetensors")
    if tied:
        load_checkpoint(model, tmp_path)
    else:
        with pytest.raises(WrongWeights, match=r"lacks .*lm_head\.weight"):
            load_checkpoint(model, tmp_path)


@pytest.mark.few(1)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "loose_parameters.safetensors"])
def test_an_adapter_that_lacks_weights_is_refused(tmp_path, file):
    made = stock("blip-2")
    rates = {"projector": 1e-2, "lora": 1e-2}
    adapted = add_lora(made[0], LORA, rates)
    trainer = trainer_of(tmp_path, rates, made=(adapted, made[1]), data=examples(2, 1), save_strategy="epoch")
    trainer.data_collator.plain = True
    trainer.train()
    checkpoint = tmp_path / f"checkpoint-{trainer.state.global_step}"
    load_checkpoint(adapted, checkpoint)
    state = load_file(checkpoint / file)
    first = next(iter(state))
    save_file({key: value for key, value in state.items() if key != first} | {"x": torch.ones(1)}, checkpoint / file)
    with pytest.raises(WrongWeights, match=rf"lacks {re.escape(first)}, and has unknown x\."):
        load_checkpoint(adapted, checkpoint)


@pytest.mark.parametrize("name", ["llava", "ours"])
def test_checkpoints_with_the_names_of_the_hub_can_be_gone_on_from(name, tmp_path):
    """As they were saved before; only the loading of transformers knows both kinds of names."""
    model, _ = tiny() if name == "ours" else stock(name)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    wanted = weights(model)
    assert (names == wanted.keys()) == (name == "ours")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    load_checkpoint(model, tmp_path)
    assert equal(wanted, weights(model))
