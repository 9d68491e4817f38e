"""Whether a model and its counterpart in transformers take the same messages to the same logits. Tried, not assumed: no
description knows what every decoder does besides (Cohere and Granite scale their logits, and LLaVA does not)."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import BatchFeature

from vlm.data.prompts import encode_prompt, has_chat_template
from vlm.errors import UserError
from vlm.tiling import Size

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""How far logits may be apart, as a share of the largest. In formats of half the size rounding alone is more."""
ROUNDED = 5e-2


@torch.no_grad()
def check_equal(ours: Any, processor: Any, stock: Any, stock_processor: Any) -> None:
    """Raises UserError if ids, pixels or logits of the two differ, for a question about an image of noise; with tiling
    about two, of several tiles and of different shapes."""
    images = [_noise(*size) for size in _sizes(processor)]
    a, b = (_read(each, images) for each in (processor, stock_processor))
    if a["input_ids"].tolist() != b["input_ids"].tolist():
        raise UserError(
            f"{type(stock_processor).__name__} writes the same messages in other tokens:\n"
            f"  ours:   {_short(processor, a)}\n  theirs: {_short(processor, b)}"
        )
    pixels, stock_pixels = (_tiles(each["pixel_values"]) for each in (a, b))
    if pixels.shape != stock_pixels.shape or not torch.allclose(pixels, stock_pixels, atol=1e-5):
        raise UserError(
            f"{type(stock_processor.image_processor).__name__} makes other pixels of an image than "
            f"{type(processor.image_processor).__name__}"
        )
    wanted = ours(**a.to(ours.device)).logits.float()
    try:
        found = stock(**b.to(stock.device)).logits.float()
    except ValueError as error:  # mostly images of another size than its encoder's own
        raise UserError(f"{type(stock).__name__} does not take what this model takes: {error}") from error
    difference, size = (found - wanted).abs().max().item(), wanted.abs().max().item()
    if not difference <= TOLERANCE.get(ours.dtype, ROUNDED) * size:
        raise UserError(
            f"{type(stock).__name__} computes something else with {type(ours.model.vision_tower).__name__} and "
            f"{type(ours.model.language_model).__name__}: logits of up to {size:.3g} differ by {difference:.3g}"
        )


def _sizes(processor: Any) -> list[Size]:
    if processor.tiler is None:
        return [(96, 128)]
    height, width = processor.tiler.tile_size
    return [(height + 10, 2 * width + 7), (2 * height - 5, width // 2 + 1)]


def _noise(height: int, width: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _tiles(pixels: torch.Tensor) -> torch.Tensor:
    """`[tiles, 3, H, W]` without the empty ones that rows of different numbers of tiles are filled up with."""
    pixels = pixels.flatten(0, -4)
    return pixels[pixels.flatten(1).any(dim=1)]


def _read(processor: Any, images: list[PIL.Image.Image]) -> Any:
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": "What is it?"})
    if not has_chat_template(processor):
        return BatchFeature(encode_prompt(processor, [{"role": "user", "content": content}], images))
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"return_tensors": "pt"},
    )


def _short(processor: Any, inputs: Any) -> str:
    """The tokens as text, a run of image tokens as one with its length."""
    text, image = processor.tokenizer.decode(inputs["input_ids"][0]), str(processor.image_token)
    count = text.count(image)
    return repr(text.replace(image * count, f"{image} x {count}") if count else text)
