"""Sums have a fixed order on a GPU, except in PyTorch's own kernels for the backward pass of a few layers."""

import pytest
import torch

from tests.emulated_gpu.cases import FUSIONS, MODELS, step
from tests.emulated_gpu.log import log
from tests.training.test_contrastive import loaded, pairs
from vlm.adapters.contrastive_loss import infonce
from vlm.data.pairs import PairCollator, positives
from vlm.training.pair_embeddings import MODEL_INPUTS, embed_pairs, logits_of
from vlm.tree_attention import sum_by_index

LIBRARY = {
    "_scaled_dot_product_cudnn_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_flash_attention_backward",
    "convolution_backward",
    "embedding_dense_backward",
}
"""What docs/training.md names."""


def unordered():
    return {name for name, _ in log.unordered} - LIBRARY


def test_what_is_unordered():
    """Two values in one place: by a list of places along a dimension, or by a place for each value."""
    log.clear()
    values, empty = torch.randn(2, 3, device="cuda"), torch.zeros(2, 3, device="cuda")
    places = {True: torch.tensor([0, 1, 1], device="cuda"), False: torch.tensor([0, 2, 1], device="cuda")}
    for twice in (False, True):
        empty.index_add(1, places[twice], values)
        empty.index_copy(1, places[twice], values)
        empty.scatter_add(1, places[twice].expand(2, 3), values)
        empty.index_put((places[False][:1], places[twice][:1]), values[0, :1], accumulate=True)
        assert len(log.unordered) == (3 if twice else 0)


@pytest.mark.parametrize("index", [[0, 0, 1, 3, 3, 3], [2], []])
def test_sums_by_index_equal_index_add(index):
    torch.manual_seed(0)
    places, values = torch.tensor(index, dtype=torch.long), torch.randn(len(index), 2, 3, dtype=torch.float64)
    log.clear()
    found = sum_by_index(values.cuda(), places.cuda(), 5)
    assert not log.unordered
    expected = torch.zeros(5, 2, 3, dtype=torch.float64).index_add_(0, places, values)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(
    "name", [*FUSIONS, *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n not in FUSIONS)]
)
def test_a_step_adds_in_a_fixed_order(name):
    log.clear()
    step("cuda", "fp32", MODELS[name])
    assert unordered() == set()


def test_a_contrastive_step_adds_in_a_fixed_order(tmp_path):
    model, processor = loaded(tmp_path, "clip")
    batch = PairCollator(processor, model.config)(pairs(processor, model.config, [("a cat", "a dog"), ("no",)]))
    batch = {key: value.cuda() for key, value in batch.items() if isinstance(value, torch.Tensor)}
    log.clear()
    embeds = embed_pairs(model.cuda().train(), 1, **{key: batch[key] for key in MODEL_INPUTS if key in batch})
    positive = positives(batch["image_ids"], batch["images_of_texts"], batch["text_ids"])
    infonce(logits_of(embeds), positive).backward()
    assert unordered() == set()
