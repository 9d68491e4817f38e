"""Images through an image processor: what it makes of them, each once, and which of them it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm.data.images import RefusedImages, image_sha256
from vlm.errors import UserError
from vlm.tiling import Size, size_of


def image_inputs(processor: Any, rows: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
    """What the image processor makes of the images of some conversations, at least one image: with most
    `pixel_values [images, 3, H, W]`, and sizes or grids where images have them.

    Models whose layers attend to the images of their row get `[rows, images, ...]`.
    """
    images = [image for row in rows for image in row]
    if hasattr(processor, "prepare_images"):  # ours
        return dict(processor.prepare_images(images))
    options = {"return_tensors": "pt", **getattr(processor, "images_kwargs", {})}
    names = set(processor.model_input_names)
    if "image_attention_mask" in names:  # Idefics' image processor gives the pixels alone
        return {"pixel_values": pad_sequence([processor.image_processor(row, **options) for row in rows], True)}
    # LLaVA-OneVision cuts an image into tiles where it is the only one, and Mllama has a place for each of a row.
    by_row = names & {"batch_num_images", "cross_attention_mask"}
    made = processor.image_processor([*rows] if by_row else images, **options)
    return {name: value for name, value in made.items() if name in names}


KEPT = 8
"""Results of an image processor that are kept in memory at a time."""


@contextmanager
def processed_once(processor: Any) -> Iterator[None]:
    """Have the image processor of a transformers model prepare images once, for their tokens, while the context lasts.

    Such a processor counts an image's tokens by preparing it, and a conversation is tokenized once for each beginning
    that ends with an answer. The last `KEPT` results are given again for equal pixels. If the processor says how many
    tokens an image of a size has, they are given for images of equal size: of what is made, pixels are not to be used.
    """
    image_processor = getattr(processor, "image_processor", None)
    prepare = getattr(image_processor, "preprocess", None)
    if prepare is None or hasattr(processor, "prepare_images") or "preprocess" in vars(image_processor):
        yield
        return
    by_size = hasattr(processor, "_get_num_multimodal_tokens")
    made: dict[str, Any] = {}

    def preprocess(images: Any, *args: Any, **options: Any) -> Any:
        described = _described(images, by_size)
        if described is None:
            return prepare(images, *args, **options)
        key = repr((described, args, sorted(options.items())))
        if key not in made:
            while len(made) >= KEPT:
                del made[next(iter(made))]
            made[key] = prepare(images, *args, **options)
        return copy.copy(made[key])  # a processor takes out what the model is not given

    image_processor.preprocess = preprocess  # type: ignore[union-attr]
    try:
        yield
    finally:
        del image_processor.preprocess  # type: ignore[union-attr]


def _described(images: Any, by_size: bool) -> Any:
    """What tells images, in lists or not, from others; None if there is something else than images of Pillow."""
    if isinstance(images, Image.Image):
        return (images.mode, images.size) if by_size else image_sha256(images)
    if isinstance(images, list | tuple):
        described = [_described(image, by_size) for image in images]
        return None if None in described else described
    return None


@contextmanager
def naming_refused(processor: Any, images: Sequence[Image.Image]) -> Iterator[None]:
    """Raise RefusedImages in place of an error that the image processor raises for some of `images`, tried each alone.
    Other errors stay as they are."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if refused := refused_images(processor, images):
            raise RefusedImages(refused) from error
        raise


def refused_images(processor: Any, images: Sequence[Image.Image]) -> list[tuple[Image.Image, str]]:
    """The images that the image processor refuses, each tried alone, with the reasons."""
    return [(image, why) for image in images if (why := _why_refused(processor, image))]


class SizeCheck:
    """Whether an image processor takes images, by their sizes: each size is tried once, on a black image."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._reasons: dict[Size, str] = {}

    def __call__(self, images: Sequence[Image.Image]) -> None:
        """Raise RefusedImages if one of `images` has a size that the image processor refuses."""
        if hasattr(self.processor, "prepare_images"):  # ours bring any image to one size
            return
        for size in {size_of(image) for image in images} - self._reasons.keys():
            self._reasons[size] = _why_refused(self.processor, Image.new("RGB", size[::-1]))
        if refused := [(image, why) for image in images if (why := self._reasons[size_of(image)])]:
            raise RefusedImages(refused)


def _why_refused(processor: Any, image: Image.Image) -> str:
    """Empty if it is not."""
    try:
        image_inputs(processor, [[image]])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of any type
        kind = type(getattr(processor, "image_processor", processor)).__name__
        return f"{kind} refuses an image of {image.width} x {image.height} pixels ({error})"
    return ""
