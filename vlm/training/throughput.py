"""How fast training is: images, answers and tokens a second, padding, the use of the device, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from vlm.data.conversation import IGNORE
from vlm.data.dataset import Row
from vlm.training.memory import peak, reset_peak


@dataclass
class CountingCollator:
    """The batch that `collate` makes, with its [`row_counts`] as `counts`, and its `examples` by file and row."""

    collate: Callable[[Sequence[Row]], dict[str, Any]]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        examples = list(dict.fromkeys(item.example.where for row in rows for item in row))
        return self.collate(rows) | {"counts": row_counts(rows), "examples": examples}


def row_counts(rows: Sequence[Row]) -> Tensor:
    """`[B, 3]`: images, answers and tokens of each row; 0 of a blank one."""
    counted = [[item for item in row if item.tree.labels.count(IGNORE) < len(item.tree)] for row in rows]
    return torch.tensor(
        [
            [
                sum(len(item.example.images) for item in row),
                sum(item.answers for item in row),
                sum(len(item.tree) for item in row),
            ]
            for row in counted
        ]
    )


class Throughput(TrainerCallback):
    """Counts what all processes train on, and times the steps; gradient accumulation and waiting for data included,
    evaluation and saving not.

    transformers' own counts are of other things: `include_num_input_tokens_seen` counts padding, or sums the attention
    mask, which is square here; `total_flos` takes every weight for trained, and images for free.

    `flops_per_token` and `peak_flops` (per second, of one process's device) are set by who has measured them; until
    then there is no `mfu`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.flops_per_token = self.peak_flops = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.device = args.device
        self.counts = torch.zeros(4, dtype=torch.long, device=self.device)
        self.seconds = 0.0
        self.total, self.total_seconds = torch.zeros_like(self.counts), 0.0
        reset_peak(self.device)
        self.since = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += self.clock() - self.since
        self.since = self.clock()

    def _go_on(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = self.clock()

    on_log = on_evaluate = on_save = _go_on

    def count(self, counts: Tensor, places: int) -> None:
        """Add a batch's [`row_counts`] `[B, 3]` and its token places, padding included."""
        self.counts += torch.cat([counts.sum(dim=0), counts.new_tensor([places])])

    def since_last(self, accelerator: Any) -> dict[str, float]:
        """What is logged of the steps since the last call. All processes call it together."""
        each = accelerator.gather(torch.cat([self.counts, self.counts.new_tensor([peak(self.device)])])[None])
        counts, self.memory, self.processes = each[:, :4].sum(dim=0), int(each[:, 4].max()), len(each)
        seconds = self.seconds
        self.total += counts
        self.total_seconds += seconds
        self.counts.zero_()
        self.seconds = 0.0
        return self._rates(counts, seconds)

    def whole(self, accelerator: Any) -> dict[str, float]:
        """The same of all steps since training began, or was resumed."""
        self.since_last(accelerator)
        return self._rates(self.total, self.total_seconds)

    def _rates(self, counts: Tensor, seconds: float) -> dict[str, float]:
        images, answers, tokens, places = counts.tolist()
        if not places or not seconds:
            return {}
        rates = {
            "images_per_second": images / seconds,
            "answers_per_second": answers / seconds,
            "tokens_per_second": tokens / seconds,
            "padding": 1 - tokens / places,
        }
        if self.peak_flops:
            rates["mfu"] = self.flops_per_token * tokens / seconds / (self.peak_flops * self.processes)
        rates["peak_memory_gb"] = self.memory / 1e9
        return {name: float(f"{value:.4g}") for name, value in rates.items()}


def in_words(rates: Mapping[str, float]) -> str:
    """The rates in a line."""
    words = [f"{rates[f'{name}_per_second']:,.4g} {name}/s" for name in ("images", "answers", "tokens")]
    words.append(f"padding {rates['padding']:.1%}")
    if "mfu" in rates:
        words.append(f"MFU {rates['mfu']:.0%}")
    return ", ".join([*words, f"peak memory {rates['peak_memory_gb']:.1f} GB"])
