"""Labels by a dual encoder, as CLIP recognizes without training on them (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlm.embedding import Embedder
from vlm.recognition.labels import fill


class ZeroShot:
    """Compares images with the texts of `labels`, encoded once. `templates` are ensembled as CLIP does it: the vector
    of a label is the mean of the unit vectors of its texts, as a unit vector.

    Raises UserError for an embedder that reads no text.
    """

    def __init__(self, embedder: Embedder, labels: Sequence[str], templates: Sequence[str]) -> None:
        self.embedder = embedder
        texts = embedder.embed_texts([fill(template, label) for label in labels for template in templates])
        self.vectors = F.normalize(texts.unflatten(0, (len(labels), len(templates))).mean(dim=1), dim=-1)
        # A model with a bias was trained to judge each pair by itself (SigLIP, arXiv 2303.15343).
        self.sigmoid = getattr(embedder.model, "logit_bias", None) is not None

    def scores(self, images: Sequence[Image.Image]) -> Tensor:
        """The model's own logits `[images, labels]`."""
        named: dict[str, Any] = {str(number): image for number, image in enumerate(images)}
        batches = self.embedder.embed_images(named, broken={})
        vectors = torch.cat([batch.features for batch in batches])
        return (vectors @ self.vectors.T * self.embedder.logit_scale + self.embedder.logit_bias).cpu()

    def probabilities(self, scores: Tensor) -> Tensor:
        """`[images, labels]`: with a softmax over the labels, or for SigLIP each by itself with a sigmoid."""
        return scores.sigmoid() if self.sigmoid else scores.softmax(dim=-1)
