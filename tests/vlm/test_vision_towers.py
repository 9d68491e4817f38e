"""Two encoders side by side against each of them alone, from loading to a trained model."""

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitImageProcessor,
    Dinov2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
    TimmWrapperConfig,
)

from tests.tiny import continuation, encode, image, user
from tests.training.helpers import recipe_values, save_images, save_parts
from tests.vlm.test_saved import same_after_saving
from vlm import generation, recipe
from vlm.build import build, load_vision
from vlm.training import run as running
from vlm.vision_towers import VisionTowers

DINO = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
SIGLIP = DINO | {"hidden_size": 16, "intermediate_size": 32, "patch_size": 16}
IN_TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Encoders with patches of 8, 16 and 8 pixels, each with its own mean, and a language model."""
    torch.manual_seed(0)
    root = save_parts(tmp_path_factory.mktemp("parts"))
    AutoModel.from_config(Dinov2Config(**DINO, layerscale_value=1.0)).save_pretrained(root / "dinov2")
    crops = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessor(**crops, image_mean=[0.2, 0.3, 0.4]).save_pretrained(root / "dinov2")
    AutoModel.from_config(SiglipVisionConfig(**SIGLIP)).save_pretrained(root / "siglip")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "siglip")
    cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"}
    in_timm = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=IN_TIMM, pretrained_cfg=cfg)
    AutoModel.from_config(in_timm).save_pretrained(root / "timm")
    return root


def names(parts, *which):
    return [str(parts / name) for name in which]


PAIR = {"image_size": [32, 64]}
"""Four by four patches of each."""


@torch.no_grad()
@pytest.mark.parametrize("layer", [None, -2, [-1, -2]])
def test_each_encoder_sees_what_it_would_see_alone(parts, layer):
    both, image_processor = load_vision(names(parts, "dinov2", "siglip"), **PAIR)
    pictures = [image(0), image(1, (30, 50))]
    pixels = image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 6, 64, 64)
    seen = both(pixels, feature_layer=layer)
    alone = []
    for name, side in (("dinov2", 32), ("siglip", 64)):
        tower, prepare = AutoModel.from_pretrained(parts / name), AutoImageProcessor.from_pretrained(parts / name)
        prepare.size = {"shortest_edge": side} if name == "dinov2" else {"height": side, "width": side}
        options = {"interpolate_pos_encoding": True} if name == "siglip" else {}
        outputs = tower(**prepare(pictures, return_tensors="pt"), output_hidden_states=True, **options)
        layers = [layer] if isinstance(layer, int) else layer
        states = [outputs.hidden_states[i] for i in layers] if layers else [outputs.last_hidden_state]
        alone += [state[:, -16:] for state in states]
        pooled = outputs.pooler_output
    assert seen.grid == (4, 4)
    assert seen.prefix.shape == (2, 0, sum(patches.shape[-1] for patches in alone))
    assert torch.allclose(seen.patches, torch.cat(alone, dim=-1), atol=1e-6)
    assert torch.allclose(seen.pooled[:, 24:], pooled, atol=1e-6)


@pytest.mark.parametrize("which", [("dinov2", "siglip"), ("vision", "timm"), ("timm", "siglip", "dinov2")], ids=str)
@pytest.mark.parametrize("aspect", ["square", "pad"])
def test_they_are_the_same_when_loaded(parts, which, aspect, tmp_path):
    sizes = [64 if name == "siglip" else 32 for name in which]
    model, processor = build(names(parts, *which), str(parts / "language"), image_size=sizes, image_aspect_ratio=aspect)
    assert model.config.image_seq_length == 16
    again, _ = same_after_saving(model.eval(), processor, tmp_path)
    assert isinstance(again.model.vision_tower, VisionTowers)
    inputs = encode(processor, [[user(image(0), "what is it")]])
    assert continuation(again, inputs) == continuation(model, inputs)


def test_encoders_that_were_brought_to_a_size_are_the_same_when_loaded(parts, tmp_path):
    model, processor = build(names(parts, "timm", "dinov2"), str(parts / "language"), image_size=48)
    assert model.config.image_seq_length == 36
    same_after_saving(model.eval(), processor, tmp_path)


def test_assembling_leaves_the_weights_of_the_checkpoints(parts):
    both, _ = load_vision(names(parts, "dinov2", "siglip"), **PAIR)
    for tower, name in zip(both.vision_towers, ("dinov2", "siglip"), strict=True):
        for key, value in AutoModel.from_pretrained(parts / name).state_dict().items():
            assert torch.equal(tower.state_dict()[key], value), key


def test_different_grids_are_refused_and_the_size_that_is_named_helps(parts):
    which = names(parts, "dinov2", "siglip")
    with pytest.raises(ValueError, match=r"grids differ: 4 x 4 .*32 x 32 pixels.*2 x 2 .*image_size: ") as refused:
        build(which, str(parts / "language"))
    assert str(refused.value).endswith("image_size: [32, 64]")
    build(which, str(parts / "language"), **PAIR)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision_feature_select_strategy": "full", **PAIR}, "full is for one encoder"),
        ({"image_size": [32, 64, 32]}, "image_size has 3 sizes for 2 encoders"),
        ({"vision_feature_layer": -9, **PAIR}, "vision_feature_layer is -9; this encoder gives 3"),
    ],
)
def test_what_does_not_fit_is_refused(parts, options, message):
    with pytest.raises(ValueError, match=message):
        build(names(parts, "dinov2", "siglip"), str(parts / "language"), **options)


def test_pixels_of_one_encoder_are_refused(parts):
    both, _ = load_vision(names(parts, "dinov2", "siglip"), **PAIR)
    with pytest.raises(ValueError, match="2 encoders take 6 channels, not 3"):
        both(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("rates", [{"projector": 1e-2}, {"projector": 1e-2, "vision": 1e-2}], ids=str)
@pytest.mark.few(1)
def test_a_run(parts, tmp_path, monkeypatch, rates):
    """Frozen, both encoders stay as they were and their features are kept; trained, both learn."""
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    values = recipe_values(parts, save_images(tmp_path / "images"), tmp_path / "run")
    values["model"] |= {"vision": names(parts, "dinov2", "siglip"), **PAIR}
    values["data"] |= {"cache_features": True}
    values |= {"trainable": rates, "lora": None}
    running.train(recipe.from_dict(values), console=Console(quiet=True))
    kept = list((tmp_path / "home").rglob("*.safetensors"))
    assert bool(kept) == ("vision" not in rates)
    model, processor = generation.load(str(tmp_path / "run"))
    for tower, name in zip(model.model.vision_tower.vision_towers, ("dinov2", "siglip"), strict=True):
        before = AutoModel.from_pretrained(parts / name).state_dict()
        same = all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())
        assert same == ("vision" not in rates)
    ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    [said] = generation.generate(model, processor, [([image(0)], ask)], max_new_tokens=3)
    assert isinstance(said, str)
    folder = tmp_path / "run" / "model"
    assert AutoProcessor.from_pretrained(folder).image_processor.image_processors[0].image_mean == (0.2, 0.3, 0.4)
    assert AutoModelForImageTextToText.from_pretrained(folder).config.vision_config.image_sizes == [[32, 32], [64, 64]]


@torch.no_grad()
def test_tiles_are_seen_whole_by_each_encoder(parts):
    """Cut to the size of the larger one; the smaller one scales a tile down and cuts nothing off."""
    tiling = {"type": "tiles", "max_tiles": 4}
    model, processor = build(names(parts, "dinov2", "siglip"), str(parts / "language"), tiling=tiling, **PAIR)
    assert processor.tiler.tile_size == (64, 64)
    made = processor.prepare_images([image(0, (128, 64))])
    tiles = processor.tiler.split(image(0, (128, 64)))
    assert len(made["pixel_values"]) == len(tiles) == 3
    alone = [AutoModel.from_pretrained(name).eval() for name in names(parts, "dinov2", "siglip")]
    whole = {"size": {"height": 32, "width": 32}, "do_center_crop": False, "image_mean": [0.2, 0.3, 0.4]}
    processors = BitImageProcessor(**whole), SiglipImageProcessor(size={"height": 64, "width": 64})
    pixels = [each(tiles, return_tensors="pt")["pixel_values"] for each in processors]
    expected = [
        alone[0](pixels[0]).last_hidden_state[:, 1:],
        alone[1](pixels[1], interpolate_pos_encoding=True).last_hidden_state,
    ]
    found, grid = model.get_vision_features(made["pixel_values"])
    assert grid == (4, 4)
    assert torch.allclose(found, torch.cat(expected, dim=-1), atol=1e-4)


def test_options_of_the_image_processor_are_set_for_each(parts, tmp_path):
    """As `from_pretrained` is given them, against each image processor that is given them alone."""
    _, image_processor = load_vision(names(parts, "dinov2", "siglip"), **PAIR)
    image_processor.save_pretrained(tmp_path)
    options = {"do_normalize": False, "rescale_factor": 1 / 510}
    pixels = AutoImageProcessor.from_pretrained(tmp_path, **options)(image(0), return_tensors="pt")["pixel_values"][0]
    for at, (name, side) in enumerate((("dinov2", 32), ("siglip", 64))):
        size = {"shortest_edge": side} if name == "dinov2" else {"height": side, "width": side}
        alone = AutoImageProcessor.from_pretrained(parts / name, size=size, **options)(image(0), return_tensors="pt")
        torch.testing.assert_close(pixels[3 * at : 3 * at + 3, :side, :side], alone["pixel_values"][0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_encoder_has_the_attention_that_is_asked_for(parts, attention, tmp_path):
    both, _ = load_vision(names(parts, "dinov2", "siglip"), **PAIR)
    both.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=attention)
    assert [tower.config._attn_implementation for tower in loaded.vision_towers] == [attention] * 2


def test_hidden_states_and_attentions_are_those_of_each_encoder(parts):
    both, image_processor = load_vision(names(parts, "dinov2", "siglip"), **PAIR)
    both.set_attn_implementation("eager")
    pixels = image_processor(image(0), return_tensors="pt")["pixel_values"]
    asked = {"output_hidden_states": True, "output_attentions": True}
    found = both(pixels, **asked)
    dinov2, siglip = both.vision_towers
    alone = [dinov2(pixels[:, :3, :32, :32], **asked), siglip(pixels[:, 3:], interpolate_pos_encoding=True, **asked)]
    for name, layers in (("hidden_states", 6), ("attentions", 4)):
        expected = [layer for outputs in alone for layer in outputs[name]]
        assert len(expected) == layers
        assert all(map(torch.equal, getattr(found, name), expected))
    assert both(pixels).hidden_states is None
