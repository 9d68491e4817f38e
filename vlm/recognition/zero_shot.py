"""Labels by a dual encoder, as CLIP recognizes without training on them (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from vlm.embedding import Embedder, unit
from vlm.errors import UserError
from vlm.recipe_evaluation import Classification
from vlm.recognition.labels import PHOTO, fill


class ZeroShot:
    """Compares images with the texts of `labels`, encoded once. `templates` (default: `PHOTO`) are ensembled as CLIP
    does it: the vector of a label is the mean of the unit vectors of its texts, as a unit vector.

    Raises UserError for an embedder that reads no text.
    """

    def __init__(self, embedder: Embedder, labels: Sequence[str], templates: Sequence[str]) -> None:
        self.embedder = embedder
        templates = templates or PHOTO
        texts = embedder.embed_texts([fill(template, label) for label in labels for template in templates])
        self.vectors = unit(texts.unflatten(0, (len(labels), len(templates))).mean(dim=1))

    def scores(self, images: Sequence[Image.Image]) -> Tensor:
        """The model's own logits `[images, labels]`."""
        vectors, _ = self.embedder.embed_pixels(self.embedder.prepare_images(images)["pixel_values"])
        return (vectors @ self.vectors.T * self.embedder.logit_scale + (self.embedder.logit_bias or 0.0)).cpu()

    def probabilities(self, scores: Tensor) -> Tensor:
        """`[images, labels]`: with a softmax over the labels; by a model with a bias, which was trained to judge each
        pair by itself (SigLIP, arXiv 2303.15343), with a sigmoid."""
        return scores.softmax(dim=-1) if self.embedder.logit_bias is None else scores.sigmoid()


def zero_shot(embedder: Embedder, labels: Sequence[str], task: Classification) -> ZeroShot:
    """The classifier of a recipe's task. Raises UserError for a prompt, which only a model that writes is given."""
    if task.prompt is not None:
        raise UserError("evaluation.classification: a dual encoder is asked nothing; remove `prompt`")
    return ZeroShot(embedder, labels, task.templates)
