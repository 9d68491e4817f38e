"""ROUGE-L as coco-caption computes it (Lin, 2004): beta 1.2, best precision and best recall of all references."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Tokens = Sequence[str]
BETA = 1.2


def _longest_common_subsequence(a: Tokens, b: Tokens) -> int:
    lengths = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            diagonal, lengths[j] = lengths[j], diagonal + 1 if x == y else max(lengths[j], lengths[j - 1])
    return lengths[-1]


def rouge_l(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """ROUGE-L of each item, [items], in 0..1. The score of a set is the mean.

    coco-caption splits an empty text into one empty token, so an empty prediction of an empty reference scores 1.
    """
    scores = np.zeros(len(predictions))
    for i, (prediction, refs) in enumerate(zip(predictions, references, strict=True)):
        tokens = prediction or [""]
        precision = recall = 0.0
        for ref in refs:
            common = _longest_common_subsequence(tokens, ref or [""])
            precision = max(precision, common / len(tokens))
            recall = max(recall, common / len(ref or [""]))
        if precision and recall:
            scores[i] = (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
    return scores
