"""Every kind of encoder against its own model called directly."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    BeitConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    EfficientNetConfig,
    MobileNetV2Config,
    ResNetConfig,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SwinConfig,
    Swinv2Config,
    TimmWrapperConfig,
    ViTConfig,
)
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

from tests import tiny
from vlm.encoder import encode, resize_positions, vision_hidden_size

DINO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
VIT = DINO | {"intermediate_size": 48}
NAFLEX = {key: value for key, value in VIT.items() if key != "image_size"} | {"num_patches": 16}
STAGES = {"hidden_sizes": [8, 16, 24], "depths": [1, 1, 1]}
SWIN = {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
TIMM_SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
TIMM_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}


@dataclass
class Case:
    """A configuration, a side in pixels that it takes, its stride, and its class, distillation and register tokens."""

    config: Any
    side: int
    stride: int
    num_prefix: int = 0


def timm(architecture, side, stride, num_prefix=0, **model_args):
    return Case(TimmWrapperConfig(architecture=architecture, model_args=model_args), side, stride, num_prefix)


ENCODERS = {
    "vit": Case(ViTConfig(**VIT), 32, 8, 1),
    "deit": Case(DeiTConfig(**VIT), 32, 8, 2),
    "beit": Case(BeitConfig(**VIT, use_relative_position_bias=True), 32, 8, 1),
    "clip": Case(CLIPVisionConfig(**VIT), 32, 8, 1),
    "blip2": Case(Blip2VisionConfig(**VIT, initializer_range=0.02), 32, 8, 1),
    "siglip": Case(SiglipVisionConfig(**VIT), 32, 8),
    "siglip2_naflex": Case(Siglip2VisionConfig(**NAFLEX), 32, 8),
    "dinov2": Case(Dinov2Config(**DINO), 32, 8, 1),
    "dinov2_registers": Case(Dinov2WithRegistersConfig(**DINO, num_register_tokens=4), 32, 8, 5),
    "dinov3": Case(DINOv3ViTConfig(**VIT, num_register_tokens=4), 32, 8, 5),
    "dinov3_convnext": Case(DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1]), 64, 32, 1),
    "swin": Case(SwinConfig(**SWIN), 64, 8),
    "swinv2": Case(Swinv2Config(**SWIN), 64, 8),
    "resnet": Case(ResNetConfig(embedding_size=8, layer_type="basic", **STAGES), 64, 16),
    "efficientnet": Case(
        EfficientNetConfig(
            width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320, image_size=64, initializer_range=0.3
        ),
        64,
        32,
    ),
    "convnext": Case(ConvNextConfig(num_stages=3, image_size=64, **STAGES), 64, 16),
    "mobilenet_v2": Case(MobileNetV2Config(depth_multiplier=0.25, image_size=64), 64, 32),
    "timm_vit": timm("vit_tiny_patch16_224", 32, 8, 1, **TIMM_VIT),
    "timm_deit": timm("deit_tiny_distilled_patch16_224", 32, 8, 2, **TIMM_VIT),
    "timm_beit": timm("beit_base_patch16_224", 32, 8, 1, **TIMM_VIT),
    "timm_clip": timm("vit_base_patch16_clip_224", 32, 8, 1, **TIMM_VIT),
    "timm_siglip": timm("vit_base_patch16_siglip_224", 32, 8, 0, **TIMM_VIT),
    "timm_dinov2": timm("vit_small_patch14_dinov2", 32, 8, 1, **TIMM_VIT),
    "timm_dinov2_registers": timm("vit_small_patch14_reg4_dinov2", 32, 8, 5, **TIMM_VIT),
    "timm_dinov3": timm("vit_small_patch16_dinov3", 32, 8, 5, **TIMM_VIT),
    "timm_eva": timm("eva02_tiny_patch14_224", 32, 8, 1, **TIMM_VIT),
    "timm_swin": timm("swin_tiny_patch4_window7_224", 64, 8, **TIMM_SWIN),
    "timm_swinv2": timm("swinv2_tiny_window8_256", 64, 8, **TIMM_SWIN),
    "timm_resnet": timm("resnet18", 64, 32, channels=[8, 8, 16, 24]),
    "timm_convnext": timm("convnext_tiny", 64, 32, **TIMM_CONVNEXT),
    "timm_efficientnet_lite0": timm("tf_efficientnet_lite0", 64, 32),
    "timm_mobilenet": timm("mobilenetv3_small_050", 64, 32),
}
LIBRARIES = {False: "transformers", True: "timm"}
CALLED = {
    "vit": "ViT",
    "deit": "DeiT",
    "beit": "BEiT",
    "clip": "CLIP-ViT",
    "blip2": "BLIP-2",
    "siglip": "SigLIP",
    "siglip2_naflex": "SigLIP 2 NaFlex",
    "dinov2": "DINOv2",
    "dinov2_registers": "DINOv2 with registers",
    "dinov3": "DINOv3",
    "dinov3_convnext": "DINOv3 ConvNeXt",
    "swin": "Swin",
    "swinv2": "Swin V2",
    "resnet": "ResNet",
    "efficientnet": "EfficientNet",
    "efficientnet_lite0": "EfficientNet",
    "convnext": "ConvNeXt",
    "mobilenet_v2": "MobileNetV2",
    "mobilenet": "MobileNetV3",
    "eva": "EVA-02",
}
SAYS_NO_WIDTH = {"mobilenet_v2"}
CHANNELS_LAST = {"timm_swin", "timm_swinv2"}
ANY_SIZE = {"timm_dinov3", "timm_resnet", "timm_convnext", "timm_efficientnet_lite0", "timm_mobilenet"}
ONE_SIZE = {name for name in ENCODERS if name.startswith("timm")} - ANY_SIZE
"""timm's, until `resize_positions`."""


@pytest.fixture(scope="module")
def towers():
    """Each encoder is built once."""
    built = {}

    def tower(name):
        if name not in built:
            torch.manual_seed(0)
            built[name] = AutoModel.from_config(ENCODERS[name].config).eval()
        return built[name]

    return tower


def direct(tower, pixels):
    """The model's own output and pooled vector, as its library calls it."""
    if hasattr(tower, "timm_model"):
        hidden = tower.timm_model.forward_features(pixels)
        return hidden, tower.timm_model.forward_head(hidden)
    if tower.config.model_type == "siglip2_vision_model":
        options = {"do_resize": False, "do_rescale": False, "do_normalize": False}
        made = Siglip2ImageProcessor(patch_size=8, max_num_patches=16, **options)(list(pixels), return_tensors="pt")
        outputs = tower(**made)
    else:
        outputs = tower(pixels)
    return outputs.last_hidden_state, outputs.pooler_output.flatten(1)


def tokens_of(name, hidden):
    """A model's output as tokens `[B, N, D]`: of a map, row by row."""
    if hidden.ndim == 3:
        return hidden
    at = (lambda y, x: hidden[:, y, x]) if name in CHANNELS_LAST else (lambda y, x: hidden[:, :, y, x])
    rows, columns = hidden.shape[1:3] if name in CHANNELS_LAST else hidden.shape[2:]
    return torch.stack([at(y, x) for y in range(rows) for x in range(columns)], dim=1)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_says_what_its_model_says(name, towers, parity):
    """Shapes, grid, no token but patches among the patches, the pooled vector, and gradients."""
    case, tower = ENCODERS[name], towers(name)
    pixels = torch.rand(2, 3, case.side, case.side)
    with torch.no_grad():
        features = encode(tower, pixels)
        hidden, pooled = direct(tower, pixels)
    side = case.side // case.stride
    assert features.grid == (side, side)
    tokens = tokens_of(name, hidden)
    assert tokens.shape[1] == case.num_prefix + side * side
    assert torch.equal(features.prefix, tokens[:, : case.num_prefix])
    assert torch.equal(features.patches, tokens[:, case.num_prefix :])
    of_timm = name.startswith("timm_")
    difference = (torch.cat([features.prefix, features.patches], dim=1) - tokens).abs().max()
    parity(CALLED[name.removeprefix("timm_")], f"patch embeddings, {LIBRARIES[of_timm]}", difference)
    assert features.pooled.ndim == 2
    assert torch.equal(features.pooled, pooled)
    if name in SAYS_NO_WIDTH:
        with pytest.raises(ValueError, match="set vision_hidden_size"):
            vision_hidden_size(tower)
    else:
        assert vision_hidden_size(tower) == features.patches.shape[2]

    learning = copy.deepcopy(tower).train()  # batch norm with random weights and no statistics lets nothing through
    encode(learning, pixels).patches.square().sum().backward()
    first = next(p for name, p in learning.named_parameters() if p.ndim == 4 or "patch_embedding" in name)
    assert first.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_feature_layer_is_a_hidden_state(name, towers):
    case, tower = ENCODERS[name], towers(name)
    pixels = torch.rand(1, 3, case.side, case.side)
    features = encode(tower, pixels, feature_layer=-2)
    assert features.patches.shape[1] == features.grid[0] * features.grid[1]
    if name == "siglip2_naflex":
        return  # its own image processor makes what it takes
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    num_prefix = case.num_prefix
    if hidden.ndim == 4:
        assert features.grid == tuple(hidden.shape[2:])
        hidden = hidden.flatten(2).transpose(1, 2)
        num_prefix = 0
    assert torch.equal(features.patches, hidden[:, num_prefix:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "siglip2_naflex", "timm_vit"])
def test_several_feature_layers_stand_side_by_side(name, towers):
    tower, pixels = towers(name), torch.rand(2, 3, 32, 32)
    several = encode(tower, pixels, feature_layer=[-1, -3])
    each = [encode(tower, pixels, feature_layer=layer) for layer in (-1, -3)]
    assert several.patches.shape == (2, 16, 64)
    assert torch.equal(several.patches, torch.cat([one.patches for one in each], dim=-1))
    assert torch.equal(several.prefix, torch.cat([one.prefix for one in each], dim=-1))
    assert torch.equal(encode(tower, pixels, feature_layer=[-2]).patches, encode(tower, pixels, -2).patches)


def test_feature_layers_of_different_grids_are_refused(towers):
    with pytest.raises(
        ValueError, match=r"vision_feature_layer \[-1, 1\]: the grids of these layers differ \(4 x 4, 16 x 16\)"
    ):
        encode(towers("resnet"), torch.rand(1, 3, 64, 64), feature_layer=[-1, 1])


@torch.no_grad()
def test_feature_layer_is_before_the_final_norm(towers):
    """For SigLIP hidden_states[-1] is not last_hidden_state."""
    tower, pixels = towers("siglip"), torch.randn(1, 3, 32, 32)
    last = encode(tower, pixels).patches
    before = encode(tower, pixels, feature_layer=-1).patches
    assert not torch.allclose(last, before)
    assert torch.allclose(last, tower.post_layernorm(before), atol=1e-6)


def test_a_feature_layer_that_is_not_there_is_refused(towers):
    with pytest.raises(ValueError, match=r"vision_feature_layer is -9; this encoder gives 4 hidden states"):
        encode(towers("clip"), torch.randn(1, 3, 32, 32), feature_layer=-9)


def test_an_encoder_of_one_size_says_so():
    shape = {"hidden_size": 8, "attention_heads": 2, "num_hidden_layers": 1, "num_global_layers": 1}
    config = MllamaVisionConfig(**shape, image_size=32, patch_size=8, intermediate_layers_indices=[0])
    with pytest.raises(ValueError, match="images of one size, 32 x 32 pixels"):
        encode(AutoModel.from_config(config), torch.randn(1, 3, 40, 32))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_another_size_and_other_proportions(name, towers):
    case, tower = ENCODERS[name], towers(name)
    height, width = 2 * case.side, case.side
    pixels = torch.rand(2, 3, height, width)
    if name in ONE_SIZE:
        with pytest.raises(ValueError, match="takes images of one size"):
            encode(tower, pixels)
        tower = copy.deepcopy(tower)
    resize_positions(tower, height, width)
    features = encode(tower, pixels)
    assert features.grid == (height // case.stride, width // case.stride)
    assert features.patches.shape[1] == features.grid[0] * features.grid[1]
    assert features.prefix.shape[1] == case.num_prefix
    if name in ONE_SIZE:
        # A new model of the configuration has room for the weights.
        again = AutoModel.from_config(type(tower.config).from_dict(tower.config.to_dict())).eval()
        again.load_state_dict(tower.state_dict())
        assert torch.equal(encode(again, pixels).patches, features.patches)


def test_positions_of_the_own_size_are_left_as_they_are(towers):
    tower = copy.deepcopy(towers("timm_vit"))
    resize_positions(tower, 32, 32)
    assert torch.equal(tower.timm_model.pos_embed, towers("timm_vit").timm_model.pos_embed)
    resize_positions(towers("clip"), 64, 64)  # interpolates as it runs


@torch.no_grad()
def test_naflex_sees_what_its_own_image_processor_makes():
    """At a size that its image processor leaves as it is."""
    torch.manual_seed(0)
    tower = AutoModel.from_config(Siglip2VisionConfig(**NAFLEX)).eval()
    own = Siglip2ImageProcessor(patch_size=8, max_num_patches=16)(tiny.image(0, (32, 32)), return_tensors="pt")
    pixels = torch.from_numpy(np.array(tiny.image(0, (32, 32)))).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(encode(tower, pixels).patches, tower(**own).last_hidden_state, atol=1e-5)
