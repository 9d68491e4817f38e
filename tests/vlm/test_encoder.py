"""Every kind of encoder against its own model called directly."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModel, Siglip2ImageProcessor, Siglip2VisionConfig
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig

from tests import tiny
from tests.encoders import CALLED, ENCODERS, NAFLEX
from vlm.encoder import encode, resize_positions, vision_hidden_size

LIBRARIES = {False: "transformers", True: "timm"}
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
