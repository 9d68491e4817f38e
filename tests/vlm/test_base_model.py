"""The model without output head, the head of any causal language model, and folders with older names."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    BloomConfig,
    FalconConfig,
    Gemma4TextConfig,
    GPTNeoXConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
)

from tests.tiny import (
    ALL_FUSIONS,
    CONFIGS,
    VOCABULARY,
    causal_lm,
    clip_config,
    encode,
    image,
    language_weights,
    logits,
    small_projector,
    text_config,
    tiny,
    user,
    with_older_names,
)
from vlm.base_model import VLMModel
from vlm.modeling import VLMForConditionalGeneration
from vlm.older_adapters import present_adapter

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
HEADS = {
    **{name: text_config(name) for name in (*CONFIGS, "gpt2")},
    "bloom": BloomConfig(**SMALL, n_head=4),
    "falcon": FalconConfig(**SMALL, num_attention_heads=4),
    "gpt_neox": GPTNeoXConfig(**SMALL, num_attention_heads=4, intermediate_size=48),  # its head is embed_out
    "mamba": MambaConfig(**SMALL, state_size=4),
    "opt": OPTConfig(**SMALL, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32),  # calls model.decoder
    "mixtral": MixtralConfig(  # its loss has a part of the router's
        **SMALL, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, num_local_experts=4,
        output_router_logits=True, router_aux_loss_coef=0.5,
    ),
    "gemma4": Gemma4TextConfig(  # looks at the shape of its embeddings
        **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=48,
        hidden_size_per_layer_input=0, layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip
HEADS["gemma2"].final_logit_softcapping, HEADS["granite"].logits_scaling, HEADS["cohere"].logit_scale = 2.0, 3.0, 0.5


def inputs_of(processor):
    return dict(encode(processor, [[user(image(0), "what is it")], [user("a cat and", image(1), "a dog")]]))


# --- the head


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_that_of_the_causal_language_model(name):
    """Logits and loss of a text equal those of the causal language model, for all tokens and for some."""
    model, processor = tiny(text=HEADS[name])
    alone = causal_lm(model)
    ids = encode(processor, [[user("what is it")], [user("what is in the image")]])
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    with torch.no_grad():
        found, wanted = model(**ids, labels=labels), alone(**ids, labels=labels)
        assert torch.equal(found.logits, wanted.logits)
        assert torch.equal(found.loss, wanted.loss)
        kept = torch.tensor([1, 3])
        assert torch.equal(model(**ids, logits_to_keep=kept).logits, wanted.logits[:, kept])


def test_the_loss_has_the_part_of_the_router():
    """As a check of the test above: without it, the loss is another one."""
    model, processor = tiny(text=HEADS["mixtral"])
    ids = encode(processor, [[user("what is it")]])
    with torch.no_grad():
        whole = model(**ids, labels=ids["input_ids"]).loss
        assert whole - model(**ids, labels=ids["input_ids"], output_router_logits=False).loss > 0.1


def test_an_output_layer_that_was_replaced_is_used():
    model, processor = tiny()
    inputs = inputs_of(processor)
    before = logits(model, **inputs)
    new = torch.nn.Linear(32, model.lm_head.out_features, bias=False)
    new.weight.data = -model.lm_head.weight.data
    model.set_output_embeddings(new)
    assert model.get_output_embeddings() is model.lm_head is new
    assert torch.equal(logits(model, **inputs), -before)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_resizing_goes_through_to_loss_and_ties(name, tied):
    text = HEADS[name].__class__(**{**HEADS[name].to_dict(), "tie_word_embeddings": tied})
    model, processor = tiny(text=text)
    size = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(size + 8)
    assert len(model.get_output_embeddings().weight) == len(model.get_input_embeddings().weight) == size + 8
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    ids = encode(processor, [[user("what is it")]])
    with torch.no_grad():
        found = model(**ids, labels=ids["input_ids"])
    assert found.logits.shape[-1] == size + 8
    assert found.loss.isfinite()


# --- the base model


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
def test_auto_classes_load_the_model_and_its_base(fusion, tmp_path):
    model, processor = tiny(fusion=fusion)
    model.save_pretrained(tmp_path)
    inputs = inputs_of(processor)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        again = auto.from_pretrained(tmp_path).eval()
        assert type(again) is VLMForConditionalGeneration
        assert torch.equal(logits(again, **inputs), logits(model, **inputs))
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert type(base) is VLMModel is type(model.base_model)
    with torch.no_grad():
        found = base(**inputs, output_hidden_states=True)
        assert torch.equal(model.lm_head(found.last_hidden_state), logits(model, **inputs))
    assert found.last_hidden_state.shape == (*inputs["input_ids"].shape, 32)
    assert len(found.hidden_states) == 5
    assert len(found.image_hidden_states) == 2
    assert (found.vision_states is None) == (fusion == "prefix")


def test_weights_have_the_names_of_llava():
    model, _ = tiny(vision_feature_layer=-2)
    config = LlavaConfig(vision_config=clip_config(), text_config=text_config())
    stock = LlavaForConditionalGeneration(config).state_dict().keys()
    standardize = {f"model.multi_modal_projector.standardize.{name}" for name in ("mean", "std")}
    assert model.state_dict().keys() == stock | standardize


def test_the_base_model_saved_by_itself_is_loaded_by_both(tmp_path):
    model, processor = tiny()
    model.model.save_pretrained(tmp_path)
    inputs = inputs_of(processor)
    again = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = model.model(**inputs).last_hidden_state
        assert torch.equal(again(**inputs).last_hidden_state, wanted)
        whole, info = VLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert info["missing_keys"] == {"lm_head.weight"}
        assert torch.equal(whole.eval().model(**inputs).last_hidden_state, wanted)


# --- folders with older names

OLDER = {
    **{fusion: {"fusion": fusion} for fusion in ALL_FUSIONS},
    "tied": {"tie_word_embeddings": True},
    "gpt2": {"decoder": "gpt2", "fusion": "cross_attention"},
    "gpt_neox": {"text": HEADS["gpt_neox"]},
    "opt": {"text": HEADS["opt"]},
    "gemma3": {"decoder": "gemma3"},
    "qformer": {"projector": small_projector("qformer")},
    "tiles": {"fusion": "cross_attention", "tiling": {"type": "tiles", "max_tiles": 2}},
    "anyres": {"tiling": {"type": "anyres", "max_tiles": 2}},
}


@pytest.mark.parametrize("case", OLDER)
def test_folders_with_older_names_load(case, tmp_path):
    model, processor = tiny(**OLDER[case])
    inputs = inputs_of(processor)
    model.save_pretrained(tmp_path)
    older = with_older_names(model, load_file(tmp_path / "model.safetensors"))
    assert not older.keys() & model.state_dict().keys()
    save_file(older, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again.eval(), **inputs), logits(model, **inputs))
    base = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = model.model(**inputs).last_hidden_state
        assert torch.equal(base(**inputs).last_hidden_state, wanted)
    again.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() <= model.state_dict().keys()


def test_weights_of_older_names_are_those_of_the_causal_language_model():
    """The names that the test above writes are those that a language model has by itself."""
    model, _ = tiny(text=HEADS["gpt_neox"])
    older = with_older_names(model, model.state_dict())
    alone = AutoModelForCausalLM.from_config(model.config.text_config).state_dict().keys()
    inner = {name.removeprefix("language_model.") for name in older if name.startswith("language_model.")}
    assert inner == alone == language_weights(model).keys()


def test_adapters_with_older_names_load(tmp_path):
    model, processor = tiny(fusion="prefix+cross_attention")
    names = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    config = LoraConfig(r=2, target_modules=names, modules_to_save=["model.multi_modal_projector"])
    trained = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    inputs = inputs_of(processor)
    wanted = logits(trained, **inputs)
    trained.save_pretrained(tmp_path)
    prefix = "base_model.model."
    saved = load_file(tmp_path / "adapter_model.safetensors")
    older = with_older_names(model, {name.removeprefix(prefix): value for name, value in saved.items()})
    older = {prefix + name: value for name, value in older.items()}
    save_file(older, tmp_path / "adapter_model.safetensors")
    config.target_modules = [*with_older_names(model, dict.fromkeys(names))]
    config.modules_to_save = ["multi_modal_projector"]
    config.save_pretrained(tmp_path)
    base, _ = tiny(fusion="prefix+cross_attention")
    with present_adapter(tmp_path, base) as folder:
        again = PeftModel.from_pretrained(base, folder).eval()
    assert (logits(tiny(fusion="prefix+cross_attention")[0], **inputs) - wanted).abs().max() > 0.01
    assert torch.equal(logits(again, **inputs), wanted)
