"""Any encoder with any bridge and any decoder: what every combination has to do.

`python -m benchmarks.combinations` runs all of them, the slow ones too, and makes a table of it.
"""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.encoders import CALLED, ENCODERS
from tests.tiny import (
    byte_level_tokenizer,
    continuation,
    encode,
    image,
    image_processor,
    logits,
    open_gates,
    small_projector,
    text_config,
    user,
)
from vlm.adapters import PROJECTORS
from vlm.build import assemble
from vlm.encoder import encode as features

BRIDGES = {name: {"projector": small_projector(name)} for name in PROJECTORS} | {
    "cross_attention": {
        "projector": small_projector("resampler"),
        "fusion": "cross_attention",
        "cross_attention_every": 2,
    },
    "cross_attention_layers": {"projector": "linear", "fusion": "cross_attention", "cross_attention_layers": [1, 4]},
    "prefix+cross_attention": {"projector": "mlp", "fusion": "prefix+cross_attention", "cross_attention_every": 2},
}
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "granite", "cohere")
EVERY = [(e, b, d) for e in ENCODERS for b in BRIDGES for d in DECODERS]


def some():
    """Each encoder, each bridge and each decoder several times."""
    return {(e, list(BRIDGES)[i % len(BRIDGES)], DECODERS[i % len(DECODERS)]) for i, e in enumerate(ENCODERS)}


@torch.no_grad()
def count_statistics(tower, side):
    """Of batch norm: random weights without them let nothing through."""
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    features(tower.train(), torch.rand(8, 3, side, side))
    tower.eval()


def joined(encoder, bridge, decoder):
    torch.manual_seed(0)
    case = ENCODERS[encoder]
    tower = AutoModel.from_config(case.config)
    count_statistics(tower, case.side)
    model, processor = assemble(
        tower,
        AutoModelForCausalLM.from_config(text_config(decoder)),
        image_processor(case.side),
        byte_level_tokenizer(),
        **BRIDGES[bridge],
    )
    open_gates(model)
    return model.eval(), processor


CONVERSATIONS = [
    [user(image(0), "what is it")],
    [user("a cat and", image(1), "a dog, then", image(2), "what is in the image ?")],
]


@pytest.mark.parametrize(
    ("encoder", "bridge", "decoder"),
    [pytest.param(*each, marks=() if each in some() else pytest.mark.slow) for each in EVERY],
)
@pytest.mark.few(16)
def test_any_encoder_any_bridge_any_decoder(encoder, bridge, decoder, tmp_path, record_property):
    """A padded batch says what its rows say alone, and with a cache what it says without; images matter; gradients
    reach every part; saved and loaded it is the same."""
    model, processor = joined(encoder, bridge, decoder)
    batch = encode(processor, CONVERSATIONS)
    together = continuation(model, batch, 4)
    assert together == continuation(model, batch, 4, use_cache=False)
    assert together == [continuation(model, encode(processor, [one]), 4)[0] for one in CONVERSATIONS]

    said = logits(model, **batch)
    others = batch["pixel_values"].flip(0)
    assert not torch.allclose(logits(model, **{**batch, "pixel_values": others}), said, atol=1e-6)

    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(again, **batch), said, atol=1e-4)

    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    parts = ["vision_tower", "multi_modal_projector", "language_model"]
    if "cross_attention" in bridge:
        parts.append("cross_attention.k_proj")
    for part in parts:
        assert any(part in name for name in learning), part
    record_property("combination", (CALLED[encoder.removeprefix("timm_")], bridge, decoder))
