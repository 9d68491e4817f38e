"""Models that are loaded in 4 or 8 bits, as `from_pretrained(..., quantization_config=...)` loads any model."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BertConfig,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import vlm  # noqa: F401 - registers the Auto classes
from tests.dual_encoders import text_sizes
from tests.encoders import ENCODERS
from tests.tiny import ALL_FUSIONS, clip_config, encode, image, logits, small_projector, text_config, tiny, user
from vlm.adapters import PROJECTORS
from vlm.configuration import VLMConfig
from vlm.dual_encoder import DualEncoderConfig, DualEncoderModel
from vlm.encoder import encode as encode_image
from vlm.interop import from_stock
from vlm.modeling import VLMForConditionalGeneration

pytest.importorskip("bitsandbytes")
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

KINDS = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8bit": {"load_in_8bit": True}}
WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""As wide as the blocks of weights that bitsandbytes rounds together."""


def in_few_bits(folder, kind, dtype=torch.float32, skip=None, auto_class=AutoModelForImageTextToText):
    options = BitsAndBytesConfig(**KINDS[kind], llm_int8_skip_modules=skip)
    return auto_class.from_pretrained(folder, quantization_config=options, dtype=dtype).eval()


@torch.no_grad()
def rounded(model, quantized):
    """Bring the weights of `model` to those that `quantized` computes with; give the names of those that changed."""
    names = []
    for name, module in quantized.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            weight = dequantize_bnb_weight(module.weight, getattr(module, "state", None))
            model.get_submodule(name).weight.copy_(weight)
            names.append(name)
    return names


def away(found, wanted):
    return ((found.float() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_llava_of_transformers_with_the_same_layers_quantized(kind, tmp_path):
    torch.manual_seed(0)
    _, processor = tiny()
    config = LlavaConfig(
        vision_config=clip_config(**WIDE),
        text_config=text_config(**WIDE),
        image_token_id=processor.image_token_id,
        image_seq_length=16,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    llava.save_pretrained(tmp_path / "llava")
    from_stock(llava).save_pretrained(tmp_path / "ours")
    inputs = encode(processor, [[user(image(0), "what is it?")], [user(image(1), "what")]])
    skip = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    wanted = logits(in_few_bits(tmp_path / "llava", kind, skip=skip), **inputs)
    found = logits(in_few_bits(tmp_path / "ours", kind), **inputs)
    assert away(found, wanted) < 1e-5
    assert away(found, logits(llava, **inputs)) > 1e-3


BRIDGES = {
    **{name: {"projector": small_projector(name)} for name in PROJECTORS},
    **{name: {"fusion": name} for name in ALL_FUSIONS},
    "tiles": {"fusion": "cross_attention", "tiling": {"type": "tiles", "max_tiles": 2}},
    "anyres": {"tiling": {"type": "anyres", "max_tiles": 2}},
}


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bridge", BRIDGES)
def test_computes_with_the_rounded_weights_of_the_decoder(bridge, dtype, tmp_path):
    """Against the unquantized model with those weights."""
    widths = {"text": text_config(**WIDE, initializer_range=0.05), "vision_config": clip_config(**WIDE)}
    model, processor = tiny(**widths, **BRIDGES[bridge])
    model.save_pretrained(tmp_path)
    quantized = in_few_bits(tmp_path, "nf4", dtype)
    names = rounded(model, quantized)
    assert names
    assert all(name.startswith("model.language_model.") for name in names)
    inputs = encode(processor, [[user(image(1), "what is it?")], [user(image(2), "what")]])
    # The kernel for CPUs computes in bfloat16.
    assert away(logits(quantized, **inputs), logits(model, **inputs)) < 0.02


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_compute_as_they_do_unquantized(name, kind, tmp_path):
    case = ENCODERS[name]
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, case.side, case.side)
    with torch.no_grad():
        width = encode_image(AutoModel.from_config(case.config).eval(), pixels).patches.shape[-1]
        widths = {"text_config": text_config(), "vision_hidden_size": width}
        config = VLMConfig(vision_config=case.config, fusion="cross_attention", **widths)
        model = VLMForConditionalGeneration(config).eval()
        model.save_pretrained(tmp_path)
        wanted = torch.stack(model.get_image_features(pixels).pooler_output)
        found = torch.stack(in_few_bits(tmp_path, kind).get_image_features(pixels).pooler_output)
        assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dual_encoder(kind, tmp_path):
    torch.manual_seed(0)
    config = DualEncoderConfig(
        vision_config=ENCODERS["timm_eva"].config,
        text_config=BertConfig(**text_sizes() | WIDE),
        vision_pooled_size=32,
        projection_dim=16,
    )
    model = DualEncoderModel(config).eval()
    model.save_pretrained(tmp_path)
    quantized = in_few_bits(tmp_path, kind, torch.float16, auto_class=AutoModel)
    names = rounded(model, quantized)
    assert all(name.startswith("text_model.") for name in names)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad():
        found, wanted = quantized(**inputs), model(**inputs)
    assert away(found.image_embeds, wanted.image_embeds) < 1e-5
    assert away(found.text_embeds, wanted.text_embeds) < 0.03
