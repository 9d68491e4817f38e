"""A stream in training: from the sources of a recipe to batches, how many make an epoch, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from transformers import TrainingArguments

from vlm.data.check import ProblemLog
from vlm.data.dataset import TreeItem
from vlm.data.example import Example
from vlm.data.stream import Layout, Mixture, StreamDataset, first_window, opened_items
from vlm.data.stream_sources import in_pieces
from vlm.errors import UserError
from vlm.recipe import Recipe, Stage
from vlm.recipe_data import Data

SAMPLE = 256
"""Items that are tried before training: for the check of trees, the time of a step and the start of a projector."""


def mixture_of(data: Data, read_whole: Callable[[dict[str, Any]], list[Example]]) -> Mixture:
    """The sources of training; those that are not streamed are read by `read_whole`."""
    return Mixture.of([in_pieces(source, Path(data.base_dir), read_whole) for source in data.sources], data.weights)


def stream_layout(recipe: Recipe, stage: Stage, processor: Any, max_positions: int | None) -> Layout:
    """How a stage makes rows of examples. With a frozen language model nothing learns from text alone."""
    data = recipe.data
    return Layout(
        processor,
        data.max_length,
        data.too_long,
        data.max_tokens_per_row,
        recipe.seed,
        data.augmentation,
        without_text=not {"language", "lora"} & stage.learning_rates.keys(),
        max_positions=max_positions,
    )


@dataclass
class Stream:
    """What a stage trains on, if that is streamed."""

    mixture: Mixture
    layout: Layout
    log: ProblemLog

    def one_row_an_answer(self) -> Stream:
        """The same without trees."""
        return replace(self, layout=replace(self.layout, plain=True))

    def sample(self) -> list[TreeItem]:
        """Some of it whose images open."""
        return opened_items(self.mixture, self.layout, SAMPLE)

    def rows(self, args: TrainingArguments) -> StreamDataset:
        """All of it, with as many batches in an epoch as its rows will make, going by the first of them.

        Raises UserError where the number of rows is not known and none of steps is set, and for arguments with which
        batches come in another order.
        """
        if args.auto_find_batch_size or not args.dataloader_in_order:
            key = "auto_find_batch_size" if args.auto_find_batch_size else "dataloader_in_order"
            raise UserError(f"train.{key} does not go with data that is streamed, whose place it would lose; remove it")
        processes, size = args.world_size, args.train_batch_size
        if self.mixture.num_rows is not None:
            window = first_window(self.mixture, self.layout, size)
            batches = self.mixture.num_rows * len(window.batches) / window.num_rows
            num_batches = max(1, round(batches / processes)) * processes
        elif args.max_steps > 0:
            num_batches = args.max_steps * args.gradient_accumulation_steps * processes
        else:
            raise UserError(
                "how many rows the streamed data has is not known without reading it, and so not how long an epoch is: "
                "set train.max_steps in place of num_train_epochs"
            )
        return StreamDataset(
            self.mixture,
            self.layout,
            batch_size=size,
            num_batches=num_batches,
            readers=processes * max(1, args.dataloader_num_workers),
            log=self.log,
        )

    def table(self) -> dict[str, str]:
        """What the table before training says of it."""
        rows = self.mixture.num_rows
        pieces = sum(len(source) for source in self.mixture.sources)
        known = "rows not counted" if rows is None else f"{rows:,} rows"
        return {"stream": f"{known}, in {pieces:,} pieces; what follows is of a sample"}


def report(rows: StreamDataset, max_length: int, console: Console) -> None:
    """Say what was left out, and note what is bad, of all processes. They call it together; the first one speaks."""
    everything = gather_object([rows.found])
    if not PartialState().is_main_process:
        return
    total, *others = everything
    for found in others:
        total.add(found)
        rows.log.total += found.answers
        rows.log.extend(found.problems)
    if total.left_out.branches:
        console.print(total.left_out.in_words(max_length, "training"), highlight=False)
    if total.of_text:
        console.print(
            f"{total.of_text:,} examples without images left out: with a frozen language model nothing learns from "
            "them",
            highlight=False,
        )
