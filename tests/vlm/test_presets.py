"""Presets: each is a model that runs, one's own keys go first, and a resolved recipe says all of it."""

import pytest
import torch
from transformers import (
    AutoModel,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    LlavaNextConfig,
    MllamaTextConfig,
    ResNetConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

from tests.tiny import clip_config, encode, image, text_config, tiny, user
from vlm import recipe
from vlm.encoder import mllama_feature_layers
from vlm.fusion import FusedDecoderLayer
from vlm.presets import PRESETS, with_preset
from vlm.recipe import RecipeError

REST = {"data": {"train": {"format": "image_folder", "path": "images"}}, "trainable": ["projector"]}


def model_of(**model):
    found = recipe.from_dict({"model": {"vision": "an/encoder", "language": "an/llm", **model}, **REST})
    assert recipe.from_dict(found.resolved()) == found
    return found.model


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_model_that_runs(name):
    adapter = {"projector": {"hidden_size": 24, "num_attention_heads": 4}} if "blip" in name else {}
    made = model_of(preset=name, adapter=adapter)
    assert made.preset == name
    patch = {"gemma3": 2}.get(name, 4)  # 16 x 16 patches of 32 x 32 pixels, or 8 x 8
    options = made.model_dump(
        exclude={"preset", "pretrained", "vision", "language", "adapter", "image_size", "image_aspect_ratio"}
        | {"trust_remote_code", "chat_template", "quantization_config"}
    )
    adapter = made.adapter.model_dump(exclude={"data_dependent_init"})
    projector, fusion = adapter.pop("projector"), adapter.pop("fusion")
    model, processor = tiny(
        fusion=fusion, projector=projector, vision_config=clip_config(patch_size=patch), **options, **adapter
    )
    inputs = encode(processor, [[user(picture := image(0, (60, 36)), "what")]])
    assert model.config.projector.items() >= projector.items()
    with torch.no_grad():
        seen = model(**inputs).logits
        other = model(**encode(processor, [[user(image(1, picture.size), "what")]])).logits
    assert torch.isfinite(seen).all()
    assert not torch.allclose(seen[:, -1], other[:, -1], atol=1e-4), "the image changes nothing"


def test_ones_own_keys_go_first():
    made = model_of(preset="llava", vision_feature_layer=-3, adapter={"fusion": "prefix+cross_attention"})
    assert (made.vision_feature_layer, made.image_aspect_ratio) == (-3, "pad")
    assert (made.adapter.projector, made.adapter.fusion) == ({"type": "mlp"}, "prefix+cross_attention")
    made = model_of(preset="smolvlm", adapter={"projector": {"scale_factor": 2}}, tiling=None)
    assert made.adapter.projector == {"type": "pixel_shuffle", "scale_factor": 2}
    assert made.tiling is None
    made = model_of(preset="flamingo", adapter={"projector": {"type": "average_pool", "num_image_tokens": 49}})
    assert made.adapter.projector == {"type": "average_pool", "num_image_tokens": 49}


def test_a_preset_is_not_changed_by_what_is_put_over_it():
    with_preset({"adapter": {"projector": {"scale_factor": 2}}}, "smolvlm")
    assert with_preset({}, "smolvlm")["adapter"]["projector"]["scale_factor"] == 4


def test_the_tilings_are_those_of_the_published_processors():
    pinpoints, tiling = LlavaNextConfig().image_grid_pinpoints, PRESETS["llava_next"]["tiling"]
    assert [[336 * rows, 336 * columns] for rows, columns in tiling["grids"]] == pinpoints
    images = Idefics3ImageProcessor()
    tiles_a_side = images.size["longest_edge"] / images.max_image_size["longest_edge"]
    assert PRESETS["idefics3"]["tiling"]["max_tiles"] == tiles_a_side**2
    assert PRESETS["internvl"]["tiling"]["max_tiles"] == GotOcr2ImageProcessor().max_patches


def test_on_the_command_line(tmp_path):
    found = recipe.from_dict(
        {"model": {"vision": "an/encoder", "language": "an/llm"}, **REST},
        ["model.preset=flamingo", "model.adapter.projector.depth=2"],
    )
    assert found.model.adapter.projector == {"type": "resampler", "num_image_tokens": 64, "depth": 2, "num_heads": 8}


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(RecipeError, match="there is none called 'lava'; did you mean 'llava'"):
        model_of(preset="lava")


def test_a_preset_does_not_go_with_a_whole_model():
    with pytest.raises(RecipeError, match="preset: does not go with `pretrained`"):
        recipe.from_dict({"model": {"preset": "llava", "pretrained": "a/model"}, **REST})


@pytest.mark.parametrize("depth", [4, 9, 32])
def test_mllamas_layers_stand_where_mllamas_do(depth):
    model, _ = tiny(fusion="cross_attention", text=text_config(layers=depth), cross_attention_layers="mllama")
    found = [i for i, layer in enumerate(model.model.language_model.layers) if isinstance(layer, FusedDecoderLayer)]
    positions = [layer + earlier for earlier, layer in enumerate(found)]
    assert positions == [p for p in MllamaTextConfig().cross_attention_layers if p < depth + len(found)]
    assert found


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, [4, 8, 16, 24, 31, 32]), (12, [1, 3, 6, 9, 11, 12]), (3, [1, 2, 3]), (1, [1])]
)
def test_mllama_reads_its_layers_of_an_encoder_of_any_depth(depth, layers):
    assert MllamaVisionConfig().intermediate_layers_indices == [3, 7, 15, 23, 30]  # counted from 0, and then the last
    tower = AutoModel.from_config(clip_config(num_hidden_layers=depth, hidden_size=4))
    assert mllama_feature_layers(tower) == layers


def test_mllamas_layers_need_an_encoder_that_says_how_many_it_has():
    tower = AutoModel.from_config(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))
    with pytest.raises(ValueError, match="ResNetModel does not say how many layers it has"):
        mllama_feature_layers(tower)


def test_too_few_layers_for_mllamas():
    with pytest.raises(ValueError, match="needs 4 layers; this language model has 2"):
        tiny(fusion="cross_attention", text=text_config(layers=2), cross_attention_layers="mllama")
