"""Projectors by name, and those that are a layer or two.

Shapes: B images, P prefix tokens (class, registers), h x w patches, N = P + h * w, D_v encoder width, M visual tokens,
D_t language model width. A new projector is a class here, or in a file of its own, and a line in `PROJECTORS`.
"""

from __future__ import annotations

import difflib
import inspect
from collections import OrderedDict
from collections.abc import Collection, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.adapters.c_abstractor import CAbstractorProjector
from vlm.adapters.projector import Grid, Projector, average_to, check_pool, pooled_side, refuse_prefix, split_prefix
from vlm.adapters.qformer import QFormerProjector
from vlm.adapters.resampler import ResamplerProjector


class LinearProjector(Projector):
    """One linear layer a token (PaliGemma, arXiv 2407.07726)."""

    output = "linear"

    def __init__(self, vision_hidden_size: int, text_hidden_size: int) -> None:
        super().__init__(vision_hidden_size)
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size)

    def project(self, features: Tensor, grid: Grid) -> Tensor:
        return self.linear(features)


class MLPProjector(Projector):
    """Two linear layers with a GELU between them, a token at a time (LLaVA-1.5, arXiv 2310.03744)."""

    output = "linear_2"

    def __init__(self, vision_hidden_size: int, text_hidden_size: int) -> None:
        super().__init__(vision_hidden_size)
        self.linear_1 = nn.Linear(vision_hidden_size, text_hidden_size)
        self.linear_2 = nn.Linear(text_hidden_size, text_hidden_size)

    def project(self, features: Tensor, grid: Grid) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


class PixelShuffleProjector(Projector):
    """Each `scale_factor` x `scale_factor` square of patches becomes one token, without loss, then a linear layer
    (SmolVLM and Idefics3, arXiv 2408.12637)."""

    output = "proj"

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, scale_factor: int = 2) -> None:
        super().__init__(vision_hidden_size)
        self.scale_factor = scale_factor
        self.proj: nn.Module = nn.Linear(vision_hidden_size * scale_factor**2, text_hidden_size, bias=False)

    def num_tokens(self, num_prefix: int, grid: Grid) -> int:
        h, w = grid
        refuse_prefix("pixel_shuffle", num_prefix)
        if h % self.scale_factor or w % self.scale_factor:
            raise ValueError(
                f"pixel_shuffle with scale_factor {self.scale_factor} needs a grid that it divides; this encoder's is "
                f"{h} x {w}. Choose another scale_factor or image size."
            )
        return (h // self.scale_factor) * (w // self.scale_factor)

    def token_grid(self, grid: Grid) -> Grid:
        return grid[0] // self.scale_factor, grid[1] // self.scale_factor

    def project(self, features: Tensor, grid: Grid) -> Tensor:
        (h, w), s = grid, self.scale_factor
        batch, _, dim = features.shape
        squares = features.view(batch, h // s, s, w // s, s, dim).transpose(2, 3)
        return self.proj(squares.reshape(batch, -1, s * s * dim))


class PixelShuffleMLPProjector(PixelShuffleProjector):
    """As `pixel_shuffle`, but the squares are normalised and go through two layers with a GELU between them (InternVL,
    arXiv 2404.16821)."""

    output = "proj.linear_2"

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, scale_factor: int = 2) -> None:
        super().__init__(vision_hidden_size, text_hidden_size, scale_factor)
        width = vision_hidden_size * scale_factor**2
        self.proj = nn.Sequential(
            OrderedDict(
                layer_norm=nn.LayerNorm(width),
                linear_1=nn.Linear(width, text_hidden_size),
                act=nn.GELU(),
                linear_2=nn.Linear(text_hidden_size, text_hidden_size),
            )
        )


class AveragePoolProjector(Projector):
    """The grid of patches is averaged down to `num_image_tokens` (a square number), normalised and projected
    (Gemma 3, arXiv 2503.19786). Class tokens, where they are kept, pass beside the pool."""

    output = "linear"

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, num_image_tokens: int = 64) -> None:
        super().__init__(vision_hidden_size)
        self.side = pooled_side("average_pool", num_image_tokens)
        self.norm = nn.RMSNorm(vision_hidden_size, eps=1e-6)
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size, bias=False)

    def num_tokens(self, num_prefix: int, grid: Grid) -> int:
        check_pool("average_pool", self.side, grid)
        return num_prefix + self.side**2

    def token_grid(self, grid: Grid) -> Grid:
        return self.side, self.side

    def project(self, features: Tensor, grid: Grid) -> Tensor:
        prefix, patches = split_prefix(features, grid)
        image = patches.transpose(1, 2).unflatten(2, grid)
        pooled = average_to(image, self.side).flatten(2).transpose(1, 2)
        return self.linear(self.norm(torch.cat([prefix, pooled], dim=1)))


PROJECTORS: dict[str, type[Projector]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "pixel_shuffle_mlp": PixelShuffleMLPProjector,
    "average_pool": AveragePoolProjector,
    "c_abstractor": CAbstractorProjector,
    "resampler": ResamplerProjector,
    "qformer": QFormerProjector,
}


LARGEST = 10_000_000
"""Widths, depths and counts of tokens beyond this are mistakes; memory ends long before."""


def unknown_name(kind: str, name: str, known: Collection[str]) -> ValueError:
    """The error for a name that no `known` one equals: it lists them and suggests the nearest."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(sorted(known))}.")


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Return option to what is wrong with it, for those of projector `name` with a value of the wrong type or size."""
    parameters = inspect.signature(PROJECTORS[name], eval_str=True).parameters
    wrong = {}
    for option, value in options.items():
        hint = parameters[option].annotation
        kinds = get_args(hint) or (hint,)
        if get_origin(hint) is Literal:
            if value not in kinds:
                wrong[option] = f"must be one of {', '.join(kinds)}, not {value!r:.80}"
        elif bool in kinds:
            if not isinstance(value, bool):
                wrong[option] = f"must be true or false, not {value!r:.80}"
        elif float in kinds:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                wrong[option] = f"must be a number above 0 and below 1, not {value!r:.80}"
        elif not (value is None and NoneType in kinds) and not (type(value) is int and 1 <= value <= LARGEST):
            wrong[option] = f"must be a whole number from 1 to {LARGEST:,}, not {value!r:.80}"
    return wrong


def build_projector(spec: dict[str, Any], vision_hidden_size: int, text_hidden_size: int) -> Projector:
    """The projector of `spec`, `{"type": NAME, **options}`. Raises ValueError naming an unknown type or option, or an
    option with a wrong value."""
    options = dict(spec)
    name = options.pop("type")
    if name not in PROJECTORS:
        raise unknown_name("projector", name, PROJECTORS)
    known = list(inspect.signature(PROJECTORS[name]).parameters)[2:]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of projector {name!r}:", option, known)
    for option, why in check_options(name, options).items():
        raise ValueError(f"option {option} of projector {name} {why}")
    return PROJECTORS[name](vision_hidden_size, text_hidden_size, **options)  # type: ignore[call-arg]
