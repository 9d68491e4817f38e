"""Training on a stream: windows of rows, packed and dealt into batches by readers that know their place.

A window is the next `WINDOW` rows of a reader. Its examples are tokenized, packed and dealt into batches as a whole
data set would be; images are opened when their batch is wanted. All of it follows from the seed and the place, so that
a resumed run tokenizes one window again; where tokens do not depend on pixels it opens no image of what was done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from vlm.data.augmentation import Augmentation
from vlm.data.batches import RowSampler
from vlm.data.check import ProblemLog, image_problem
from vlm.data.dataset import LeftOut, Row, TreeDataset, TreeItem, make_items, one_row_an_answer
from vlm.data.example import Example, Problem
from vlm.data.images import ImageError
from vlm.data.stream_order import Cursor, Reader, quotas
from vlm.data.stream_sources import Pieces
from vlm.errors import UserError

WINDOW = 1000
"""Rows, or as many as there are. Each reader has those of one window in memory, with their encoded images."""
ROWS_OF_A_SHARE = 1_000_000_000
"""A source must have at least one of so many rows."""
EMPTY_WINDOWS = 10
"""After so many without one usable row a stream is given up."""


@dataclass
class Mixture:
    """Sources that are streamed, and the share of each in the rows."""

    sources: list[Pieces]
    weights: list[float]

    @classmethod
    def of(cls, sources: Sequence[Pieces], weights: Sequence[float] | None) -> Mixture:
        """With `weights` in any unit; without them each row counts the same.

        Raises UserError where there are none, and the number of rows is not known either; and for a weight that is as
        good as none next to the others.
        """
        known, given = [source.num_rows for source in sources], weights is not None
        if weights is None and len(sources) > 1:
            if None in known:
                raise UserError("how many rows a streamed source has is not known: give each source a `weight`")
            weights = [float(rows or 0) for rows in known]
        weights = weights or [1.0]
        scaled = [weight / (max(weights) or 1.0) for weight in weights]  # the sum of large ones is infinite
        shares = [weight / (sum(scaled) or 1.0) for weight in scaled]
        if given and min(shares) * ROWS_OF_A_SHARE < 1:
            number = shares.index(min(shares))
            raise UserError(
                f"data.train.{number}.weight: {weights[number]:g} next to {max(weights):g} is less than one row in "
                f"{ROWS_OF_A_SHARE:,}: raise it, or remove the source"
            )
        return cls(list(sources), shares)

    @property
    def num_rows(self) -> int | None:
        """The rows of all sources, which is what an epoch has; None if it is not known."""
        known = [source.num_rows for source in self.sources]
        return None if None in known else sum(rows or 0 for rows in known)


@dataclass
class Layout:
    """How examples become rows: what a recipe's `data` says, and `plain` for models that take no trees. With
    `without_text` examples of text alone are left out."""

    processor: Any
    max_length: int
    too_long: Literal["skip", "drop_branches", "error"]
    max_tokens_per_row: int
    seed: int
    augmentation: Augmentation | None = None
    without_text: bool = False
    plain: bool = False
    max_positions: int | None = None


@dataclass
class Position:
    """Where a reader is: the window, where each source stood when it began, and how many of its batches are done."""

    window: int = 0
    cursors: list[Cursor] = field(default_factory=list)
    batch: int = 0


@dataclass
class Found:
    """What was met in reading: answers, good and bad, what is bad, too long, or of text alone. Answers are counted in
    the first pass over a source. A problem of a later pass has `lost=0`: some process has counted it already."""

    answers: int = 0
    problems: list[Problem] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    of_text: int = 0

    def add(self, other: Found) -> None:
        self.answers += other.answers
        self.problems += other.problems
        self.of_text += other.of_text
        self.left_out.examples += other.left_out.examples
        self.left_out.branches += other.left_out.branches
        self.left_out.longest = max(self.left_out.longest, other.left_out.longest)
        self.left_out.positions = max(self.left_out.positions, other.left_out.positions)


@dataclass
class Trained:
    """What a batch says when it has been trained on: its reader is at `position`, and this was `found` on the way."""

    reader: int
    position: Position
    found: Found


class StreamBatch(list[Row]):
    """The rows of a batch, their images opened."""

    trained: Trained


@dataclass
class StreamCollator:
    """The batch that `collate` makes, with what [`StreamDataset.trained`] wants as `trained`."""

    collate: Callable[[Sequence[Row]], dict[str, Any]]

    def __call__(self, rows: StreamBatch) -> dict[str, Any]:
        return self.collate(rows) | {"trained": rows.trained}


class Window:
    """`num_rows` rows of the sources as batches; those that are not wanted cost no image. Examples of a later pass are
    named in `repeated`."""

    def __init__(
        self,
        num_rows: int,
        examples: list[Example],
        found: Found,
        layout: Layout,
        seed: str,
        batch_size: int,
        repeated: Collection[str] = (),
    ) -> None:
        self.num_rows, self.found, self.repeated = num_rows, found, repeated
        items = self._items(examples, layout)
        self.rows = TreeDataset(items, layout.max_tokens_per_row, seed, layout.augmentation)
        if not len(self.rows):
            self.batches: list[list[int]] = []
            return
        # The last batch of a window would mostly be a small one; so all are a little smaller instead.
        size = -(-len(self.rows) // -(-len(self.rows) // batch_size))
        order = list(RowSampler(self.rows, size))
        self.batches = [order[start : start + size] for start in range(0, len(order), size)]

    def _items(self, examples: list[Example], layout: Layout) -> list[TreeItem]:
        if layout.without_text:
            shown = [example for example in examples if example.images]
            self.found.of_text += len(examples) - len(shown)
            examples = shown
        items, self.found.left_out = make_items(
            examples,
            layout.processor,
            max_length=layout.max_length,
            max_positions=layout.max_positions,
            too_long=layout.too_long,
            report=lambda problem: self.found.problems.append(self._counted_once(problem)),
            open_images=not getattr(layout.processor, "fixed_image_tokens", False),
            progress=lambda steps, total: steps,
        )
        return one_row_an_answer(items) if layout.plain else items

    def _counted_once(self, problem: Problem) -> Problem:
        # An image is named after its row: "rows.jsonl:12: a.png".
        again = any(f"{problem.where}: ".startswith(f"{where}: ") for where in self.repeated)
        return replace(problem, lost=0) if again else problem

    def batch(self, number: int, found: Found) -> list[Row]:
        """The rows of a batch, their images opened, without what does not open, which is added to what was `found`."""
        broken: dict[str, Problem] = {}
        rows: list[Row] = []
        for row in self.batches[number]:
            opened: Row = []
            for item in self.rows[row]:
                try:
                    opened.append(replace(item, opened=tuple(item.open_images()), augmentation=None))
                except ImageError as error:
                    broken[item.example.where] = image_problem(error, item.example)
            rows += [opened] if opened else []
        found.problems += map(self._counted_once, broken.values())
        return rows


class StreamReader:
    """Reader `number` of `readers`, which goes through all sources of a mixture at once, from `position` on."""

    def __init__(
        self, mixture: Mixture, layout: Layout, batch_size: int, number: int, readers: int, position: Position | None
    ) -> None:
        self.mixture, self.layout, self.batch_size, self.number = mixture, layout, batch_size, number
        self.position = position or Position(cursors=[Cursor()] * len(mixture.sources))
        self.seed = f"{layout.seed}, {number} of {readers}"
        rows = mixture.num_rows  # a window that is no longer than an epoch has no row twice
        self.size = WINDOW if rows is None else min(WINDOW, -(-rows // readers))
        self.sources = [
            Reader(source, number, readers, f"{layout.seed}, {index}", cursor)
            for index, (source, cursor) in enumerate(zip(mixture.sources, self.position.cursors, strict=True))
        ]
        self.window: Window | None = None

    def open_window(self) -> Window:
        """The window at `position`, which the sources stand before."""
        examples: list[Example] = []
        found = Found()
        first: set[str] = set()
        counts = quotas(self.mixture.weights, self.position.window, self.size)
        for reader, count in zip(self.sources, counts, strict=True):
            # Where a pass ends and the next begins, an image may come twice, and is then no example with two answers.
            for epoch, rows in groupby(reader.take(count), key=lambda row: row.epoch):
                read = reader.source.examples([(row.place, row.content) for row in rows])
                examples += read.examples
                if epoch == 0:
                    found.problems += read.problems
                    found.answers += 0 if reader.source.counted else read.total
                    first |= {example.where for example in read.examples}
                else:
                    found.problems += [replace(problem, lost=0) for problem in read.problems]
        seed = f"{self.seed}, {self.position.window}"
        repeated = {example.where for example in examples} - first
        return Window(sum(counts), examples, found, self.layout, seed, self.batch_size, repeated)

    def next(self) -> StreamBatch:
        """The next batch.

        Raises UserError if window after window has nothing to learn from.
        """
        found = Found()
        for _ in range(EMPTY_WINDOWS):
            if self.window is None:
                self.window = self.open_window()
                if self.position.batch == 0:  # else it was said before the run was resumed
                    found.add(self.window.found)
            while self.position.batch < len(self.window.batches):
                rows = self.window.batch(self.position.batch, found)
                self.position = replace(self.position, batch=self.position.batch + 1)
                if rows:
                    if self.position.batch == len(self.window.batches):
                        self._leave_window()
                    batch = StreamBatch(rows)
                    batch.trained = Trained(self.number, self.position, found)
                    return batch
            self._leave_window()
        raise nothing_to_learn_from(found)

    def _leave_window(self) -> None:
        self.position = Position(self.position.window + 1, [reader.cursor for reader in self.sources])
        self.window = None


def nothing_to_learn_from(found: Found) -> UserError:
    """What to say of many rows that cannot be used."""
    reasons = "".join(f"\n  {problem}" for problem in found.problems[:5])
    model = f" or the {found.left_out.positions} positions of the model" if found.left_out.positions else ""
    long = (
        f"\n  {found.left_out.branches:,} answers are too long for data.max_length{model}"
        if found.left_out.branches
        else ""
    )
    of_text = f"\n  {found.of_text:,} have no image, and the language model is frozen" if found.of_text else ""
    return UserError(f"there is not one usable row among many of the stream{reasons}{long}{of_text}")


class StreamDataset(Dataset[Row]):
    """A stream as a data set of `num_batches` batches in an epoch, of all processes together; an index is a place for a
    row in a batch, and only whole batches can be asked for, by each worker in order.

    Batch number n, counted over all epochs, is made by reader n modulo `readers`, which is one for each worker of each
    process. Each process must call `trained` with what came with each batch, in order: a worker that is started later
    goes on from there.
    """

    def __init__(
        self, mixture: Mixture, layout: Layout, *, batch_size: int, num_batches: int, readers: int, log: ProblemLog
    ) -> None:
        self.mixture, self.layout = mixture, layout
        self.batch_size, self.num_batches, self.readers, self.log = batch_size, num_batches, readers, log
        self.positions: dict[int, Position] = {}
        self.found = Found()
        self.epoch = 0
        self._readers: dict[int, StreamReader] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __getitems__(self, indices: Sequence[int]) -> StreamBatch:
        number = (self.epoch * self.num_batches + indices[0] // self.batch_size) % self.readers
        if number not in self._readers:
            self._readers[number] = StreamReader(
                self.mixture, self.layout, self.batch_size, number, self.readers, self.positions.get(number)
            )
        return self._readers[number].next()

    def trained(self, batch: Trained) -> None:
        """Note that a batch has been trained on.

        Raises TooManyProblems if more than `max_bad` of what was read so far is bad.
        """
        self.positions[batch.reader] = batch.position
        self._note(batch.found)

    def _note(self, found: Found) -> None:
        # In the next epoch they come again.
        known = {(p.where, p.key): p.lost for p in self.found.problems} if found.problems else {}
        new = [p for p in found.problems if known.get((p.where, p.key), -1) < p.lost]
        self.found.add(replace(found, problems=new))
        self.log.total += found.answers
        self.log.extend(new)

    def save(self, file: Path) -> None:
        """Write where the readers of this process are."""
        positions = {number: asdict(position) for number, position in self.positions.items()}
        file.write_text(json.dumps({"readers": self.readers, "positions": positions, "found": asdict(self.found)}))

    def restore(self, file: Path) -> None:
        """Go on from there.

        Raises UserError if there were more or fewer readers, each of which has its own place.
        """
        if not file.is_file():
            raise UserError(
                f"{file} is missing: the run was begun without streaming, with fewer processes, or with save_only_model"
            )
        saved = json.loads(file.read_text())
        if saved["readers"] != self.readers:
            raise UserError(
                f"this run was begun with {saved['readers']} processes that read the stream, and there are now "
                f"{self.readers}; resume it with as many processes and train.dataloader_num_workers as before"
            )
        self.positions = {
            int(number): Position(at["window"], [Cursor(*cursor) for cursor in at["cursors"]], at["batch"])
            for number, at in saved["positions"].items()
        }
        found = saved["found"]
        problems = [Problem(**problem) for problem in found["problems"]]
        self._note(Found(found["answers"], problems, LeftOut(**found["left_out"]), found["of_text"]))


def first_window(mixture: Mixture, layout: Layout, batch_size: int) -> Window:
    """The first window of a reader that is alone: the same for all processes."""
    return StreamReader(mixture, layout, batch_size, 0, 1, None).open_window()


def opened_items(mixture: Mixture, layout: Layout, count: int) -> list[TreeItem]:
    """Up to `count` items of the first window whose images open.

    Raises UserError if there are none.
    """
    window = first_window(mixture, layout, 1)
    items: list[TreeItem] = []
    for item in window.rows.items:
        try:
            item.open_images()
        except ImageError as error:
            window.found.problems.append(image_problem(error, item.example))
            continue
        items.append(item)
        if len(items) == count:
            break
    if not items:
        raise nothing_to_learn_from(window.found)
    return items
