"""Every kind of encoder against its own model called directly."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    BeitConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    EfficientNetConfig,
    MobileNetV2Config,
    ResNetConfig,
    SiglipVisionConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
)

from vlm.encoder import encode, vision_hidden_size

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"}
STAGES = {"hidden_sizes": [8, 16, 24], "depths": [1, 1, 1]}
TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
TIMM_SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}

# name: configuration, side in pixels, number of class, distillation and register tokens, stride in pixels
TOKENS = {
    "vit": (lambda: ViTConfig(**VIT), 32, 1, 8),
    "deit": (lambda: DeiTConfig(**VIT), 32, 2, 8),
    "beit": (lambda: BeitConfig(**VIT, use_relative_position_bias=True), 32, 1, 8),
    "clip": (lambda: CLIPVisionConfig(**VIT), 32, 1, 8),
    "siglip": (lambda: SiglipVisionConfig(**VIT), 32, 0, 8),
    "dinov2": (lambda: Dinov2Config(**DINO), 32, 1, 8),
    "dinov2_registers": (lambda: Dinov2WithRegistersConfig(**DINO, num_register_tokens=4), 32, 5, 8),
    "swin": (
        lambda: SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
        64,
        0,
        8,
    ),
    "timm_vit": (lambda: TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=TIMM_VIT), 32, 1, 8),
    "timm_vit_registers": (
        lambda: TimmWrapperConfig(architecture="vit_small_patch14_reg4_dinov2", model_args=TIMM_VIT),
        32,
        5,
        8,
    ),
}
MAPS = {
    "resnet": (lambda: ResNetConfig(embedding_size=8, layer_type="basic", **STAGES), 64, 0, 16),
    "efficientnet": (
        lambda: EfficientNetConfig(
            width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320, image_size=64, initializer_range=0.3
        ),
        64,
        0,
        32,
    ),
    "convnext": (lambda: ConvNextConfig(num_stages=3, image_size=64, **STAGES), 64, 0, 16),
    "mobilenet_v2": (lambda: MobileNetV2Config(depth_multiplier=0.25, image_size=64), 64, 0, 32),
    "timm_resnet": (
        lambda: TimmWrapperConfig(architecture="resnet18", model_args={"channels": [8, 8, 16, 24]}),
        64,
        0,
        32,
    ),
    "timm_swin": (
        lambda: TimmWrapperConfig(architecture="swin_tiny_patch4_window7_224", model_args=TIMM_SWIN),
        64,
        0,
        8,
    ),
    "timm_efficientnet_lite0": (lambda: TimmWrapperConfig(architecture="tf_efficientnet_lite0"), 64, 0, 32),
    "timm_mobilenet": (lambda: TimmWrapperConfig(architecture="mobilenetv3_small_050"), 64, 0, 32),
}
ENCODERS = TOKENS | MAPS
SAYS_NO_WIDTH = {"mobilenet_v2"}
ONE_SIZE = {"timm_vit", "timm_vit_registers", "timm_swin"}


@pytest.fixture(scope="module")
def towers():
    """Each encoder is built once."""
    built = {}

    def tower(name):
        if name not in built:
            torch.manual_seed(0)
            built[name] = AutoModel.from_config(ENCODERS[name][0]()).eval()
        return built[name]

    return tower


@pytest.mark.parametrize("name", ENCODERS)
def test_shapes_and_grid(name, towers):
    _, side, num_prefix, stride = ENCODERS[name]
    tower = towers(name)
    features = encode(tower, torch.randn(2, 3, side, side))
    assert features.grid == (side // stride, side // stride)
    assert features.patches.shape[:2] == (2, (side // stride) ** 2)
    assert features.prefix.shape == (2, num_prefix, features.patches.shape[2])
    assert features.pooled is not None
    assert features.pooled.ndim == 2
    if name in SAYS_NO_WIDTH:
        with pytest.raises(ValueError, match="set vision_hidden_size"):
            vision_hidden_size(tower)
    else:
        assert vision_hidden_size(tower) == features.patches.shape[2]


@torch.no_grad()
@pytest.mark.parametrize("name", TOKENS)
def test_patches_are_the_models_tokens_without_those_in_front(name, towers):
    _, side, num_prefix, _ = TOKENS[name]
    tower, pixels = towers(name), torch.randn(2, 3, side, side)
    direct = tower(pixels)
    features = encode(tower, pixels)
    assert torch.equal(features.patches, direct.last_hidden_state[:, num_prefix:])
    assert torch.equal(features.prefix, direct.last_hidden_state[:, :num_prefix])
    assert torch.equal(features.pooled, direct.pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("name", MAPS)
def test_feature_maps_are_read_row_by_row(name, towers):
    tower, pixels = towers(name), torch.randn(2, 3, MAPS[name][1], MAPS[name][1])
    direct = tower(pixels).last_hidden_state
    features = encode(tower, pixels)
    rows, columns = features.grid
    for row in range(rows):
        for column in range(columns):
            pixel = direct[:, row, column] if name == "timm_swin" else direct[:, :, row, column]
            assert torch.equal(features.patches[:, row * columns + column], pixel)


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_reach_the_weights(name, towers):
    side = ENCODERS[name][1]
    tower = copy.deepcopy(towers(name)).train()  # batch norm with random weights and no statistics lets nothing through
    encode(tower, torch.randn(2, 3, side, side)).patches.square().sum().backward()
    first = next(p for p in tower.parameters() if p.ndim == 4)  # the patch embedding or the stem
    assert first.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_feature_layer_is_a_hidden_state(name, towers):
    _, side, num_prefix, _ = ENCODERS[name]
    tower, pixels = towers(name), torch.randn(1, 3, side, side)
    hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    features = encode(tower, pixels, feature_layer=-2)
    assert features.patches.shape[1] == features.grid[0] * features.grid[1]
    if hidden.ndim == 4:
        assert features.grid == tuple(hidden.shape[2:])
        hidden = hidden.flatten(2).transpose(1, 2)
        num_prefix = 0
    assert torch.equal(features.patches, hidden[:, num_prefix:])


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


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(ENCODERS.keys() - ONE_SIZE))
def test_another_size_and_other_proportions(name, towers):
    _, side, num_prefix, stride = ENCODERS[name]
    tower = towers(name)
    features = encode(tower, torch.randn(2, 3, 2 * side, side))
    assert features.grid == (2 * side // stride, side // stride)
    assert features.patches.shape[1] == 2 * (side // stride) ** 2
    assert features.prefix.shape[1] == num_prefix


@pytest.mark.parametrize("name", sorted(ONE_SIZE))
def test_an_encoder_of_one_size_says_so(name, towers):
    with pytest.raises(AssertionError, match="doesn't match model"):
        encode(towers(name), torch.randn(1, 3, 128, 64))
