"""A tiny CLIP, and images that are told apart by it."""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.dual_encoders import save_clip


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return folder


@pytest.fixture
def console() -> Console:
    return Console(file=StringIO(), width=200)


def picture(seed: int) -> Image.Image:
    """Four squares of random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((32, 32), Image.Resampling.NEAREST)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twenty of them, more than a batch."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for n in range(20):
        picture(n).save(tmp_path / "photos" / ("more" if n > 15 else "") / f"{n:02}.png")
    return tmp_path / "photos"
