"""The order of a stream, computed from seed and place alone: who reads which piece, and how much of which source.

A shuffle buffer would have to be saved with its images, or filled again, to go on from the middle. Here a place in the
stream is a few numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vlm.data.readers_common import SourceError
from vlm.data.stream_sources import Pieces, Place


class Cursor(NamedTuple):
    """How far a reader is: how many pieces it has read, and the next row of the one it reads."""

    pieces: int = 0
    row: int = 0


class TakenRow(NamedTuple):
    """A row, and in which pass over its source it was read."""

    epoch: int
    place: Place
    content: Any


class Reader:
    """The share of reader `number` of `readers` in a source, pass after pass, from `cursor` on.

    In each pass the pieces have another order, and the readers take them in turn, also from one pass to the next: in a
    pass each row goes to one reader, and none waits for another. Where there are fewer pieces than readers, several
    read the same one, and each takes its share of the rows.
    """

    def __init__(self, source: Pieces, number: int, readers: int, seed: str, cursor: Cursor) -> None:
        self.source, self.number, self.readers, self.seed, self.cursor = source, number, readers, seed, cursor
        self.shares = -(-readers // len(source))
        self._rows: Iterator[Any] | None = None
        self._order: tuple[int, list[int]] = (-1, [])

    def take(self, count: int) -> list[TakenRow]:
        """The next `count` rows. Raises SourceError if there is none in as many pieces as the source has."""
        taken: list[TakenRow] = []
        empty = 0
        while len(taken) < count:
            epoch, piece, share = self._piece()
            if self._rows is None:
                self._rows = self.source.rows(piece, self.cursor.row)
            before = len(taken)
            for content in self._rows:
                row = self.cursor.row
                self.cursor = self.cursor._replace(row=row + 1)
                if row % self.shares == share:
                    taken.append(TakenRow(epoch, Place(piece, row), content))
                    if len(taken) == count:
                        return taken
            self.cursor, self._rows = Cursor(self.cursor.pieces + 1), None
            empty = 0 if len(taken) > before else empty + 1
            if empty > len(self.source) * self.shares:
                raise SourceError(f"a data set has no rows, or fewer than the {self.readers} processes that read it")
        return taken

    def _piece(self) -> tuple[int, int, int]:
        """The pass, the piece and the share of it that is being read."""
        everything = len(self.source) * self.shares
        epoch, place = divmod(self.cursor.pieces * self.readers + self.number, everything)
        if self._order[0] != epoch:
            order = random.Random(f"{self.seed}, {epoch}").sample(range(everything), everything)
            self._order = (epoch, order)
        return epoch, *divmod(self._order[1][place], self.shares)


def quotas(weights: Sequence[float], window: int, size: int) -> list[int]:
    """How many rows of each source are in a window of `size` rows, so that over all windows the shares are `weights`
    (which sum to 1). Rounding is carried over, so that a rare source has its turn."""
    return [int((window + 1) * size * weight + 0.5) - int(window * size * weight + 0.5) for weight in weights]
