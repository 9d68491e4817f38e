"""What training takes: counted by hand, tried out, and made smaller until it fits."""

import json

import pytest
import torch
from transformers import BitsAndBytesConfig

from tests.stock import stock
from tests.tiny import text_config, tiny
from tests.training.helpers import LORA, TRAIN, train, trainer_of, weights
from vlm.errors import UserError
from vlm.training import memory
from vlm.training.parts import add_lora
from vlm.training.quantization import quantize
from vlm.training.trainer import VLMTrainer

RATES = {"projector": 1e-3, "lora": 1e-3}


def with_lora(quantized=False):
    made = tiny(text=text_config(hidden_size=64, intermediate_size=128))
    if quantized:
        quantize(made[0], BitsAndBytesConfig(load_in_4bit=True), torch.device("cpu"))
    return add_lora(made[0], LORA, RATES), made[1]


@pytest.mark.parametrize(("optim", "each"), [("adamw_torch", 8), ("sgd", 0), ("adafactor", 2 / 256 * 4)])
def test_what_is_known_before(tmp_path, optim, each):
    """float32 weights and gradients of what learns, and Adam's two moments; Adafactor keeps rows and columns."""
    trainer = trainer_of(tmp_path, RATES, made=with_lora(), optim=optim)
    found = memory.estimate(trainer, trainer.train_dataset)
    learning = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in trainer.model.parameters()) * 4 + sum(
        buffer.nbytes for buffer in trainer.model.buffers()
    )
    assert 0 < learning < everything / 8
    assert found.gradients == 4 * learning
    assert found.optimizer == pytest.approx(each * learning, rel=1e-3, abs=2)
    assert found.weights == pytest.approx(everything, rel=0.01), "storages are a little larger than what is in them"


def estimate_of(tmp_path, made):
    trainer = trainer_of(tmp_path, RATES, made=made)
    return memory.estimate(trainer, trainer.train_dataset)


def test_quantized_weights_take_half_a_byte(tmp_path):
    plain, small = (estimate_of(tmp_path, with_lora(q)) for q in (False, True))
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    scales = layer // 64 * 4
    codes = 7 * 16 * 4
    assert plain.weights - small.weights == 4 * (4 * layer - layer // 2 - scales - codes)
    assert small.gradients == plain.gradients


class Held(torch.autograd.Function):
    """Keeps 200 MB from the forward to the backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.ones(50_000_000, device=x.device))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        assert ctx.saved_tensors
        return grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_tried_out(tmp_path, checkpointing):
    """Those of a layer that is computed again in the backward pass are there once, not for each layer."""
    made = tiny()
    layers = made[0].model.language_model.layers[:2]
    for layer in layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: Held.apply(output))
    trainer = trainer_of(tmp_path, made=made, activation_checkpointing=checkpointing)
    before = weights(made[0])
    found = memory.estimate(trainer, trainer.train_dataset).activations
    assert found == pytest.approx(200e6 if checkpointing else 400e6, rel=0.2)
    assert all(torch.equal(value, before[name]) for name, value in weights(made[0]).items())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in made[0].modules())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["ours", "llava"])
@pytest.mark.few(2)
def test_a_frozen_encoder_is_not_gone_back_through(tmp_path, name, reentrant):
    """Reentrant checkpointing cannot do without: its layers want an input that requires a gradient."""
    model, processor = tiny() if name == "ours" else stock("llava")
    made = add_lora(model, LORA, RATES), processor
    seen = []
    encoder = model.model.vision_tower
    encoder.register_forward_hook(lambda module, inputs, output: seen.append(output.last_hidden_state.requires_grad))
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = trainer_of(tmp_path, RATES, made=made, **options)
    memory.estimate(trainer, trainer.train_dataset)
    trainer.train()
    assert set(seen) == {reentrant}


def no_room_for(monkeypatch, tokens):
    """Batches of more token places than that do not fit."""
    compute_loss = VLMTrainer.compute_loss
    tried = []

    def limited(self, model, inputs, *args, **kwargs):
        tried.append(len(inputs["input_ids"]))
        if inputs["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "compute_loss", limited)
    return tried


def test_a_batch_that_does_not_fit_is_said_with_what_to_do(values, tmp_path, monkeypatch):
    no_room_for(monkeypatch, 500)
    values["train"]["per_device_train_batch_size"] = 4
    with pytest.raises(UserError, match=r"batch of the 4 longest rows .*auto_find_batch_size: true"):
        train(values)


@pytest.mark.slow
def test_the_batch_size_is_found_before_training(values, tmp_path, monkeypatch):
    tried = no_room_for(monkeypatch, 200)
    values["data"]["max_tokens_per_row"] = 1
    values["train"] |= {"per_device_train_batch_size": 4, "auto_find_batch_size": True, "eval_strategy": "no"}
    train(values | {"evaluation": {}})
    assert 4 in tried
    assert set(tried[tried.index(4) + 1 :]) <= {1, 2, 3}, "nine tenths each time"
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_batch_size_is_found_again_where_training_takes_more(values, tmp_path, monkeypatch):
    """The first step does not fit, though the trial did: training begins anew with smaller batches."""
    step, sizes = VLMTrainer.training_step, []

    def limited(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "training_step", limited)
    values["train"] |= {"per_device_train_batch_size": 2, "auto_find_batch_size": True}
    train(values | {"evaluation": {}})
    assert sizes == [2, 1, 1, 1, 1]
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [2, 4]


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_by_both_of_its_names(values, name, tmp_path, recwarn):
    from vlm import recipe
    from vlm.training.arguments import training_arguments

    values["train"] = TRAIN | {name: True, f"{name}_kwargs": {"every_n_layers": 2}}
    made = recipe.from_dict(values)
    args = training_arguments(made, made.stages[0], tmp_path)
    assert args.activation_checkpointing
    assert args.activation_checkpointing_kwargs == {"every_n_layers": 2}
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


def test_the_table_and_the_end_say_it(values):
    said = " ".join(train(values | {"evaluation": {}}).split())
    assert "GB: weights" in said
    assert "GB at most, and" in said
