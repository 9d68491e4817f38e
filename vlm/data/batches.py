"""Which rows make a batch: rows of about the same length, in another order in each epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from vlm.data.dataset import TreeDataset

ALIKE = 0.02
"""Rows whose lengths differ by so much, as a share, may change places from epoch to epoch."""


class RowSampler(Sampler[int]):
    """The order of `rows` in the epoch that they were dealt for: batches in random order, of rows of like length.

    transformers' `LengthGroupedSampler` does so within fifty batches at a time, or within a quarter of a small data
    set: of 100 rows of one caption, 5 % was padding in batches of 4 and 12 % in batches of 8. It draws from the global
    random generator; this order follows from the seed and the epoch of `rows` alone, so that a resumed run has the one
    that it would have had.

    `batch_size` counts the rows of an optimizer step: of all processes and accumulated batches together, so that it
    does not matter how they are divided. Rows that do not fill a batch come last; they are others in each epoch. After
    them comes a [blank row][`TreeDataset`] until there are as many as `multiple` divides, the rows that all processes
    compute at once; accelerate would fill up with rows of the epoch's beginning, which would then count twice.
    """

    def __init__(self, rows: TreeDataset, batch_size: int, multiple: int = 1) -> None:
        self.rows, self.batch_size, self.multiple = rows, batch_size, multiple

    def __len__(self) -> int:
        return len(self.rows) + self._blank

    @property
    def _blank(self) -> int:
        return -len(self.rows) % self.multiple

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.rows.seed}, {self.rows.epoch}, batches")
        about = [length * rng.uniform(1 - ALIKE, 1 + ALIKE) for length in self.rows.row_lengths]
        order = sorted(range(len(about)), key=lambda row: -about[row])
        whole, rest = divmod(len(order), self.batch_size)
        start = rng.randrange(whole + 1) * self.batch_size
        left, order[start : start + rest] = order[start : start + rest], []
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rng.shuffle(batches)
        return (row for batch in [*batches, left, [~row for row in left[-1:]] * self._blank] for row in batch)


def padding(lengths: Sequence[int], batch_size: int) -> float:
    """The share of token places that is padding, if rows of these lengths make batches in this order."""
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)
