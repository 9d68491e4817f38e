"""Attention to a shared beginning against SDPA over all of it. `tests/vlm/test_generate_text.py` has whole models."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.tiny import tiny
from vlm import shared_prefix as module
from vlm.shared_prefix import SharedPrefixLayer, can_share_prefix, shared_prefix, shared_prefix_forward

PREFIX_OF_ROW = torch.tensor([1, 0, 1, 2, 1])  # of three beginnings, one is had by three rows


def layers(heads=2, width=8):
    """The beginnings by themselves, and the same repeated for each row."""
    torch.manual_seed(0)
    beginnings, repeated = DynamicLayer(), DynamicLayer()
    keys, values = torch.randn(2, 3, heads, 5, width)
    beginnings.update(keys, values)
    repeated.update(keys[PREFIX_OF_ROW], values[PREFIX_OF_ROW])
    return SharedPrefixLayer(beginnings, PREFIX_OF_ROW), repeated


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("heads", [2, 6])
def test_equals_sdpa_over_everything(monkeypatch, heads, padded, biased):
    shared, repeated = layers()
    monkeypatch.setattr(module, "_cache", SimpleNamespace(get=lambda: SimpleNamespace(layers=[shared])))
    attention = SimpleNamespace(layer_idx=0, num_key_value_groups=heads // 2, is_causal=True)
    for length in (3, 1, 1):  # what remains of the prompt, and two tokens of the answer
        query = torch.randn(5, heads, length, 8)
        keys, values = torch.randn(2, 5, 2, length, 8)
        own, whole = shared.update(keys, values), repeated.update(keys, values)
        mask = torch.ones(length, whole[0].shape[2], dtype=torch.bool).tril(whole[0].shape[2] - length)
        mask = mask.expand(5, 1, -1, -1).clone()
        if padded:
            mask[0, :, :, 5:7] = mask[3, :, :, 5] = False  # left of what remains of the prompt
        options = {"scaling": 0.3, "position_bias": torch.randn(1, heads, *mask.shape[2:]) if biased else None}
        found, _ = shared_prefix_forward(attention, query, *own, mask if padded or biased else None, **options)
        expected, _ = sdpa_attention_forward(attention, query, *whole, mask, **options)
        seen = mask.any(-1)[:, 0]
        assert torch.allclose(found[seen], expected[seen], atol=1e-6)
        assert shared.get_seq_length() == repeated.get_seq_length()


def test_caches_that_do_not_keep_every_token_are_left_alone():
    model, _ = tiny("gemma3")  # has a sliding window
    assert not can_share_prefix(model, DynamicCache(config=model.config.get_text_config()))
    model, _ = tiny()
    assert can_share_prefix(model, DynamicCache(config=model.config.get_text_config()))
    model.config.get_text_config()._attn_implementation = "eager"
    assert not can_share_prefix(model, DynamicCache(config=model.config.get_text_config()))


def test_the_decoder_has_its_own_attention_back_afterwards():
    model, _ = tiny()
    config = model.config.get_text_config()
    shared, plain = layers()
    with shared_prefix(model, SimpleNamespace(layers=[shared])):
        assert config._attn_implementation == module.NAME
    assert config._attn_implementation == "sdpa"
    with shared_prefix(model, SimpleNamespace(layers=[plain])):
        assert config._attn_implementation == "sdpa"
