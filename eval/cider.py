"""CIDEr-D as coco-caption computes it (Vedantam et al., 2015): n-grams of 1 to 4 tokens, sigma 6, times 10.

The weights of the n-grams (IDF) come from the references of the whole evaluated set. A score therefore belongs to a
set: it cannot be averaged over shards, and a set of one image scores 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Tokens = Sequence[str]
Ngram = tuple[str, ...]
N = 4
SIGMA = 6.0


def _ngrams(tokens: Tokens) -> Counter[Ngram]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, N + 1) for i in range(len(tokens) - n + 1))


def cider_d(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> np.ndarray:
    """CIDEr-D of each item, [items], in 0..10, with the IDF of all items' references.

    The score of the set is the mean.
    """
    cooked = [[_ngrams(ref) for ref in refs] for refs in references]
    # In how many items (not references) an n-gram occurs.
    frequency = Counter(ngram for refs in cooked for ngram in set().union(*refs))
    log_items = math.log(max(len(references), 1))

    def weigh(counts: Counter[Ngram]) -> tuple[dict[Ngram, float], list[float]]:
        weights = {ngram: count * (log_items - math.log(max(1, frequency[ngram]))) for ngram, count in counts.items()}
        squares = [0.0] * N
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight * weight
        return weights, [math.sqrt(square) for square in squares]

    scores = np.zeros(len(predictions))
    for i, (prediction, refs) in enumerate(zip(predictions, references, strict=True)):
        weights, norms = weigh(_ngrams(prediction))
        for ref, ref_counts in zip(refs, cooked[i], strict=True):
            ref_weights, ref_norms = weigh(ref_counts)
            products = [0.0] * N
            for ngram, weight in weights.items():
                ref_weight = ref_weights.get(ngram, 0.0)
                products[len(ngram) - 1] += min(weight, ref_weight) * ref_weight
            cosine = sum(
                product / (norm * ref_norm) if norm and ref_norm else product
                for product, norm, ref_norm in zip(products, norms, ref_norms, strict=True)
            )
            # coco-caption takes the number of bigrams for the length.
            difference = max(0, len(prediction) - 1) - max(0, len(ref) - 1)
            scores[i] += cosine / N * math.exp(-(difference**2) / (2 * SIGMA**2))
        scores[i] *= 10.0 / len(refs)
    return scores
