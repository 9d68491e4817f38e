"""The Q-Former against that of transformers."""

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vlm.adapters import build_projector

OPTIONS = {
    "num_image_tokens": 5,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "cross_attention_frequency": 2,
}


def take_attention(ours, theirs, prefix):
    """`theirs` is an attention layer with its output and norm."""
    attention = getattr(ours, prefix)
    for kind in ("query", "key", "value"):
        getattr(attention, f"{kind[0]}_proj").load_state_dict(getattr(theirs.attention, kind).state_dict())
    attention.out_proj.load_state_dict(theirs.output.dense.state_dict())
    getattr(ours, f"{prefix}_norm").load_state_dict(theirs.output.LayerNorm.state_dict())


@torch.no_grad()
def take_weights(projector, stock):
    projector.norm.load_state_dict(stock.layernorm.state_dict())
    for ours, theirs in zip(projector.layers, stock.encoder.layer, strict=True):
        take_attention(ours, theirs.attention, "attention")
        assert ours.attends_to_features == theirs.has_cross_attention
        if theirs.has_cross_attention:
            take_attention(ours, theirs.crossattention, "crossattention")
        ours.feed_forward[0].load_state_dict(theirs.intermediate_query.dense.state_dict())
        ours.feed_forward[2].load_state_dict(theirs.output_query.dense.state_dict())
        ours.feed_forward_norm.load_state_dict(theirs.output_query.LayerNorm.state_dict())


@pytest.mark.parametrize("width", [12, 16], ids=["encoder narrower", "encoder as wide"])
@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_equals_that_of_blip_2(width, frequency, parity):
    torch.manual_seed(0)
    config = Blip2QFormerConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        encoder_hidden_size=width,
        cross_attention_frequency=frequency,
        initializer_range=0.3,
        use_qformer_text_input=False,
    )
    stock = Blip2QFormerModel(config).eval()
    for name, parameter in stock.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "bias" in name else 0.2, mean="LayerNorm.weight" in name)
    projector = build_projector(
        {"type": "qformer", **OPTIONS, "cross_attention_frequency": frequency}, width, 20
    ).eval()
    take_weights(projector, stock)
    torch.nn.init.normal_(projector.query_tokens)
    features = torch.randn(3, 24, width)
    with torch.no_grad():
        queries = projector.query_tokens.expand(3, -1, -1)
        expected = stock(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        expected = projector.language_projection(expected)
        found = projector(features, (4, 6))
    assert expected.std() > 0.1
    parity("BLIP-2", "Q-Former", (found - expected).abs().max())
    assert (found - expected).abs().max() < 1e-5
