"""`vlm encode` against the encoder called directly, image by image."""

import json
from io import StringIO

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessor,
    Dinov2Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
    TimmWrapperConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tests.tiny import clip_config, image, image_processor
from vlm import encode
from vlm.errors import UserError

SIZE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
IN_TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """CLIP's and DINOv2's kind, one of timm without a class token, and a classifier, which has no pooling layer."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("encoders")
    AutoModel.from_config(clip_config()).save_pretrained(root / "clip")
    image_processor().save_pretrained(root / "clip")
    AutoModel.from_config(Dinov2Config(**SIZE, layerscale_value=1.0)).save_pretrained(root / "dinov2")
    crop = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessor(**crop).save_pretrained(root / "dinov2")
    cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bicubic"}
    timm = TimmWrapperConfig(architecture="vit_base_patch16_siglip_224", model_args=IN_TIMM, pretrained_cfg=cfg)
    AutoModel.from_config(timm).save_pretrained(root / "timm")
    ViTForImageClassification(ViTConfig(**SIZE)).save_pretrained(root / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "vit")
    return root


@pytest.fixture
def photos(tmp_path):
    """Twenty images of several sizes, more than a batch, the fourth of which does not open."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(20):
        image(n, (40 + n, 60 - n)).save(folder / f"{n:02}.png")
    (folder / "03.png").write_bytes(b"not an image")
    return folder


def run(patterns, encoder, output, **options):
    """The features and their metadata, and what was said."""
    console = Console(file=StringIO(), width=80)
    encode.run([str(pattern) for pattern in patterns], encoder=str(encoder), output=output, console=console, **options)
    with safe_open(output, framework="pt") as file:
        return file.get_tensor("features"), file.metadata(), console.file.getvalue()


def whole(photos):
    return [path for path in sorted(photos.iterdir()) if path.name != "03.png"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "dinov2"])
@pytest.mark.parametrize("patches", [False, True])
def test_features_are_the_models_own(encoders, photos, tmp_path, name, patches):
    found, metadata, said = run([photos], encoders / name, tmp_path / "f.safetensors", patches=patches)
    tower = AutoModel.from_pretrained(encoders / name)
    prepare = AutoImageProcessor.from_pretrained(encoders / name)
    outputs = [tower(**prepare(Image.open(path), return_tensors="pt")) for path in whole(photos)]
    wanted = [out.last_hidden_state[:, 1:] if patches else out.pooler_output for out in outputs]
    assert found.shape == ((19, 16, 24) if patches else (19, 24))
    assert torch.allclose(found, torch.cat(wanted), atol=1e-5)
    assert json.loads(metadata["images"]) == [str(path) for path in whole(photos)]
    assert metadata["encoder"] == str(encoders / name)
    assert metadata["output"] == ("patches" if patches else "pooled")
    assert (metadata["grid"], metadata["image_size"]) == ("[4, 4]", "[32, 32]")
    assert f"left out: {photos / '03.png'}: not an image" in said
    size = " x ".join(map(str, found.shape))
    end = f"19 encoded, 1 could not be opened: {tmp_path / 'f.safetensors'}, features {size} float32\n"
    assert said.endswith(end)


@torch.no_grad()
def test_layers_size_and_dtype(encoders, photos, tmp_path):
    files = whole(photos)[:3]
    options = {"patches": True, "vision_feature_layer": [-2, -1], "image_size": 48}
    found, metadata, said = run(files, encoders / "clip", tmp_path / "a", **options)
    tower, prepare = AutoModel.from_pretrained(encoders / "clip"), image_processor(48)
    pixels = prepare([Image.open(path) for path in files], return_tensors="pt")["pixel_values"]
    states = tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    assert torch.allclose(found, torch.cat([states[-2], states[-1]], dim=-1)[:, 1:], atol=1e-5)
    assert found.shape == (3, 36, 48)
    assert (metadata["grid"], metadata["vision_feature_layer"]) == ("[6, 6]", "[-2, -1]")
    assert "left out" not in said
    half, _, _ = run(files, encoders / "clip", tmp_path / "b", **options, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), found, atol=0.1, rtol=0.1)


def test_an_encoder_of_timm_brought_to_a_size(encoders, photos, tmp_path):
    pooled, _, _ = run([photos / "0[0-2].png"], encoders / "timm", tmp_path / "a", image_size=48)
    patches, metadata, _ = run([photos / "0[0-2].png"], encoders / "timm", tmp_path / "b", image_size=48, patches=True)
    assert (pooled.shape, patches.shape, metadata["grid"]) == ((3, 24), (3, 36, 24), "[6, 6]")


def test_an_encoder_without_its_pooling_layer_is_refused(encoders, photos, tmp_path):
    """Its weights would be random."""
    with pytest.raises(UserError, match=r"lacks weights of ViTModel: pooler.*--patches does without"):
        run([photos], encoders / "vit", tmp_path / "f")
    assert run([photos], encoders / "vit", tmp_path / "f", patches=True)[0].shape == (19, 16, 24)


def test_an_encoder_that_does_not_pool_is_refused(encoders, photos, tmp_path):
    config = SiglipVisionConfig(**SIZE, intermediate_size=48, vision_use_head=False)
    AutoModel.from_config(config).save_pretrained(tmp_path / "siglip")
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "siglip")
    with pytest.raises(UserError, match="does not pool what it sees into one vector; use --patches"):
        run([photos], tmp_path / "siglip", tmp_path / "f")
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat"}, "no --dtype bfloat; did you mean 'bfloat16'"),
        ({"vision_feature_layer": [-2]}, "--vision-feature-layer goes with --patches"),
        ({"vision_feature_layer": [-9], "patches": True}, "vision_feature_layer is -9; this encoder gives 4"),
        ({"encoder": "/nowhere"}, "cannot load '/nowhere' .* as a vision encoder"),
        ({"patterns": ["photos/03.png"]}, "no image could be opened, of 1"),
        ({"patterns": ["photos/x.png"]}, "is no file or folder"),
    ],
)
def test_what_does_not_work_is_said_and_leaves_no_file(encoders, photos, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    given = {"patterns": ["photos"], "encoder": encoders / "clip"} | options
    with pytest.raises(UserError, match=message):
        run(output=tmp_path / "f", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_file_that_is_there_stays(encoders, photos, tmp_path):
    (tmp_path / "f").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run([photos], encoders / "clip", tmp_path / "f")
    assert (tmp_path / "f").read_text() == "mine"
