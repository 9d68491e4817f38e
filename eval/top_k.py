"""Top-k accuracy, which of images and texts is recall at k: how often one of the first k candidates is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm.eval.metrics import Scores, bootstrap_interval, mean


@dataclass(frozen=True)
class Share:
    """A share of the queries, and its 95 % bootstrap interval over them."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def first_right(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The place, from 0, of each query's best right candidate `[queries]`; a tie with a wrong candidate counts as lost.

    Args:
        scores: `[queries, candidates]`, higher is nearer.
        right: `[queries, candidates]`, true where the candidate is right.

    Raises ValueError if shapes differ, a score is NaN, or a query has no right candidate.
    """
    if scores.shape != right.shape:
        raise ValueError(f"scores are {scores.shape}, right ones {right.shape}")
    if np.isnan(scores).any():
        raise ValueError("a score is NaN")
    if not right.any(axis=1).all():
        raise ValueError(f"query {int(np.argmin(right.any(axis=1)))} has no right candidate")
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    return ((scores >= best) & ~right).sum(axis=1)


def top_k(places: np.ndarray, ks: Sequence[int]) -> dict[int, Share]:
    """Of `places [queries]` from [`first_right`], the share among the first k, for each k."""
    queries = [str(number) for number in range(len(places))]
    found = {}
    for k in ks:
        hits = (places < k).astype(float)
        scores = Scores(hits, np.stack([hits, np.ones_like(hits)], axis=-1), mean)
        found[k] = Share(scores.score, *bootstrap_interval(scores, queries))
    return found
