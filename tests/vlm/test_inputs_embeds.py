"""Embeddings in place of ids, which prompt tuning and servers pass: the answers are those of the ids."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from tests.tiny import ALL_FUSIONS, encode, image, logits, tiny, user

MODELS = {
    **{fusion: {"fusion": fusion} for fusion in ALL_FUSIONS},
    "bidirectional": {"decoder": "gemma3", "image_attention": "bidirectional"},
    "tiles": {"tiling": {"type": "tiles", "max_tiles": 2}},
    "anyres": {"tiling": {"type": "anyres", "max_tiles": 2}},
}
ASKED = {
    "images": [[user(image(0), "what is it?")], [user("a dog", image(1), "and", image(2), "?")]],
    "text": [[user("what is it?")], [user("a dog")]],
}


def given(processor, asked):
    return dict(encode(processor, ASKED[asked]))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_ids(name, asked, beams):
    model, processor = tiny(**MODELS[name])
    inputs = given(processor, asked)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    wanted = model.generate(**inputs, **options)[:, -5:]
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, **options), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_ids(name):
    model, processor = tiny(**MODELS[name])
    inputs = given(processor, "images")
    wanted = logits(model, **inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    assert torch.equal(logits(model, inputs_embeds=embeds, **inputs), wanted)


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_prompt_tuning(fusion):
    """Its tokens are embeddings before the others, which alone are trained."""
    model, processor = tiny(fusion=fusion)
    inputs = given(processor, "images")
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = tuned(**inputs, labels=labels)
    found.loss.backward()
    [(name, prompt)] = [(name, p) for name, p in tuned.named_parameters() if p.requires_grad]
    assert prompt.grad.abs().max() > 0, name
    embeds = torch.cat([prompt.detach().expand(2, -1, -1), embeds], dim=1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), inputs["attention_mask"]], dim=1)
    wanted = logits(model, inputs_embeds=embeds, attention_mask=mask, pixel_values=inputs["pixel_values"])
    assert torch.allclose(found.logits, wanted, atol=1e-5)
