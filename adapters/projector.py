"""What all projectors are: from an encoder's patch embeddings to visual tokens in the language model's hidden size.

Shapes: B images, P prefix tokens (class, registers), h x w patches, N = P + h * w, D_v encoder width, M visual tokens,
D_t language model width.
"""

from __future__ import annotations

import math

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

    def reset_own(self) -> None:
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.std)

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
    """What all projectors are: `features [B, N, D_v]` and `grid (h, w)` to visual tokens `[B, M, D_t]`.

    A module that has parameters or buffers of its own, apart from those of its layers, has a method `reset_own`. It
    initializes them by functions of `torch.nn.init`, which transformers keeps from what a checkpoint has.
    """

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


def pooled_side(name: str, num_image_tokens: int) -> int:
    """The side of the square that a grid is pooled to. Raises ValueError for tokens that make no square."""
    side = math.isqrt(num_image_tokens)
    if side**2 != num_image_tokens:
        raise ValueError(f"{name} needs a square number of num_image_tokens, not {num_image_tokens}")
    return side


def check_pool(name: str, side: int, grid: Grid) -> None:
    """Raises ValueError for a grid that is smaller than what it is pooled to."""
    if min(grid) < side:
        raise ValueError(
            f"{name} to {side} x {side} tokens needs at least as many patches; this encoder's grid is "
            f"{grid[0]} x {grid[1]}"
        )


def average_to(image: Tensor, side: int) -> Tensor:
    """Average `[B, C, h, w]` down to `[B, C, side, side]`, as `F.adaptive_avg_pool2d` does.

    Its gradient is deterministic on a GPU, unlike that of PyTorch's own kernel.
    """
    height, width = image.shape[-2:]
    if height % side == 0 and width % side == 0:
        return F.avg_pool2d(image, (height // side, width // side))
    dtype = torch.promote_types(image.dtype, torch.float32)
    rows, columns = (_windows(size, side, image.device).to(dtype) for size in (height, width))
    with torch.autocast(image.device.type, enabled=False):
        return (rows @ image.to(dtype) @ columns.T).to(image.dtype)


def _windows(size: int, side: int, device: torch.device) -> Tensor:
    """`[side, size]`: the weights with which `size` neighbours are averaged to `side`, in windows that may overlap."""
    number = torch.arange(side, device=device)[:, None]
    place = torch.arange(size, device=device)
    inside = (place >= number * size // side) & (place * side < (number + 1) * size)
    return inside / inside.sum(dim=1, keepdim=True)


def refuse_prefix(name: str, num_prefix: int) -> None:
    """Raises ValueError if there are class tokens, for projectors that take a grid and nothing else."""
    if num_prefix:
        raise ValueError(
            f"{name} works on the grid of patches and has no place for class tokens: "
            "set vision_feature_select_strategy: default"
        )
