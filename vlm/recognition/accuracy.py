"""The share of images whose label is found, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlm.eval.metrics import Scores, bootstrap_interval, mean


@dataclass(frozen=True)
class Accuracy:
    """A share of the images, with its 95 % bootstrap interval over images, or over groups of them."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def top_k_hits(scores: Tensor, targets: Sequence[int], k: int) -> np.ndarray:
    """Whether each image's target is among its `k` highest `scores [images, labels]`: booleans `[images]`."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == torch.as_tensor(targets, device=scores.device)[:, None]).any(dim=1).cpu().numpy()


def accuracy(hits: np.ndarray, groups: Sequence[str] | None = None) -> Accuracy:
    """Of `hits [images]`. Images of one of the `groups [images]` are drawn together; without it each is its own."""
    per_image = hits.astype(float)
    scores = Scores(per_image, np.stack([per_image, np.ones_like(per_image)], axis=-1), mean)
    low, high = bootstrap_interval(scores, groups or [str(i) for i in range(len(hits))])
    return Accuracy(scores.score, low, high)
