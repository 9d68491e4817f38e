"""The layout by hand, and the two ways to compute attention. `tests/data/test_trees.py` has loss and gradients."""

import pytest
import torch

from tests.tiny import tiny
from vlm import tree_attention as module
from vlm.attention import supports_own_attention
from vlm.data.conversation import TokenizedBranch
from vlm.data.trees import lay_out, make_tree
from vlm.tree_attention import tree_attention, tree_layout

X = -100


def tree(*branches):
    return make_tree([TokenizedBranch(list(ids), [*[X] * (len(ids) - 1), ids[-1]]) for ids in branches])


def test_the_layout_by_hand():
    shared = tree([1, 2, 3], [1, 2, 4])  # 1 | 2 3 | 2 4
    nothing_shared = tree([5, 6], [7, 8])  # 5 6 | 7 8
    layout = tree_layout([[shared, tree([9, 9])], [nothing_shared]])
    trunks, branches = [0, -1, 5, 6, 7, 8, 9, 10], [1, 2, 3, 4]  # rows are 7 tokens long, of which 3 are padding
    assert layout["token"].tolist() == trunks + branches
    assert layout["place"].tolist() == [0, 8, 9, 10, 11, 2, 3, 4, 5, 6, 7, -1, -1, -1]
    assert layout["trunk_of_branch"].tolist() == [0, 0]
    assert layout["trunk_mask"].tolist() == [[[True, False], [True, True]]], "the same for all"
    assert layout["branch_mask"].tolist() == [[[True, False, True, False], [True, False, True, True]]] * 2


def test_without_branches_that_share_there_are_only_trunks():
    layout = tree_layout([[tree([1, 2, 3])]])
    assert layout["token"].tolist() == layout["place"].tolist() == [0, 1, 2]
    assert layout["branch_mask"].shape[0] == layout["trunk_of_branch"].shape[0] == 0


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_products_equal_sdpa(heads):
    torch.manual_seed(0)
    query = torch.randn(5, heads[0], 3, 8, requires_grad=True)
    key, value = (torch.randn(5, heads[1], 7, 8, requires_grad=True) for _ in range(2))
    mask = torch.rand(5, 3, 7) < 0.5
    mask[..., 0] = True
    found, expected = (f(query, key, value, mask, 0.0, 0.3) for f in (module._products, module._sdpa))
    assert torch.allclose(found, expected, atol=1e-6)
    for one, other in zip(
        *(torch.autograd.grad(o.sin().sum(), (query, key, value)) for o in (found, expected)), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-6)


def test_the_decoder_has_its_own_attention_back_afterwards():
    model, _ = tiny()
    assert supports_own_attention(model)
    with tree_attention(model):
        assert model.config.text_config._attn_implementation == module.NAME
    assert model.config.text_config._attn_implementation == "sdpa"


def test_a_decoder_with_another_attention_keeps_it():
    model, _ = tiny()
    model.config.text_config._attn_implementation = "eager"
    assert not supports_own_attention(model)
    with tree_attention(model):
        assert model.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize("decoder", ["llama", "gemma3"])
def test_rows_without_a_mask_get_the_decoders_own(decoder):
    """Padding, and a window of 8, as with SDPA."""
    model, _ = tiny(decoder)
    ids = torch.arange(1, 41).view(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        with tree_attention(model):
            assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


def test_without_a_layout_it_is_sdpa():
    model, _ = tiny()
    rows = lay_out([[tree([1, 2, 3], [1, 2, 4])]], 0)
    rows.pop("labels")
    with torch.no_grad():
        expected = model(**rows).logits
        with tree_attention(model):
            assert torch.equal(model(**rows).logits, expected)
