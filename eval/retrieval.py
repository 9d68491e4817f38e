"""Recall at k: how often one of the first k candidates is right, with bootstrap intervals over the queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Recall:
    """A share of the queries, and its 95% percentile bootstrap interval."""

    value: float
    low: float
    high: float


def first_right(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """The place, from 0, of each query's best right candidate [queries]; a tie with a wrong candidate counts as lost.

    Args:
        similarity: [queries, candidates], higher is nearer.
        relevant: [queries, candidates], true where the candidate is right.

    Raises:
        ValueError: shapes differ, a similarity is NaN, or a query has no right candidate.
    """
    if similarity.shape != relevant.shape:
        raise ValueError(f"similarity is {similarity.shape}, relevant {relevant.shape}")
    if np.isnan(similarity).any():
        raise ValueError("a similarity is NaN")
    if not relevant.any(axis=1).all():
        raise ValueError(f"query {int(np.argmin(relevant.any(axis=1)))} has no right candidate")
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    return ((similarity >= best) & ~relevant).sum(axis=1)


def recall_at(
    places: np.ndarray, ks: Sequence[int] = (1, 5, 10), samples: int = 1000, seed: int = 0
) -> dict[int, Recall]:
    """Recall at each k of `places` [queries] from `first_right`, resampling queries `samples` times."""
    drawn = np.random.default_rng(seed).integers(len(places), size=(samples, len(places)))
    recalls = {}
    for k in ks:
        hit = places < k
        low, high = np.percentile(hit[drawn].mean(axis=1), [2.5, 97.5])
        recalls[k] = Recall(float(hit.mean()), float(low), float(high))
    return recalls
