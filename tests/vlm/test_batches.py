"""Batches by tokens: every request once, within the limit, the same images together."""

import numpy as np
import pytest

from vlm.batches import batches_of


def test_by_hand():
    lengths, keys = [10, 7, 10, 3, 9], ["a", "b", "a", "b", "c"]
    assert list(batches_of(lengths, keys, 30)) == [[0, 2, 4], [1, 3]]
    assert list(batches_of(lengths, keys, 20)) == [[0, 2], [4], [1, 3]], "b stays together"
    assert list(batches_of(lengths, keys, 1)) == [[0], [2], [4], [1], [3]]
    assert list(batches_of([], [], 30)) == []


@pytest.mark.parametrize("limit", [1, 40, 100, 300, 10_000])
@pytest.mark.parametrize("seed", range(3))
def test_properties(limit, seed):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, 200).tolist()
    keys = random.integers(0, 50, 200).tolist()
    batches = list(batches_of(lengths, keys, limit))
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= limit
    for key in set(keys):
        rows = [row for row in range(200) if keys[row] == key]
        if len(rows) * max(lengths[row] for row in rows) <= limit:
            assert sum(any(keys[row] == key for row in batch) for batch in batches) == 1, "parted"


def test_little_is_padded_and_few_batches_are_needed():
    random = np.random.default_rng(0)
    lengths = random.integers(20, 400, 1000).tolist()
    batches = list(batches_of(lengths, range(1000), 4000))
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.05 * sum(lengths)
    assert len(batches) < 1.1 * sum(lengths) / 4000
    assert max(lengths) == lengths[batches[0][0]], "the longest come first"
