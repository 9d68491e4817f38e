"""The Q-Former against that of transformers."""

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, InstructBlipQFormerConfig, InstructBlipQFormerModel

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
    embeddings = getattr(stock, "embeddings", stock)
    projector.norm.load_state_dict(embeddings.layernorm.state_dict())
    if projector.reads_text:
        projector.word_embeddings.load_state_dict(embeddings.word_embeddings.state_dict())
        projector.position_embeddings.load_state_dict(embeddings.position_embeddings.state_dict())
    for ours, theirs in zip(projector.layers, stock.encoder.layer, strict=True):
        take_attention(ours, theirs.attention, "attention")
        assert ours.attends_to_features == theirs.has_cross_attention
        if theirs.has_cross_attention:
            take_attention(ours, theirs.crossattention, "crossattention")
        ours.feed_forward[0].load_state_dict(theirs.intermediate_query.dense.state_dict())
        ours.feed_forward[2].load_state_dict(theirs.output_query.dense.state_dict())
        ours.feed_forward_norm.load_state_dict(theirs.output_query.LayerNorm.state_dict())
        if ours.makes_text:
            ours.text_feed_forward[0].load_state_dict(theirs.intermediate.dense.state_dict())
            ours.text_feed_forward[2].load_state_dict(theirs.output.dense.state_dict())
            ours.text_feed_forward_norm.load_state_dict(theirs.output.LayerNorm.state_dict())


def drawn(stock):
    """`stock` with weights that matter, all of them."""
    for name, parameter in stock.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "bias" in name else 0.2, mean="norm.weight" in name.lower())
    return stock.eval()


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
    stock = drawn(Blip2QFormerModel(config))
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


READS = {"use_qformer_text_input": True, "vocab_size": 50, "max_position_embeddings": 12}


@torch.no_grad()
@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_with_a_text_equals_that_of_instructblip(frequency, parity):
    """Texts of 7 and 4 tokens, the second padded, and none at all."""
    torch.manual_seed(0)
    config = InstructBlipQFormerConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        encoder_hidden_size=12,
        cross_attention_frequency=frequency,
        vocab_size=50,
        max_position_embeddings=12,
    )
    stock = drawn(InstructBlipQFormerModel(config))
    spec = {"type": "qformer", **OPTIONS, **READS, "cross_attention_frequency": frequency}
    projector = build_projector(spec, 12, 20).eval()
    take_weights(projector, stock)
    torch.nn.init.normal_(projector.query_tokens)
    features, ids, mask = torch.randn(2, 24, 12), torch.randint(50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    queries = projector.query_tokens.expand(2, -1, -1)

    def theirs(ids, mask):
        seen = torch.cat([torch.ones(2, 5, dtype=torch.long), mask], dim=1)
        states = stock(
            input_ids=ids, attention_mask=seen, query_embeds=queries, encoder_hidden_states=features
        ).last_hidden_state[:, :5]
        return projector.language_projection(states)

    expected, without = theirs(ids, mask), theirs(ids[:, :0], mask[:, :0])
    found = projector(features, (4, 6), qformer_input_ids=ids, qformer_attention_mask=mask)
    assert expected.std() > 0.1
    assert (expected - without).abs().max() > 0.1, "the text does not matter"
    parity("InstructBLIP", "Q-Former", (found - expected).abs().max())
    assert (found - expected).abs().max() < 1e-5
    assert (projector(features, (4, 6)) - without).abs().max() < 1e-5


def test_every_weight_of_a_q_former_that_reads_is_trained():
    """Distributed training stops at one that is not."""
    projector = build_projector({"type": "qformer", **OPTIONS, **READS}, 12, 20)
    projector(torch.randn(2, 24, 12), (4, 6), qformer_input_ids=torch.ones(2, 3, dtype=torch.long)).sum().backward()
    assert [name for name, parameter in projector.named_parameters() if parameter.grad is None] == []


def test_a_text_longer_than_its_places_is_refused():
    projector = build_projector({"type": "qformer", **OPTIONS, **READS}, 12, 20)
    with pytest.raises(ValueError, match="a text of 13 tokens, and the Q-Former has max_position_embeddings 12"):
        projector(torch.randn(1, 24, 12), (4, 6), qformer_input_ids=torch.ones(1, 13, dtype=torch.long))
