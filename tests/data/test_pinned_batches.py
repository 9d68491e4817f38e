"""Batches can be copied into pinned memory, which data loaders do by default on a GPU: no tensor overlaps itself."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_flatten_with_path

from tests.dual_encoders import SAVE
from tests.stock import STOCK, stock
from tests.tiny import ALL_FUSIONS, small_projector, tiny
from tests.training.helpers import examples
from tests.training.test_contrastive import loaded, pairs
from vlm.data.augmentation import Augmentation
from vlm.data.check import ProblemLog
from vlm.data.dataset import TreeCollator, TreeDataset, make_items, one_row_an_answer
from vlm.data.features import FeatureCache
from vlm.data.pairs import PairCollator, PairDataset
from vlm.data.stream import Layout, Mixture, StreamCollator, StreamDataset
from vlm.data.stream_sources import InMemory
from vlm.data.tree_masks import NotATree, TreeMasks
from vlm.training.blind import dealt
from vlm.training.throughput import CountingCollator

READS = small_projector("qformer") | {"use_qformer_text_input": True}
MODELS = {
    **{fusion: {"fusion": fusion} for fusion in ALL_FUSIONS},
    **{kind: {"tiling": {"type": kind, "max_tiles": 4}} for kind in ("tiles", "anyres", "idefics3", "internvl")},
    "tiles, cross_attention": {"fusion": "cross_attention", "tiling": {"type": "tiles", "max_tiles": 4}},
    "bidirectional": {"image_attention": "bidirectional"},
    "prefix_lm": {"image_attention": "prefix_lm"},
    "Q-Former that reads": {"projector": READS},
    "sliding windows": {"decoder": "gemma3"},
}


def items_of(processor, made, **options):
    return make_items(
        made, processor, max_length=1000, too_long="error", report=pytest.fail, progress=lambda n, _: n, **options
    )[0]


def overlapping(batch):
    """Return the paths of tensors that use an element more than once: `pin_memory` rejects them."""
    leaves, _ = tree_flatten_with_path(batch)
    return [path for path, leaf in leaves if isinstance(leaf, torch.Tensor) and torch._debug_has_internal_overlap(leaf)]


def test_an_expanded_tensor_is_found():
    """An expansion to one row uses no element twice."""
    mask = torch.ones(1, 2, 2)
    assert len(overlapping({"layout": {"a": mask, "b": mask.expand(3, 2, 2)}})) == 1
    assert not overlapping({"layout": {"a": mask.expand(1, 2, 2)}})


@pytest.mark.few(7)
@pytest.mark.parametrize("name", MODELS)
def test_batches_of_trees_and_of_plain_rows(name):
    model, processor = tiny(**MODELS[name])
    items = items_of(processor, [*examples(3, 3), *examples(1, 1)])
    trees = CountingCollator(TreeCollator(processor, masks=TreeMasks(model), answer_weighting="root_answers"))
    assert overlapping(trees(TreeDataset(items, 200).rows)) == []
    assert overlapping(trees([[items[0].blank()]])) == []
    rows = [[item] for item in one_row_an_answer(items)]
    assert overlapping(TreeCollator(processor, plain=True)(rows)) == []


@pytest.mark.few(4)
@pytest.mark.parametrize("name", STOCK)
def test_batches_for_models_of_transformers(name):
    model, processor = stock(name)
    items = items_of(processor, examples(2, 2))
    assert overlapping(TreeCollator(processor, plain=True)([[item] for item in one_row_an_answer(items)])) == []
    try:
        batch = TreeCollator(processor, masks=TreeMasks(model))([items])
    except NotATree:
        return  # it trains on plain rows
    assert overlapping(batch) == []


def test_batches_of_kept_features(tmp_path):
    model, processor = tiny()
    cache = FeatureCache(tmp_path)
    cache.write(["a", "b"], torch.randn(2, 16, 24), (4, 4))
    items = items_of(processor, examples(2, 3), features={0: ("a",), 1: ("b",)})
    for rows in ([[items[0]]], [items]):
        batch = TreeCollator(processor, cache, TreeMasks(model))(rows)
        assert "vision_features" in batch
        assert overlapping(batch) == []


def test_batches_with_the_images_of_other_examples():
    model, processor = tiny()
    rows = dealt(TreeDataset(items_of(processor, examples(3, 2)), 200))
    assert rows is not None
    assert overlapping(TreeCollator(processor, masks=TreeMasks(model))(rows.rows)) == []


def test_batches_of_streams():
    model, processor = tiny()
    layout = Layout(processor, max_length=500, too_long="error", max_tokens_per_row=200, seed=0)
    mixture = Mixture.of([InMemory(examples(6, 3))], None)
    data = StreamDataset(mixture, layout, batch_size=2, num_batches=2, readers=1, log=ProblemLog(0, 0.01))
    collate = StreamCollator(CountingCollator(TreeCollator(processor, masks=TreeMasks(model))))
    assert overlapping(collate(data.__getitems__([0, 1]))) == []


@pytest.mark.parametrize("name", SAVE)
def test_batches_of_pairs(name, tmp_path):
    model, processor = loaded(tmp_path, name)
    items = pairs(processor, model.config, [("a cat", "a dog"), ("a cat",), ("no",)])
    rows = PairDataset(items, augmentation=Augmentation(random_resized_crop={"scale": [0.3, 0.6]}))
    assert overlapping(PairCollator(processor, model.config)([rows[0], rows[1], rows[~2]])) == []
    cache = FeatureCache(tmp_path / "cache")
    cache.write(["a"], torch.randn(1, 1, 24), (1, 1))
    kept = [replace(item, features=("a",)) for item in items]
    assert overlapping(PairCollator(processor, model.config, cache)(kept)) == []
