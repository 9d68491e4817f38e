"""Batches of rows of like length: little padding, every item once an epoch, the same order after a resume."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from vlm.data.batches import RowSampler, padding
from vlm.data.dataset import TreeDataset, TreeItem
from vlm.data.example import Example, question_and_answer
from vlm.data.trees import Tree

ANSWER = question_and_answer("", "a cat", num_images=0)


def item(number, length):
    tree = Tree([0] * length, [0] * length, list(range(length)), [1] * length)
    return TreeItem(tree, Example((), (ANSWER,), str(number), ""))


def mix(count=300):
    """Images with 1 to 20 captions of 4 to 30 tokens behind a prompt of 20: 24 to 620 tokens."""
    rng = random.Random(0)
    return [item(n, 20 + sum(rng.randint(4, 30) for _ in range(rng.randint(1, 20)))) for n in range(count)]


def lengths_in_order(rows, order):
    return [sum(len(item.tree) for item in rows[row]) for row in order]


def padded(lengths, batch_size):
    """The share by counting every place."""
    places = real = 0
    for start in range(0, len(lengths), batch_size):
        batch = lengths[start : start + batch_size]
        places += max(batch) * len(batch)
        real += sum(batch)
    return 1 - real / places


@pytest.mark.parametrize("max_tokens", [1, 160, 500])
@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_little_of_an_epoch_is_padding_and_every_item_comes_once(max_tokens, batch_size):
    items = mix()
    rows = TreeDataset(items, max_tokens, seed=3)
    for epoch in range(3):
        rows.set_epoch(epoch)
        order = list(RowSampler(rows, batch_size))
        lengths = lengths_in_order(rows, order)
        assert padded(lengths, batch_size) < 0.05
        assert padding(lengths, batch_size) == pytest.approx(padded(lengths, batch_size))
        seen = Counter(item.example.image_id for row in order for item in rows[row])
        assert seen == Counter(item.example.image_id for item in items)
        assert len(order) == len(rows) == len(RowSampler(rows, batch_size))
    shuffled = random.Random(0).sample(lengths, len(lengths))
    assert max_tokens == 500 or padded(shuffled, batch_size) > 0.15, "a random order must be worse for this to say much"


@pytest.mark.parametrize("max_tokens", [1, 160, 500])
def test_rows_as_they_stand_make_batches_with_little_padding(max_tokens):
    """As they are evaluated."""
    rows = TreeDataset(mix(), max_tokens)
    lengths = lengths_in_order(rows, range(len(rows)))
    assert lengths == rows.row_lengths == sorted(lengths, reverse=True)
    assert padded(lengths, 8) < 0.05


def test_batches_are_others_in_each_epoch_and_the_same_after_a_resume():
    def batches(epoch, seed=0):
        rows = TreeDataset(mix(), 160, seed)
        rows.set_epoch(epoch)
        order = list(RowSampler(rows, 4))
        return [order[i : i + 4] for i in range(0, len(order), 4)]

    assert batches(1) == batches(1)
    assert batches(1) != batches(1, seed=1)
    one, other = ({frozenset(batch) for batch in batches(epoch)} for epoch in (0, 1))
    assert len(one & other) < len(one) / 4, "rows of nearly the same length change places"
    means = [sum(batch) / 4 for batch in batches(0)]
    long_first = sum(a < b for a, b in pairwise(means)) / len(means)
    assert 0.3 < long_first < 0.7, "long and short batches are mixed"


def test_rows_that_fill_no_batch_come_last_and_are_others_each_time():
    rows = TreeDataset(mix(42), 1)
    left = set()
    for epoch in range(12):
        rows.set_epoch(epoch)
        order = list(RowSampler(rows, 4))
        left.add(frozenset(order[40:]))
        lengths = [rows.row_lengths[row] for row in order[40:]]
        assert max(lengths) < 1.25 * min(lengths)
    assert len(left) > 4


def test_padding_by_hand():
    assert padding([4, 3, 2], 2) == pytest.approx(1 - 9 / (8 + 2))
    assert padding([4, 4], 2) == 0
