"""Corpus BLEU-4 as coco-caption computes it (Papineni et al., 2002; the reference length closest to the prediction's).

Tokens come from `vlm.eval.ptb_tokenizer`. The tiny constants are coco-caption's: an n-gram order without a match scores
almost zero, not an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

Tokens = Sequence[str]
N = 4
_SMALL, _TINY = 1e-9, 1e-15


def _ngrams(tokens: Tokens) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, N + 1) for i in range(len(tokens) - n + 1))


def bleu_statistics(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """What BLEU has to know of each item, [items, 2 + 2 * 4].

    Columns: prediction length, closest reference length, predicted n-grams of order 1 to 4, matched n-grams of order 1
    to 4 (clipped by the most that any one reference has). Sum rows to get the statistics of a corpus.
    """
    rows = np.zeros((len(predictions), 2 + 2 * N))
    for row, prediction, refs in zip(rows, predictions, references, strict=True):
        length = len(prediction)
        row[0] = length
        row[1] = min((abs(len(ref) - length), len(ref)) for ref in refs)[1]
        row[2 : 2 + N] = [max(0, length - n + 1) for n in range(1, N + 1)]
        most: Counter[tuple[str, ...]] = Counter()
        for ref in refs:
            most |= _ngrams(ref)
        for ngram, count in _ngrams(prediction).items():
            row[1 + N + len(ngram)] += min(count, most[ngram])
    return rows


def bleu_from_statistics(statistics: np.ndarray) -> np.ndarray:
    """BLEU-4 of (summed) statistics [..., 10] -> [...]."""
    length, reference_length = statistics[..., 0], statistics[..., 1]
    guess, correct = statistics[..., 2 : 2 + N], statistics[..., 2 + N :]
    score = np.prod((correct + _TINY) / (guess + _SMALL), axis=-1) ** (1 / N)
    ratio = (length + _TINY) / (reference_length + _SMALL)
    return score * np.exp(np.minimum(0.0, 1 - 1 / ratio))  # the brevity penalty, 1 when the prediction is longer
