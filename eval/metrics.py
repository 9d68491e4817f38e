"""Every metric by name, and bootstrap intervals for them.

To add one: write a function (predictions, references) -> `Scores` and give it a line in `METRICS`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlm.eval.bleu import bleu_from_statistics, bleu_statistics
from vlm.eval.cider import cider_d
from vlm.eval.ptb_tokenizer import tokenize
from vlm.eval.rouge import rouge_l
from vlm.eval.vqa import exact_match, vqa_accuracy

Predictions = Sequence[str]
References = Sequence[Sequence[str]]


def mean(statistics: np.ndarray) -> np.ndarray:
    """Summed (score, 1) [..., 2] -> the mean score [...]."""
    return statistics[..., 0] / np.maximum(statistics[..., 1], 1)


@dataclass(frozen=True)
class Scores:
    """What a metric found.

    Attributes:
        per_item: score of each item, [items].
        statistics: [items, K]; their sum over any multiset of items is all that the score of the multiset needs.
        aggregate: summed statistics [..., K] -> score [...].
    """

    per_item: np.ndarray
    statistics: np.ndarray
    aggregate: Callable[[np.ndarray], np.ndarray]

    @property
    def score(self) -> float:
        """The score of the whole set."""
        return float(self.aggregate(self.statistics.sum(axis=0)))


@dataclass(frozen=True)
class Metric:
    """A metric: `compute` scores all items at once, because some metrics (CIDEr) need the whole set."""

    name: str
    compute: Callable[[Predictions, References], Scores]
    best: float

    def __call__(self, predictions: Predictions, references: References) -> Scores:
        """Scores of items (prediction, all of its references); raises ValueError for an item without a reference."""
        if len(predictions) != len(references):
            raise ValueError(f"{self.name}: {len(predictions)} predictions, but references for {len(references)}")
        for i, refs in enumerate(references):
            if not refs:
                raise ValueError(f"{self.name}: item {i} has no reference; leave it out or give it one")
        return self.compute(predictions, references)


def _averaged(per_item: np.ndarray) -> Scores:
    return Scores(per_item, np.stack([per_item, np.ones_like(per_item)], axis=-1), mean)


def _tokenized(predictions: Predictions, references: References) -> tuple[list[list[str]], list[list[list[str]]]]:
    return [tokenize(p) for p in predictions], [[tokenize(r) for r in refs] for refs in references]


def _bleu_4(predictions: Predictions, references: References) -> Scores:
    statistics = bleu_statistics(*_tokenized(predictions, references))
    return Scores(bleu_from_statistics(statistics), statistics, bleu_from_statistics)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("bleu_4", _bleu_4, best=1.0),
        Metric("rouge_l", lambda p, r: _averaged(rouge_l(*_tokenized(p, r))), best=1.0),
        Metric("cider_d", lambda p, r: _averaged(cider_d(*_tokenized(p, r))), best=10.0),
        Metric("vqa_accuracy", lambda p, r: _averaged(vqa_accuracy(p, r)), best=1.0),
        Metric("exact_match", lambda p, r: _averaged(exact_match(p, r)), best=1.0),
    )
}


def get_metric(name: str) -> Metric:
    """The metric of this name; raises ValueError that lists the names, and the nearest one."""
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown metric {name!r}.{hint} Known metrics: {', '.join(METRICS)}.")


def bootstrap_interval(
    scores: Scores, groups: Sequence[str], *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """The percentile interval of the score when whole groups (images) are drawn with replacement.

    Items of one image are not independent, so images are resampled, not items. The score of a resample is recomputed
    from summed statistics: right for corpus BLEU, and for CIDEr with the IDF of the whole set.

    Args:
        scores: what the metric found for all items.
        groups: the image id of each item, [items].
        resamples: number of resamples.
        seed: the same seed draws the same images, whatever the metric.
        level: the share of the resamples inside the interval.
    """
    if resamples < 1 or not len(groups):
        raise ValueError("A bootstrap interval needs at least one resample and one item")
    index = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)[1]
    size = int(index.max()) + 1
    grouped = np.zeros((size, scores.statistics.shape[1]))
    np.add.at(grouped, index, scores.statistics)
    rng = np.random.default_rng(seed)
    values = np.empty(resamples)
    for start in range(0, resamples, 64):  # bounded memory: 64 resamples at a time
        rows = min(64, resamples - start)
        drawn = rng.integers(size, size=(rows, size)) + np.arange(rows)[:, None] * size
        counts = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        values[start : start + rows] = scores.aggregate(counts.astype(float) @ grouped)
    tail = (1 - level) / 2 * 100
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
