"""Projectors: from an encoder's patch embeddings to visual tokens in the language model's hidden size.

Shapes: B images, P prefix tokens (class, registers), h x w patches, N = P + h * w, D_v encoder width, M visual tokens,
D_t language model width. A new projector is a class here and a line in `PROJECTORS`.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]


def split_prefix(features: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """`[B, P + h * w, D]` into the prefix tokens `[B, P, D]` and the patches `[B, h * w, D]`."""
    num_patches = grid[0] * grid[1]
    return features[:, :-num_patches], features[:, -num_patches:]


class Standardize(nn.Module):
    """Gives each channel of the features mean 0 and standard deviation 1 over the images it was fitted to. Until it is
    fitted, features pass as they are.

    In many encoders a few channels are tens of times larger than the rest (arXiv 2402.17762), and all images share much
    of what is left. A projector that is fed so spends its first steps on both. RADIO standardises the features of its
    teachers for the same reason (arXiv 2410.01680). Class and register tokens have statistics of their own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2, hidden_size))  # of the prefix tokens, of the patches
        self.register_buffer("std", torch.ones(2, hidden_size))

    @torch.no_grad()
    def fit(self, features: Tensor, grid: Grid) -> None:
        """Take the statistics of `features [B, P + h * w, D]`."""
        for row, tokens in enumerate(split_prefix(features.float(), grid)):
            if tokens.numel():
                std, mean = torch.std_mean(tokens.flatten(0, 1), dim=0)
                self.mean[row] = mean
                self.std[row] = std.clamp(min=1e-6)

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        parts = zip(split_prefix(features, grid), self.mean, self.std, strict=True)
        return torch.cat([(tokens - mean) / std for tokens, mean, std in parts], dim=1)


class Projector(nn.Module):
    """What all projectors are: `features [B, N, D_v]` and `grid (h, w)` to visual tokens `[B, M, D_t]`."""

    output: str
    """Names the layer whose parameters the size of the visual tokens is proportional to."""

    def __init__(self, vision_hidden_size: int) -> None:
        super().__init__()
        self.standardize = Standardize(vision_hidden_size)

    def num_tokens(self, num_prefix: int, grid: Grid) -> int:
        """What M is. Raises ValueError for a number of prefix tokens or a grid that the projector cannot take."""
        return num_prefix + grid[0] * grid[1]

    def token_grid(self, grid: Grid) -> Grid | None:
        """The grid on which the visual tokens of patches lie, row by row; None if they lie on none."""
        return grid

    def forward(self, features: Tensor, grid: Grid) -> Tensor:
        return self.project(self.standardize(features, grid), grid)

    def project(self, features: Tensor, grid: Grid) -> Tensor:
        """Standardised features to visual tokens."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, features: Tensor, grid: Grid, token_size: float) -> None:
        """Fit a new projector to what it will read and to the words that its tokens will stand among, as data-dependent
        initialisation does (arXiv 1511.06856): the channels of `features` are standardised, and `token_size` becomes
        the root mean square of the visual tokens.

        Learning was slower without either. A likely reason for the second: what the decoder's first layers add is small
        beside tokens that are much larger than words.
        """
        self.standardize.fit(features, grid)
        size = self(features[:64], grid).square().mean().sqrt()
        for parameter in self.get_submodule(self.output).parameters():
            parameter.mul_(token_size / size)


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
        self.proj = nn.Linear(vision_hidden_size * scale_factor**2, text_hidden_size, bias=False)

    def num_tokens(self, num_prefix: int, grid: Grid) -> int:
        h, w = grid
        if num_prefix:
            raise ValueError(
                "pixel_shuffle works on the grid of patches and has no place for class tokens: "
                "set vision_feature_select_strategy: default"
            )
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


class AveragePoolProjector(Projector):
    """The grid of patches is averaged down to `num_image_tokens` (a square number), normalised and projected
    (Gemma 3, arXiv 2503.19786). Class tokens, where they are kept, pass beside the pool."""

    output = "linear"

    def __init__(self, vision_hidden_size: int, text_hidden_size: int, num_image_tokens: int = 64) -> None:
        super().__init__(vision_hidden_size)
        self.side = math.isqrt(num_image_tokens)
        if self.side**2 != num_image_tokens:
            raise ValueError(f"average_pool needs a square number of num_image_tokens, not {num_image_tokens}")
        self.norm = nn.RMSNorm(vision_hidden_size, eps=1e-6)
        self.linear = nn.Linear(vision_hidden_size, text_hidden_size, bias=False)

    def num_tokens(self, num_prefix: int, grid: Grid) -> int:
        if min(grid) < self.side:
            raise ValueError(
                f"average_pool to {self.side} x {self.side} tokens needs at least as many patches; "
                f"this encoder's grid is {grid[0]} x {grid[1]}"
            )
        return num_prefix + self.side**2

    def token_grid(self, grid: Grid) -> Grid:
        return self.side, self.side

    def project(self, features: Tensor, grid: Grid) -> Tensor:
        prefix, patches = split_prefix(features, grid)
        image = patches.transpose(1, 2).unflatten(2, grid)
        pooled = F.adaptive_avg_pool2d(image, self.side).flatten(2).transpose(1, 2)
        return self.linear(self.norm(torch.cat([prefix, pooled], dim=1)))


class ResamplerLayer(nn.Module):
    """Latents attend to the features and to themselves, then a feed-forward (Flamingo, arXiv 2204.14198, figure 5)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm_latents = nn.LayerNorm(hidden_size)
        self.norm_features = nn.LayerNorm(hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(hidden_size),
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(),
            nn.Linear(4 * hidden_size, hidden_size),
        )

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        query = self.norm_latents(latents)
        memory = torch.cat([self.norm_features(features), query], dim=1)
        latents = latents + self.attention(query, memory, memory, need_weights=False)[0]
        return latents + self.feed_forward(latents)


class ResamplerProjector(Projector):
    """Perceiver resampler: `num_image_tokens` learned latents, refined over `depth` layers (Flamingo, Idefics2)."""

    output = "norm"

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        num_image_tokens: int = 64,
        depth: int = 2,
        num_heads: int = 8,
    ) -> None:
        super().__init__(vision_hidden_size)
        self.latents = nn.Parameter(torch.randn(num_image_tokens, text_hidden_size) * 0.02)
        self.proj_in = nn.Linear(vision_hidden_size, text_hidden_size)
        heads = max(n for n in range(1, num_heads + 1) if text_hidden_size % n == 0)
        self.layers = nn.ModuleList([ResamplerLayer(text_hidden_size, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(text_hidden_size)

    def num_tokens(self, num_prefix: int, grid: Grid) -> int:
        return len(self.latents)

    def token_grid(self, grid: Grid) -> None:
        return None

    def project(self, features: Tensor, grid: Grid) -> Tensor:
        features = self.proj_in(features)
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        return self.norm(latents)


PROJECTORS: dict[str, type[Projector]] = {
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "pixel_shuffle": PixelShuffleProjector,
    "average_pool": AveragePoolProjector,
    "resampler": ResamplerProjector,
}


def unknown_name(kind: str, name: str, known: Collection[str]) -> ValueError:
    """The error for a name that no `known` one equals: it lists them and suggests the nearest."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(sorted(known))}.")


def build_projector(spec: dict[str, Any], vision_hidden_size: int, text_hidden_size: int) -> Projector:
    """The projector of `spec`, `{"type": NAME, **options}`. Raises ValueError naming an unknown type or option."""
    options = dict(spec)
    name = options.pop("type")
    if name not in PROJECTORS:
        raise unknown_name("projector", name, PROJECTORS)
    known = list(inspect.signature(PROJECTORS[name]).parameters)[2:]
    for option in options:
        if option not in known:
            raise unknown_name(f"option of projector {name!r}:", option, known)
    return PROJECTORS[name](vision_hidden_size, text_hidden_size, **options)  # type: ignore[call-arg]
