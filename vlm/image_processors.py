"""An encoder's image processor: loaded as one that keeps what it is told, brought to a size, made to pad."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    LlavaImageProcessor,
    Siglip2ImageProcessor,
    SiglipImageProcessor,
    TimmWrapperImageProcessor,
)
from transformers.image_utils import PILImageResampling, SizeDict

ImageSize = int | Mapping[str, int]
"""The side of a square in pixels, or `{"height": ..., "width": ...}`."""

ImageAspectRatio = Literal["square", "pad"]
"""In LLaVA's words: `square` is the encoder's own way, mostly a resize and a crop; `pad` pads to a square instead."""


def load_image_processor(
    name: str,
    *,
    image_size: ImageSize | None = None,
    image_aspect_ratio: ImageAspectRatio = "square",
    trust_remote_code: bool = False,
) -> Any:
    """The image processor of the encoder `name`, a folder or a Hub name, whose images all have one size.

    Raises ValueError if `image_size` or `image_aspect_ratio` does not go with it.
    """
    image_processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    if isinstance(image_processor, TimmWrapperImageProcessor):
        image_processor = from_timm(image_processor)
    elif isinstance(image_processor, Siglip2ImageProcessor):
        image_processor = from_naflex(image_processor)
    if image_size is not None:
        set_image_size(image_processor, image_size)
    return padding(image_processor) if image_aspect_ratio == "pad" else image_processor


def image_size_of(image_processor: Any) -> tuple[int, int]:
    """`(height, width)` of the pixel values that an image processor makes of any image.

    Raises ValueError if they differ between images, as where only the shortest edge is brought to a size.
    """
    wide, high = (Image.new("RGB", size) for size in ((640, 480), (480, 640)))
    sizes = {tuple(image_processor(image, return_tensors="pt")["pixel_values"].shape[-2:]) for image in (wide, high)}
    if len(sizes) > 1:
        raise ValueError(
            "this image processor keeps each image's proportions, and images of different sizes do not fit into one "
            "batch: set image_size, to which all images are then brought"
        )
    height, width = sizes.pop()
    return height, width


def set_image_size(image_processor: Any, image_size: ImageSize) -> None:
    """Make an image processor bring images to `image_size`: to a square by its own rule (resize, then crop if it does),
    to other proportions by a resize alone.

    Raises ValueError for an image processor without a size to set.
    """
    if getattr(image_processor, "size", None) is None:
        raise ValueError(f"image_size cannot be set: {type(image_processor).__name__} has a size of its own")
    height, width = (image_size,) * 2 if isinstance(image_size, int) else (image_size["height"], image_size["width"])
    exact = SizeDict(height=height, width=width)
    crops = getattr(image_processor, "do_center_crop", False) and getattr(image_processor, "crop_size", None)
    by_shortest_edge = "shortest_edge" in image_processor.size and height == width
    if crops and height == width:
        image_processor.crop_size = exact
    elif crops:
        image_processor.do_center_crop = False
    # ConvNeXt's crops by itself, and knows the shortest edge only.
    crops_by_itself = hasattr(image_processor, "crop_pct")
    keeps_rule = by_shortest_edge and (crops or crops_by_itself)
    image_processor.size = SizeDict(shortest_edge=height) if keeps_rule else exact
    if crops_by_itself and not keeps_rule:
        raise ValueError(f"{type(image_processor).__name__} makes squares only, not {height} x {width}")


def from_timm(image_processor: TimmWrapperImageProcessor) -> CLIPImageProcessor:
    """timm's evaluation transform as an image processor that can be saved, and brought to another size: the shortest
    edge is resized, the middle cut out.

    Raises ValueError for the few of timm's that do something else.
    """
    data = image_processor.data_config
    _, height, width = data["input_size"]
    if height != width or data["crop_mode"] not in ("center", "squash"):
        raise ValueError(
            f"this timm encoder's images are {height} x {width}, crop_mode {data['crop_mode']!r}; only squares, by "
            "crop_mode center or squash, are prepared here"
        )
    scaled = math.floor(height / data["crop_pct"])
    squash = data["crop_mode"] == "squash"
    return CLIPImageProcessor(
        size={"height": scaled, "width": scaled} if squash else {"shortest_edge": scaled},
        crop_size={"height": height, "width": width},
        resample=getattr(PILImageResampling, data["interpolation"].upper()),
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )


def from_naflex(image_processor: Siglip2ImageProcessor) -> SiglipImageProcessor:
    """SigLIP 2's image processor for any proportions as one that makes squares of as many patches, which
    [`vlm.encoder.encode`] cuts."""
    side = math.isqrt(image_processor.max_num_patches) * image_processor.patch_size
    return SiglipImageProcessor(
        size={"height": side, "width": side},
        resample=image_processor.resample,
        image_mean=list(image_processor.image_mean),
        image_std=list(image_processor.image_std),
    )


def padding(image_processor: Any) -> LlavaImageProcessor:
    """An image processor that pads to a square with the mean colour and then resizes, where `image_processor` crops:
    LLaVA-1.5's `image_aspect_ratio: pad` (arXiv 2310.03744). Size and normalisation stay.

    Raises ValueError if the size is not a square, or if pixels are normalised in some other way than by a mean and a
    deviation.
    """
    height, width = image_size_of(image_processor)
    if height != width:
        raise ValueError(f"image_aspect_ratio pad makes squares, and image_size is {height} x {width}")
    padded = LlavaImageProcessor(
        size={"height": height, "width": width},
        do_center_crop=False,
        do_pad=True,
        **{
            name: getattr(image_processor, name)
            for name in ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        },
    )
    for colour in ((0, 0, 0), (255, 128, 7)):  # no resize changes an image of one colour
        image = Image.new("RGB", (height, width), colour)
        own, ours = (made(image, return_tensors="pt")["pixel_values"] for made in (image_processor, padded))
        if not torch.allclose(own, ours, atol=1e-5):
            raise ValueError(
                f"image_aspect_ratio pad does not go with {type(image_processor).__name__}, which normalises pixels "
                "in a way of its own"
            )
    return padded


def keep_tiles_whole(image_processor: Any) -> Any:
    """An image processor that leaves an image of its own size as it is, but for its colours.

    Many scale an image up and cut its edges off (DINOv2's to 256, of which 224 are left), which would leave gaps
    between tiles. Raises ValueError for one that cannot be kept from it.
    """
    image_processor = copy.deepcopy(image_processor)
    if hasattr(image_processor, "image_processors"):  # several encoders side by side
        image_processor.image_processors = [keep_tiles_whole(each) for each in image_processor.image_processors]
        return image_processor
    height, width = size = image_size_of(image_processor)
    if hasattr(image_processor, "crop_pct"):  # ConvNeXt's, which knows the shortest edge only
        image_processor.crop_pct = 1.0
    else:
        image_processor.do_center_crop = False
        image_processor.size = SizeDict(height=height, width=width)
    black, white, framed = (Image.new("RGB", (width, height), colour) for colour in ("black", "white", "white"))
    framed.paste("black", (1, 1, width - 1, height - 1))
    dark, light, seen = image_processor([black, white, framed], return_tensors="pt")["pixel_values"]
    expected = light.clone()
    expected[:, 1:-1, 1:-1] = dark[:, 1:-1, 1:-1]
    if tuple(seen.shape[-2:]) != size or not torch.allclose(seen, expected):
        raise ValueError(
            f"{type(image_processor).__name__} scales or cuts images that have its size already, so that tiles would "
            "lose their edges: leave tiling out, or use another encoder"
        )
    return image_processor
