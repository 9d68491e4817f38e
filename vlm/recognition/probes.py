"""How well labels can be read off the features of a frozen encoder: by a linear probe, and by nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vlm.eval.top_k import Share, first_right, top_k
from vlm.recognition import linear_probe, nearest_neighbours

TOP = 5


@dataclass(frozen=True)
class Probed:
    """What one probe found.

    Attributes:
        probe: `linear`, or `k-NN, k = 20`.
        top: the share of the test images whose label is among the first 1, and 5 where so many can be told apart.
        predicted: the place of the first label of each test image.
        c: the `C` of a linear probe.
        converged: whether its fit was done before its iterations were.
    """

    probe: str
    top: dict[int, Share]
    predicted: list[int]
    c: float | None = None
    converged: bool = True


def probe(
    features: Tensor,
    targets: Tensor,
    test: Tensor,
    test_targets: Tensor,
    num_labels: int,
    ks: Sequence[int],
    *,
    seed: int = 0,
) -> list[Probed]:
    """Learn from unit vectors `features [N, D]`, whose labels are `targets [N]`, and test on `test [M, D]`: by a linear
    probe, whose part to choose `C` by is drawn by `seed`, and by each of `ks` nearest neighbours.

    Raises ValueError as [`linear_probe.fit_chosen`] and [`nearest_neighbours.vote`].
    """
    linear = linear_probe.fit_chosen(features, targets, num_labels, seed=seed)
    scores = linear.scores(test)
    ranks = (1, TOP) if num_labels > TOP else (1,)
    found = [Probed("linear", *_scored(scores, test_targets, ranks), linear.c, linear.converged)]
    for k in ks:
        votes = nearest_neighbours.vote(features, targets, test, num_labels, k=k)
        # Fewer neighbours than ranks have no votes for so many labels.
        found.append(Probed(f"k-NN, k = {k}", *_scored(votes, test_targets, [n for n in ranks if n == 1 or n <= k])))
    return found


def _scored(scores: Tensor, targets: Tensor, ranks: Sequence[int]) -> tuple[dict[int, Share], list[int]]:
    right = np.eye(scores.shape[1], dtype=bool)[targets.cpu().numpy()]
    return top_k(first_right(scores.cpu().numpy(), right), ranks), scores.argmax(dim=-1).tolist()
