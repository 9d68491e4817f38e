"""Frozen layers in half precision: the same numbers as autocast gives, and weights that come back untouched."""

import pytest
import torch
from torch import nn

from tests.tiny import encode, image, tiny, user
from tests.training import helpers
from vlm.precision import dtype_of, frozen_layers_in, generation_in_bfloat16
from vlm.training.parts import add_lora, set_trainable

LORA = helpers.LORA | {"r": 2, "lora_alpha": 4}


def loss_and_gradients(model, inputs):
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_losses_and_gradients_are_those_of_autocast_alone(tied, lora):
    model, processor = tiny(tie_word_embeddings=tied)
    inputs = encode(processor, [[user(image(), "what is in the image ?")]])
    rates = {"projector": 1e-3} | ({"lora": 1e-3} if lora else {})
    trained = add_lora(model, LORA, rates) if lora else model
    set_trainable(trained, rates)
    expected = loss_and_gradients(trained, inputs)
    weights = {name: (p.dtype, p.data_ptr()) for name, p in trained.named_parameters()}
    with frozen_layers_in(torch.bfloat16, trained):
        cast = [m for m in trained.modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.bfloat16]
        found = loss_and_gradients(trained, inputs)
    assert len(cast) >= 4 * 7  # those of four decoder layers alone
    assert all(not m.weight.requires_grad for m in cast)
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
    assert {name: (p.dtype, p.data_ptr()) for name, p in trained.named_parameters()} == weights


def test_weights_come_back_after_an_error():
    model, _ = tiny()
    model.requires_grad_(False)
    with pytest.raises(KeyError), frozen_layers_in(torch.bfloat16, model):
        raise KeyError
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_embedding_stays_as_it_is():
    model, _ = tiny(tie_word_embeddings=True)
    model.requires_grad_(False)
    with frozen_layers_in(torch.bfloat16, model):
        assert model.get_input_embeddings().weight.dtype == torch.float32
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_generation_computes_as_autocast_does():
    model, processor = tiny()
    model.requires_grad_(False)
    inputs = encode(processor, [[user(image(), "what is in the image ?")]])
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).logits
    with generation_in_bfloat16(model, True):
        assert torch.equal(model(**inputs).logits, expected)
    with generation_in_bfloat16(model, False):
        assert not torch.equal(model(**inputs).logits, expected)


def test_a_module_without_weights_computes_in_the_default_format():
    assert dtype_of(nn.GELU()) == torch.float32
    assert dtype_of(nn.Embedding(2, 2).to(torch.bfloat16)) == torch.bfloat16
    counter = nn.Module()
    counter.register_buffer("steps", torch.zeros(1, dtype=torch.long))
    assert dtype_of(counter) == torch.float32
