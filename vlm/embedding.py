"""Images, and texts, as vectors whose inner product says how alike they are.

embedder = load_embedder("runs/contrastive")     # or openai/clip-vit-base-patch16, google/siglip-..., any encoder
for batch in embedder.embed_images({path: path for path in paths}, broken=broken):
    batch.images, batch.features                 # names, [B, D]
embedder.embed_texts(["a photo of a cat"])       # [1, D]
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor

import vlm  # noqa: F401 - registers our classes with the Auto classes
from vlm.build import load_vision
from vlm.data.encoding import BATCH_IMAGES, EncodedBatch, encode_images
from vlm.data.example import ImageSource
from vlm.data.images import ImageError
from vlm.dual_encoder import is_dual_encoder, tokenize
from vlm.encoder import encode
from vlm.errors import UserError
from vlm.loading import checkpoint_of, load_quietly, reading
from vlm.precision import default_device, input_device

BATCH_TEXTS = 64


@dataclass(frozen=True)
class Embedder:
    """A dual encoder (`get_image_features`, `get_text_features`), or a vision encoder alone, without `tokenizer`."""

    name: str
    model: Any
    image_processor: Any
    tokenizer: Any = None
    tiler = None

    @property
    def logit_scale(self) -> float:
        """What a dual encoder multiplies cosines with to get logits; 1 for a vision encoder alone."""
        with align_module_device(self.model):  # of a split model it may be on disk
            return float(self.model.logit_scale.exp()) if self.tokenizer else 1.0

    @property
    def logit_bias(self) -> float | None:
        """What SigLIP adds to its logits, and others do not."""
        with align_module_device(self.model):
            bias = getattr(self.model, "logit_bias", None)
            return None if bias is None else float(bias)

    def prepare_images(self, images: Sequence[Any]) -> Any:
        """`pixel_values [B, 3, H, W]`, in the words of `VLMProcessor`."""
        return self.image_processor(images=list(images), return_tensors="pt")

    @torch.no_grad()
    def embed_pixels(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """`pixel_values [B, 3, H, W]` as unit vectors `[B, D]`: one token of a grid of 1 x 1.

        Raises UserError for an encoder that does not pool what it sees.
        """
        pixel_values = pixel_values.to(input_device(self.model), self.model.dtype)
        if self.tokenizer:
            pooled = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        else:
            pooled = encode(self.model, pixel_values).pooled
        if pooled is None:
            raise UserError(f"{self.name} does not pool what it sees into one vector; choose another encoder")
        return unit(pooled), (1, 1)

    def embed_images(
        self, images: Mapping[str, ImageSource], *, broken: dict[str, ImageError]
    ) -> Iterator[EncodedBatch]:
        """`images` by their names as batches of unit vectors `[B, D]`, in order; those that do not open go to
        `broken`."""
        # A CPU that encodes has nothing to spare for processes that open and prepare images.
        batches = len(images) // BATCH_IMAGES
        workers = 0 if input_device(self.model).type == "cpu" else min(8, os.cpu_count() or 1, batches)
        return encode_images(images, self, self.embed_pixels, broken=broken, num_workers=workers)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors `[len(texts), D]`; texts longer than the encoder reads are cut.

        Raises UserError for a vision encoder alone.
        """
        if not self.tokenizer:
            raise UserError(
                f"{self.name} reads no text; words need a dual encoder, such as openai/clip-vit-base-patch16 or a run "
                "of the recipe contrastive"
            )
        vectors = []
        for start in range(0, len(texts), BATCH_TEXTS):
            tokens = tokenize(self.tokenizer, self.model.config, texts[start : start + BATCH_TEXTS])
            vectors.append(self.model.get_text_features(**tokens.to(input_device(self.model))).pooler_output)
        return unit(torch.cat(vectors))


def unit(vectors: Tensor) -> Tensor:
    """`[N, D]` as unit vectors in float32, however small: those of an untrained network may have no square in it."""
    vectors = vectors.float()
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    return F.normalize(vectors / largest.clamp(min=torch.finfo(vectors.dtype).tiny), dim=-1)


def load_dual_encoder(
    source: str, *, dtype: str = "float32", device_map: Any = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Model and processor. Raises UserError for a checkpoint that is damaged or lacks weights."""
    options = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
    with reading(source, kind="an encoder"):
        model = load_quietly(AutoModel, source, pooled=True, **options)
    with reading(source, "processor", kind="an encoder"):
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    return model, require_parts(source, processor)


def require_parts(source: str, processor: Any) -> Any:
    """Return `processor`. Raises UserError if it lacks an image processor or a tokenizer."""
    for part in ("image_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            raise UserError(
                f"cannot load {source!r} as an encoder: processor: {type(processor).__name__} has no {part}"
            )
    return processor


def load_embedder(
    name_or_path: str,
    *,
    device: str | None = None,
    dtype: str = "float32",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> Embedder:
    """The dual encoder, or else vision encoder, of a run folder, a checkpoint folder or a Hub name. `dtype` and
    `device_map`, which takes the place of `device`, are of a dual encoder.

    Raises UserError if it is neither.
    """
    source = checkpoint_of(name_or_path)
    device = device or default_device()
    with reading(name_or_path, "config.json", kind="an encoder"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    if not is_dual_encoder(config):
        with reading(name_or_path, kind="an encoder"):
            tower, image_processor = load_vision(source, pooled=True, trust_remote_code=trust_remote_code)
        return _tried(Embedder(name_or_path, tower.to(device).eval().requires_grad_(False), image_processor))  # type: ignore[arg-type]
    model, processor = load_dual_encoder(
        source, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
    )
    if device_map is None:
        model = model.to(device)
    model = model.eval().requires_grad_(False)
    return _tried(Embedder(name_or_path, model, processor.image_processor, processor.tokenizer))


def _tried(embedder: Embedder) -> Embedder:
    """Return `embedder`. Raises UserError if it fails on a blank image, or on a word: a value in its files is wrong."""
    with reading(embedder.name, "a blank image and a word", kind="an encoder"):
        embedder.embed_pixels(embedder.prepare_images([Image.new("RGB", (64, 64))])["pixel_values"])
        if embedder.tokenizer:
            embedder.embed_texts(["a"])
    return embedder
