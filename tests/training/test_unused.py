"""Weights that no answer depends on, and batches without images on several processes."""

import pytest
import torch

from tests.stock import stock
from tests.tiny import clip_config, open_gates, tiny
from tests.training.helpers import LORA, examples, rows_of
from vlm.data.dataset import TreeCollator
from vlm.data.example import Example, question_and_answer
from vlm.training.inputs import training_inputs
from vlm.training.parts import add_lora, named_parts, set_trainable
from vlm.training.trainer import supervised_loss
from vlm.training.unused import blank_image_row, freeze_unread

CPU = torch.device("cpu")
EVERY_PART = {"projector": 1e-2, "vision": 1e-2, "language": 1e-2}
FUSIONS = {
    "prefix": {},
    "cross_attention": {"fusion": "cross_attention", "cross_attention_every": 2},
    "both": {"fusion": "prefix+cross_attention", "cross_attention_every": 2},
    "tiles": {"tiling": {"type": "tiles", "max_tiles": 4}},
}


def texts(count=2):
    return [
        Example((), (question_and_answer(f"why {n}", "a cat and a dog", num_images=0),), f"text {n}", f"text {n}")
        for n in range(count)
    ]


def loss_and_gradients(model, collator, rows):
    """By a backward pass, as a step takes it."""
    model.zero_grad()
    batch = collator(rows)
    labels = batch.pop("labels")
    loss = supervised_loss(model(**training_inputs(model.config, batch, labels)), labels)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def trainable(model, parts):
    return {name for part, name, parameter in named_parts(model) if part in parts and parameter.requires_grad}


@pytest.mark.parametrize("layer", [-2, -1, None, [-3, -2]])
def test_the_vision_weights_that_get_no_gradient_are_frozen(layer):
    model, processor = tiny(vision_feature_layer=layer)
    rows = rows_of(processor, examples(2))
    collator = TreeCollator(processor)
    set_trainable(model, EVERY_PART)
    _, gradients = loss_and_gradients(model, collator, [rows[0], rows[1]])
    before = trainable(model, {"vision"})
    without = {name for name in before if gradients[name] is None}
    count = freeze_unread(model, collator, rows.items, CPU)
    assert trainable(model, {"vision"}) == before - without
    assert count == sum(parameter.numel() for name, parameter in model.named_parameters() if name in without)
    last = f"encoder.layers.{clip_config().num_hidden_layers - 1}."
    frozen = {"last layer": any(last in name for name in without), "norm": any("post_layernorm" in n for n in without)}
    assert frozen == {"last layer": layer in (-2, [-3, -2]), "norm": True}, without
    assert trainable(model, {"projector", "language"}) == trainable(model, EVERY_PART) - trainable(model, {"vision"})


def test_lora_in_layers_after_the_one_that_is_read_is_frozen():
    model, processor = tiny(vision_feature_layer=-2)
    adapted = add_lora(model, LORA | {"parts": ["vision"]}, {"lora_vision": 1e-2})
    set_trainable(adapted, {"lora_vision": 1e-2})
    rows = rows_of(processor, examples(2))
    _, gradients = loss_and_gradients(adapted, TreeCollator(processor), [rows[0]])
    without = {name for name in trainable(adapted, {"lora_vision"}) if gradients[name] is None}
    assert without
    freeze_unread(adapted, TreeCollator(processor), rows.items, CPU)
    assert not without & trainable(adapted, {"lora_vision"})
    assert trainable(adapted, {"lora_vision"})


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2_5_vl", "internvl", "gemma3", "llava_next"])
def test_so_they_are_in_models_of_transformers(name):
    model, processor = stock(name)
    rows = rows_of(processor, examples(2))
    set_trainable(model, EVERY_PART)
    _, gradients = loss_and_gradients(model.train(), TreeCollator(processor, plain=True), [rows[0]])
    before = trainable(model, {"vision"})
    freeze_unread(model, TreeCollator(processor, plain=True), rows.items, CPU)
    assert trainable(model, {"vision"}) == {name for name in before if gradients[name] is not None}


@pytest.mark.few(2)
@pytest.mark.parametrize("name", [*FUSIONS, "llava", "qwen2_5_vl", "idefics3", "llava_next"])
def test_a_blank_image_row_runs_every_part_and_changes_nothing(name):
    """On a process whose batch has no images. Loss and gradients are those without the row."""
    model, processor = tiny(**FUSIONS[name]) if name in FUSIONS else stock(name)
    plain = name not in FUSIONS
    open_gates(model)
    model.requires_grad_(True)
    rows = rows_of(processor, [*examples(2), *texts()])
    text_rows = [row for row in rows.rows if not row[0].example.images]
    freeze_unread(model, TreeCollator(processor, plain=plain), rows.items, CPU)
    wanted_loss, wanted = loss_and_gradients(model, TreeCollator(processor, plain=plain), text_rows)
    blank = blank_image_row(rows.items)
    collator = TreeCollator(processor, plain=plain, blank=blank)
    loss, found = loss_and_gradients(model, collator, text_rows)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    for part, parameter_name, parameter in named_parts(model):
        gradient, before = found[parameter_name], wanted[parameter_name]
        if part != "language" and parameter.requires_grad:
            assert before is None, "without an image it is not run, and other processes would wait"
            assert gradient is not None, parameter_name
            assert not gradient.any(), parameter_name
        elif before is not None:
            torch.testing.assert_close(gradient, before, rtol=1e-4, atol=1e-6)
    with_images = [row for row in rows.rows if row[0].example.images]
    assert len(collator(with_images)["labels"]) == len(TreeCollator(processor, plain=plain)(with_images)["labels"])


def test_without_any_image_there_is_no_blank_row():
    _, processor = tiny()
    assert blank_image_row(rows_of(processor, texts()).items) is None
