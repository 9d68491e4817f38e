"""QLoRA: a language model in 4 or 8 bits under a bridge in full precision, and whole again when it is saved."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from tests.tiny import FUSIONS, causal_lm, encode, image, text_config, tiny, user
from tests.training.helpers import LORA, Killed, kill_in, save_parts, staged, train, weights
from vlm import generation, recipe
from vlm.errors import UserError
from vlm.training import folder
from vlm.training.parts import add_lora, part_of, set_trainable
from vlm.training.quantization import is_quantized, merged, quantize

bnb = pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}


def inputs_of(processor):
    return encode(processor, [[user(image(1), "what is it?")], [user(image(2), "what")]])


def wide(fusion="prefix"):
    """Layers as wide as a block of weights, or twice."""
    return tiny(fusion=fusion, text=text_config(hidden_size=64, intermediate_size=128))


def quantized(kind, **options):
    model, processor = wide(**options)
    quantize(model, BitsAndBytesConfig(**KINDS[kind]), CPU)
    return model, processor


def close(found, wanted, kind):
    """In 8 bits the inputs of each layer are rounded too."""
    return (found - wanted).norm() < (0.05 if kind == "8bit" else 1e-5) * wanted.norm()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=128)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_layers_of_the_language_model_are_quantized_and_nothing_else(fusion):
    before = weights(wide(fusion)[0])
    model, _ = quantized("nf4", fusion=fusion)
    small = {name for name, p in model.named_parameters() if isinstance(p, bnb.nn.Params4bit)}
    linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    wanted = {
        name
        for name in before
        if part_of(name) == "language" and name.split(".")[-2] in linear and name.endswith("weight")
    }
    assert small == wanted
    assert len(small) == 4 * 7
    for name, parameter in model.named_parameters():
        if name not in small:
            assert torch.equal(parameter, before[name]), name


def test_a_name_to_skip_that_no_layer_has_is_refused():
    with pytest.raises(UserError, match=r"llm_int8_skip_modules.*no layer 'down_prj'; did you mean 'down_proj'"):
        quantize(wide()[0], BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["down_prj"]), CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_it_holds_what_it_computed_with(kind):
    """Against bitsandbytes' own quantization of the same weights, and the logits of the quantized model."""
    model, processor = quantized(kind)
    inputs = inputs_of(processor)
    with torch.no_grad():
        wanted = model(**inputs).logits
    whole = merged(model)
    assert not is_quantized(whole)
    name = "model.language_model.layers.2.mlp.up_proj"
    original = wide()[0].get_submodule(name).weight.detach()
    rounded = whole.get_submodule(name).weight.detach()
    if kind == "nf4":
        expected = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(original, quant_type="nf4"))
        assert torch.equal(rounded, expected)
    error = (rounded - original).norm() / original.norm()
    assert 0 < error < (0.02 if kind == "8bit" else 0.15)
    with torch.no_grad():
        found = whole(**inputs).logits
    assert close(found, wanted, kind)


@pytest.mark.parametrize("kind", ["nf4", "8bit"])
def test_lora_merges_into_the_dequantized_weights(kind):
    model, processor = quantized(kind)
    trained = add_lora(model, LORA, {"projector": 1.0, "lora": 1.0})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            elif "modules_to_save" in name:
                parameter += 0.1
    layer = trained.base_model.model.model.language_model.layers[1].mlp.down_proj
    delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha / r = 2
    trained.eval()
    inputs = inputs_of(processor)
    with torch.no_grad():
        wanted = trained(**inputs).logits
    plain = merged(quantized(kind)[0])
    whole = merged(trained)
    name = "model.language_model.layers.1.mlp.down_proj"
    assert torch.allclose(whole.get_submodule(name).weight, plain.get_submodule(name).weight + delta, atol=1e-6)
    assert not any("lora" in name or "modules_to_save" in name for name, _ in whole.named_parameters())
    with torch.no_grad():
        found = whole(**inputs).logits
        without = plain(**inputs).logits
    assert not torch.allclose(without, wanted, atol=0.1)
    assert close(found, wanted, kind)


def test_gradients_reach_the_projector_through_quantized_layers():
    """Those of a model that holds the same rounded weights in float32."""
    gradients = []
    for whole in (False, True):
        model, processor = quantized("nf4")
        model = merged(model) if whole else model
        set_trainable(model, {"projector": 1.0})
        inputs = inputs_of(processor)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    for found, wanted in zip(*gradients, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


def test_names_of_layers_can_be_left_out():
    model, _ = wide()
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["down_proj"])
    assert quantize(model, config, CPU) == (4 * 6, 4 * 7)


def test_widths_that_bitsandbytes_gets_wrong_on_a_cpu_are_left_out():
    model, _ = tiny(text=text_config(hidden_size=64, intermediate_size=96))
    assert quantize(model, BitsAndBytesConfig(load_in_4bit=True), CPU) == (4 * 6, 4 * 7)
    assert quantize(tiny()[0], BitsAndBytesConfig(load_in_8bit=True), CPU) == (4 * 7, 4 * 7)
    with pytest.raises(UserError, match="on a CPU their width has to be a multiple of 64"):
        quantize(tiny()[0], BitsAndBytesConfig(load_in_4bit=True), CPU)


def test_a_language_model_without_linear_layers_is_refused():
    model, _ = tiny("gpt2")
    with pytest.raises(UserError, match="no linear layers that can be quantized"):
        quantize(model, BitsAndBytesConfig(load_in_4bit=True), CPU)


@pytest.mark.parametrize("kind", ["nf4", pytest.param("8bit", marks=pytest.mark.slow)])
def test_a_run_leaves_a_model_like_any_other(values, tmp_path, monkeypatch, kind):
    kept, save = [], folder.save_model
    monkeypatch.setattr(folder, "save_model", lambda model, *rest: (kept.append(model), save(model, *rest)))
    said = train(values | {"model": values["model"] | {"quantization_config": KINDS[kind]}})
    assert f"quantized: 28 of 28 linear layers of the language model in {8 if kind == '8bit' else 4} bits" in said
    assert "as the float32 numbers" in said
    language, projector = (
        next(line.split()[1] for line in said.splitlines() if line.startswith(name))
        for name in ("language", "projector")
    )
    whole, _ = generation.load(str(tmp_path / "run"), device="cpu")
    assert language == f"{sum(p.numel() for p in causal_lm(whole).parameters()):,}"
    assert projector == f"{sum(p.numel() for p in whole.model.multi_modal_projector.parameters()):,}"
    assert "no trees" not in said
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run/model").eval()
    assert "quantization_config" not in json.loads((tmp_path / "run/model/config.json").read_text())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    _, processor = generation.load(str(tmp_path / "run"), device="cpu")
    inputs = inputs_of(processor)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, kept[0].cpu().eval()(**inputs).logits)
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_stages_and_a_pretrained_model(values, tmp_path):
    """The projector alone through a quantized model, then LoRA; and a run that starts from that run's model."""
    config = {"quantization_config": {"load_in_4bit": True}}
    train(staged(values | {"model": values["model"] | config}))
    start = {"model": {"pretrained": str(tmp_path / "run")} | config, "output_dir": str(tmp_path / "next")}
    said = train(values | start | {"evaluation": {}})
    assert "quantized: 28 of 28 linear layers" in said


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False])
def test_a_resumed_run_ends_as_an_uninterrupted_one(values, tmp_path, monkeypatch, lora):
    values |= {"model": values["model"] | {"quantization_config": {"load_in_4bit": True}}, "evaluation": {}}
    values |= {} if lora else {"lora": None}
    train(values | {"output_dir": str(tmp_path / "whole")})
    with monkeypatch.context() as patch:
        kill_in(patch, "train", 3)
        with pytest.raises(Killed):
            train(values)
    train(values, resume=True)
    models = [generation.load(str(tmp_path / name), device="cpu")[0] for name in ("whole", "run")]
    for (name, p), (_, q) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({}, "set either this or `load_in_8bit` to true"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "set either this or"),
        ({"load_in_4bit": True, "bnb_4bit_qant_type": "nf4"}, "bnb_4bit_quant_type"),
    ],
)
def test_contradictions_are_found_before_anything_is_loaded(values, section, why):
    with pytest.raises(recipe.RecipeError, match=why):
        recipe.from_dict(values | {"model": values["model"] | {"quantization_config": section}})


def test_quantized_weights_are_not_trained_whole(values):
    model = values["model"] | {"quantization_config": {"load_in_4bit": True}}
    with pytest.raises(recipe.RecipeError, match="weights in 4 or 8 bits cannot learn"):
        recipe.from_dict(values | {"model": model, "lora": None, "trainable": {"language": 1e-4}})


def test_the_first_steps_without_bitsandbytes_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'vlm-bridge\[quantization\]'"):
        quantize(wide()[0], BitsAndBytesConfig(load_in_4bit=True), CPU)
