"""Every side that `run.py` can start, by name."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.inference_sides import OurChat, OurEvaluation, StockChat, StockEvaluation
from benchmarks.training_sides import Ours, Plain, Trl

SIDES: dict[str, Any] = {
    "ours": Ours,
    "trl": Trl,
    "trainer": Plain,
    "turns": partial(Plain, turns=True),
    "our evaluation": OurEvaluation,
    "generate": StockEvaluation,
    "our chat": OurChat,
    "re-prefilling": StockChat,
}
