"""Losses that pull an image and its texts together: CLIP's (arXiv 2103.00020) and SigLIP's (arXiv 2303.15343).

Both take `logits` [images, texts], scaled already, and `positive` [images, texts], true where the text belongs to the
image. A pair that is positive is never a negative of another: several captions of an image, or one caption that two
images share, do not push each other away. Every image needs a text that belongs to it, and every text an image.
"""

from __future__ import annotations

import torch
from torch import nn


def infonce(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric cross-entropy, a scalar. With one text an image it is that of `CLIPModel`.

    Each positive pair is told from the negatives of its row (then of its column) alone, the other positives left out of
    the denominator; a row's pairs are averaged, as in SupCon's outer sum (arXiv 2004.11362), then the rows.
    """
    return (_one_way(logits, positive) + _one_way(logits.T, positive.T)) / 2


def _one_way(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    negatives = logits.masked_fill(positive, -torch.inf).logsumexp(dim=1, keepdim=True)
    # -log(e^s / (e^s + sum of negatives)) = log(1 + e^(negatives - s))
    pairs = nn.functional.softplus(negatives - logits).masked_fill(~positive, 0.0)
    return (pairs.sum(dim=1) / positive.sum(dim=1)).mean()


def sigmoid(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """SigLIP's loss, a scalar: each pair is classified alone; summed over texts, averaged over images."""
    signs = positive.to(logits.dtype) * 2 - 1
    return -nn.functional.logsigmoid(signs * logits).sum(dim=1).mean()
