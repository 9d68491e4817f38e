"""Who reads what of a stream, counted row by row."""

from collections import Counter

import pytest

from vlm.data.readers_common import SourceError
from vlm.data.stream_order import Cursor, Reader, quotas


class Numbers:
    """Pieces of the given sizes, whose rows are numbered over all of them."""

    def __init__(self, *sizes):
        self.sizes = sizes
        self.num_rows = sum(sizes)

    def __len__(self):
        return len(self.sizes)

    def rows(self, piece, start=0):
        first = sum(self.sizes[:piece])
        return iter(range(first + start, first + self.sizes[piece]))


def reader(source, number=0, readers=1, seed="0", cursor=Cursor()):
    return Reader(source, number, readers, seed, cursor)


def whole_passes(source, readers, passes):
    """What all readers take of the first passes: each reads until it is beyond them."""
    taken = []
    for number in range(readers):
        mine = reader(source, number, readers)
        rows = [mine.take(1)[0]]
        while rows[-1].epoch < passes:
            rows += mine.take(1)
        taken += [row for row in rows if row.epoch < passes]
    return taken


@pytest.mark.parametrize("readers", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [(7, 1, 12, 5, 3, 9, 4, 6, 2, 11), (40,), (9, 30), (5, 0, 25, 0)], ids=str)
def test_in_each_pass_each_row_goes_to_one_reader(sizes, readers):
    taken = whole_passes(Numbers(*sizes), readers, passes=3)
    for epoch in range(3):
        counts = Counter(row.content for row in taken if row.epoch == epoch)
        assert counts == Counter(range(sum(sizes)))


def test_each_pass_has_an_order_of_its_own_that_follows_the_seed():
    source = Numbers(*[2] * 20)

    def order(seed):
        rows = reader(source, seed=seed).take(80)
        return [row.content for row in rows[:40]], [row.content for row in rows[40:]]

    first, second = order("0")
    assert first != second != sorted(second)
    assert sorted(first) == sorted(second) == list(range(40))
    assert order("0") == (first, second)
    assert order("1") != (first, second)


@pytest.mark.parametrize("readers", [1, 3, 8])
def test_a_reader_goes_on_from_where_another_was(readers):
    source = Numbers(7, 1, 12, 5)
    for number in range(readers):
        whole = reader(source, number, readers).take(40)
        for done in range(1, 40, 4):
            one = reader(source, number, readers)
            assert one.take(done) + reader(source, number, readers, cursor=one.cursor).take(40 - done) == whole


def test_more_readers_than_rows_are_refused_and_nothing_is_waited_for():
    with pytest.raises(SourceError, match="no rows, or fewer than the 1 processes"):
        reader(Numbers(0, 0)).take(1)
    with pytest.raises(SourceError, match="fewer than the 50 processes"):
        [reader(Numbers(3), number, 50).take(50) for number in range(50)]


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.3, 0.2], [0.9997, 0.0003]], ids=str)
def test_quotas_add_up_to_the_weights(weights):
    windows = [quotas(weights, window, 100) for window in range(200)]
    assert all(min(counts) >= 0 for counts in windows)
    for counts, weight in zip(zip(*windows, strict=True), weights, strict=True):
        assert abs(sum(counts) - 20_000 * weight) <= 0.5, "a rare source has its turn"
    assert all(abs(sum(counts) - 100) <= 1 for counts in windows)
