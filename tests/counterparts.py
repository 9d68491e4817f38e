"""Tiny models of transformers that have a counterpart among ours, with their processors; an image is one tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests import stock


def llava() -> tuple[Any, Any]:
    return stock.llava()


COUNTERPARTS: dict[str, Callable[[], tuple[Any, Any]]] = {"llava": llava}


def counterpart(name: str) -> tuple[Any, Any]:
    """A stock model in evaluation mode, and its processor."""
    torch.manual_seed(0)
    model, processor = COUNTERPARTS[name]()
    return model.eval(), processor


def for_ours(inputs: Any) -> dict[str, Any]:
    """What our model takes of the stock processor's output."""
    pixels = inputs["pixel_values"]
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "pixel_values": pixels.flatten(0, -4)[pixels.flatten(0, -4).flatten(1).any(dim=1)],
    }
