"""The resampler against the perceiver resamplers of Idefics and Idefics2 in transformers."""

import pytest
import torch
from torch import nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from vlm.adapters import build_projector


@torch.no_grad()
@pytest.mark.parametrize("variant", ["flamingo", "idefics"])
def test_equals_that_of_idefics(variant, parity):
    """Flamingo's differs: it has no norms on queries and keys and GELU for ReLU, so Idefics is given the same here, and
    there is a layer in front, which is the identity here."""
    torch.manual_seed(0)
    width, heads, latents = 16, 4, 5
    idefics = variant == "idefics"
    config = IdeficsConfig(vision_config={"embed_dim": width}, perceiver_config={"qk_layer_norms_perceiver": idefics})
    stock = IdeficsPerceiverResampler(config, width, 3, heads, 6, latents).eval()
    for parameter in stock.parameters():
        parameter.normal_(std=0.3)
    spec = {"type": "resampler", "variant": variant, "num_image_tokens": latents, "depth": 3}
    projector = build_projector(spec | {"num_heads": heads, "head_dim": 6}, width, width).eval()
    if not idefics:
        projector.proj_in.weight.copy_(torch.eye(width))
        projector.proj_in.bias.zero_()
    projector.latents.copy_(stock.latents)
    projector.norm.load_state_dict(stock.layer_norm.state_dict())
    for layer, (attention, feed_forward) in zip(projector.layers, stock.blocks, strict=True):
        layer.norm_features.load_state_dict(attention.context_layer_norm.state_dict())
        layer.norm_latents.load_state_dict(attention.latents_layer_norm.state_dict())
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.attention, name).load_state_dict(getattr(attention, name).state_dict())
        layer.attention.o_proj.load_state_dict(attention.output_proj.state_dict())
        if idefics:
            layer.attention.q_norm.load_state_dict(attention.q_layer_norm.state_dict())
            layer.attention.k_norm.load_state_dict(attention.k_layer_norm.state_dict())
        else:
            feed_forward.act = nn.GELU()
        layer.feed_forward[0].load_state_dict(feed_forward.ln.state_dict())
        layer.feed_forward[1].load_state_dict(feed_forward.fc.state_dict())
        layer.feed_forward[3].load_state_dict(feed_forward.c_proj.state_dict())
    for grid in ((4, 6), (3, 3)):
        features = torch.randn(2, grid[0] * grid[1], width)
        expected = stock(features)
        assert expected.std() > 0.1
        difference = (projector(features, grid) - expected).abs().max()
        parity(*(("Idefics", "resampler") if idefics else ("Flamingo", "resampler, that of Idefics")), difference)
        assert difference < 1e-5


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="resampler must be one of flamingo, idefics, idefics2, not 'idefics3'"):
        build_projector({"type": "resampler", "variant": "idefics3"}, 8, 8)


def test_heads_of_keys_and_values_must_divide_the_others():
    with pytest.raises(ValueError, match="num_key_value_heads 3 must divide the 8 heads"):
        build_projector({"type": "resampler", "num_key_value_heads": 3}, 8, 8)
