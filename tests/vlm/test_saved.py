"""A model is the same when it is saved and loaded, whatever it consists of."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    ResNetConfig,
    SwinConfig,
    TimmWrapperConfig,
    pipeline,
)

import vlm  # noqa: F401 - registers the Auto classes
from tests.tiny import (
    ALL_FUSIONS,
    DECODERS,
    encode,
    image,
    logits,
    small_projector,
    tiny,
    user,
)
from vlm.adapters import PROJECTORS
from vlm.configuration import VLMConfig
from vlm.modeling import VLMForConditionalGeneration


def batch(processor, *conversations):
    return encode(processor, [[user(*parts)] for parts in conversations])


def same_after_saving(model, processor, folder):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    again, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(AutoConfig.from_pretrained(folder), VLMConfig)
    loaded = AutoProcessor.from_pretrained(folder)
    conversations = (image(0), "what is it"), ("a cat", image(1), image(2))
    inputs = batch(processor, *conversations)
    for name, value in batch(loaded, *conversations).items():
        assert torch.equal(value, inputs[name]), name
    assert torch.equal(logits(again.eval(), **inputs), logits(model, **inputs))
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    return again, loaded


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders_and_fusions_are_the_same_when_loaded(decoder, fusion, tmp_path):
    same_after_saving(*tiny(decoder, fusion), tmp_path)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_projectors_are_the_same_when_loaded(projector, tmp_path):
    spec = small_projector(projector)
    model, processor = tiny(fusion="prefix+cross_attention", projector=spec)
    again, _ = same_after_saving(model, processor, tmp_path)
    assert again.config.projector == spec


VIT_IN_TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}


@pytest.mark.parametrize("feature_layer", [None, -2, [-2, -2]])
@pytest.mark.parametrize(
    "vision_config",
    [
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
        SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
        TimmWrapperConfig(architecture="resnet18", model_args={"channels": [8, 8, 16, 24]}),
        TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=VIT_IN_TIMM),
    ],
    ids=["resnet", "swin", "timm_resnet", "timm_vit"],
)
def test_encoders_are_the_same_when_loaded(vision_config, feature_layer, tmp_path):
    model, processor = tiny(vision_config=vision_config, vision_feature_layer=feature_layer)
    same_after_saving(model, processor, tmp_path)


def test_a_configuration_without_a_width_asks_the_encoder():
    config = tiny(vision_feature_layer=[-2, -3])[0].config
    assert config.vision_hidden_size == 48
    config.vision_hidden_size = None
    assert VLMForConditionalGeneration(config).model.multi_modal_projector.standardize.mean.shape[-1] == 48


@pytest.mark.parametrize("decoder", ["gemma3", "gpt2", "llama"])
def test_tied_embeddings_stay_tied(decoder, tmp_path):
    again, _ = same_after_saving(*tiny(decoder, "prefix+cross_attention", tie_word_embeddings=True), tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_half_precision_and_sharded_files_load(tmp_path):
    model, processor = tiny(fusion="prefix+cross_attention")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    inputs = batch(processor, (image(0), "what is it"))
    assert torch.allclose(logits(again, **inputs).float(), logits(model, **inputs), atol=0.5)


def test_pipeline_answers(tmp_path):
    model, processor = tiny()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    answer = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    request = [user(image(0), "what is it")]
    said = answer(text=request, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    inputs = batch(processor, (image(0), "what is it"))
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said == processor.decode(ids, skip_special_tokens=True)
    assert said
