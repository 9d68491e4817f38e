"""Labels by the nearest of labelled images, weighted as DINO does it (arXiv 2104.14294)."""

from __future__ import annotations

from torch import Tensor

TEMPERATURE = 0.07
QUERIES_AT_ONCE = 256


def vote(
    features: Tensor,
    targets: Tensor,
    queries: Tensor,
    num_labels: int,
    *,
    k: int,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """The votes `[Q, labels]` of the `k` of `features [N, D]` nearest to each of `queries [Q, D]`: each gives its label
    of `targets [N]` exp(cosine / temperature). Both are unit vectors. With `k=1` it is the plain nearest neighbour.

    Raises ValueError for a `k` that is not between 1 and N.
    """
    if not 1 <= k <= len(features):
        raise ValueError(f"k is {k}, and there are {len(features)} images to be nearest")
    votes = queries.new_zeros(len(queries), num_labels)
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        nearest = (queries[start : start + QUERIES_AT_ONCE] @ features.T).topk(k)
        weights = (nearest.values / temperature).exp()
        votes[start : start + QUERIES_AT_ONCE].scatter_add_(1, targets[nearest.indices], weights)
    return votes
