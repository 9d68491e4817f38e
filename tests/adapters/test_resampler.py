"""The resampler against the perceiver resampler of Idefics in transformers."""

import torch
from torch import nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from vlm.adapters import build_projector


@torch.no_grad()
def test_equals_that_of_idefics(parity):
    """Idefics has no layer in front, no bias outside its norms, and ReLU where ours has GELU. So our layer
    in front is the identity here, our biases are zero, and its ReLU is a GELU."""
    torch.manual_seed(0)
    width, heads, latents = 16, 4, 5
    config = IdeficsConfig(vision_config={"embed_dim": width}, perceiver_config={"qk_layer_norms_perceiver": False})
    stock = IdeficsPerceiverResampler(config, width, 3, heads, width // heads, latents).eval()
    for parameter in stock.parameters():
        parameter.normal_(std=0.3)
    spec = {"type": "resampler", "num_image_tokens": latents, "depth": 3, "num_heads": heads}
    projector = build_projector(spec, width, width).eval()
    for parameter in projector.parameters():
        parameter.zero_()
    projector.proj_in.weight.copy_(torch.eye(width))
    projector.latents.copy_(stock.latents)
    projector.norm.load_state_dict(stock.layer_norm.state_dict())
    for layer, (attention, feed_forward) in zip(projector.layers, stock.blocks, strict=True):
        feed_forward.act = nn.GELU()
        layer.norm_features.load_state_dict(attention.context_layer_norm.state_dict())
        layer.norm_latents.load_state_dict(attention.latents_layer_norm.state_dict())
        layer.attention.in_proj_weight.copy_(
            torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        )
        layer.attention.out_proj.weight.copy_(attention.output_proj.weight)
        layer.feed_forward[0].load_state_dict(feed_forward.ln.state_dict())
        layer.feed_forward[1].weight.copy_(feed_forward.fc.weight)
        layer.feed_forward[3].weight.copy_(feed_forward.c_proj.weight)
    for grid in ((4, 6), (3, 3)):
        features = torch.randn(2, grid[0] * grid[1], width)
        expected = stock(features)
        assert expected.std() > 0.1
        difference = (projector(features, grid) - expected).abs().max()
        parity("Idefics", "resampler", difference)
        assert difference < 1e-5
