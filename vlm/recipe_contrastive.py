"""The `contrastive` section of a recipe: a vision and a text encoder are trained to agree; nothing writes."""

from typing import Any, Literal

from pydantic import Field

from vlm.recipe_model import Model, Section, at_default
from vlm.recipe_source import KeyPath


class Contrastive(Section):
    """How images and texts are compared. `model.vision` is the vision encoder, `model.language` the text encoder, or
    `model.pretrained` a whole dual encoder; in `trainable` and `lora` they have the same names, and `projector` is what
    brings them into one space, with the temperature."""

    loss: Literal["infonce", "sigmoid"] = "infonce"
    """CLIP's (arXiv 2103.00020), which tells a pair from all others of the batch, or SigLIP's (arXiv 2303.15343), which
    judges each by itself."""
    chunk_size: int | None = Field(default=None, ge=1)
    """Encode so many images, then texts, of a batch at a time, and once more in the backward pass: a large batch in the
    memory of a small one, with the same gradients (GradCache, arXiv 2101.06983)."""
    projection_dim: int | None = Field(default=None, ge=1, le=65_536)
    """Width of the space that a new pair is brought into; null is that of a CLIP's own projection, with which its
    images begin, and 512 for other vision encoders."""
    projection_dropout: float = Field(default=0.0, ge=0, lt=1)
    """The share of what a new pair's encoders pool that is left out at random before it is projected: against learning
    a small data set by heart."""
    text_pooling: Literal["mean", "cls", "last", "pooler"] = "mean"
    """What of a new pair's text encoder is a text's vector: the mean of its last states, as in Sentence-BERT, the first
    (BERT), the last (decoders), or the encoder's own pooler (CLIP's text half)."""


OF_WRITING: dict[str, tuple[str, ...]] = {
    "model": (
        "preset", "adapter", "vision_feature_layer", "vision_feature_select_strategy", "tiling", "chat_template",
        "image_markers", "quantization_config",
    ),
    "data": ("max_length", "too_long", "max_tokens_per_row", "answer_weighting"),
    "evaluation": ("metrics", "max_new_tokens", "samples", "max_batch_tokens"),
}  # fmt: skip
"""Keys of a model that writes, which have no meaning here."""


def problems(contrastive: Contrastive, model: Model, recipe: Any) -> list[tuple[KeyPath, str]]:
    """What in the rest of a recipe does not go with its `contrastive` section."""
    found: list[tuple[KeyPath, str]] = []
    for name, keys in OF_WRITING.items():
        section = getattr(recipe, name)
        for key in sorted(set(keys) & section.model_fields_set - at_default(section)):
            found.append(((name, key), "does not go with `contrastive`, where nothing is written; remove it"))
    if model.pretrained:
        for key in sorted({"projection_dim", "projection_dropout", "text_pooling"} - at_default(contrastive)):
            found.append((("contrastive", key), "is that of the `pretrained` model already; remove it"))
    if recipe.data.streams:
        found.append((("data", "train"), "cannot be streamed with `contrastive` yet; remove `streaming` and `weight`"))
    for number, stage in enumerate(recipe.stages):
        if "fusion" in stage.trainable:
            why = "a dual encoder has none; its parts are vision, language and projector"
            found.append((("stages", number, "trainable", "fusion"), why))
        if stage.train.get("gradient_accumulation_steps", 1) != 1:
            why = (
                "pairs are told only from those of one batch; raise per_device_train_batch_size instead, and set "
                "contrastive.chunk_size if memory is short"
            )
            found.append((("stages", number, "train", "gradient_accumulation_steps"), why))
        if stage.train.get("auto_find_batch_size"):
            why = "a smaller batch is another loss; set contrastive.chunk_size, which makes any batch fit"
            found.append((("stages", number, "train", "auto_find_batch_size"), why))
    return found
