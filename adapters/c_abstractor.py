"""The C-Abstractor: convolutions before and after a pool, so that neighbours are joined before patches are lost.

Shapes: B images, h x w patches, C channels, D_v encoder width, D_t language model width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vlm.adapters.projector import Grid, Projector, average_to, check_pool, pooled_side, refuse_prefix


class ConvBlock(nn.Module):
    """`[B, h, w, C_in]` to `[B, h, w, C_out]`: the bottleneck of RegNet Y (arXiv 2003.13678) with a depthwise
    convolution, LayerNorm and SiLU, as Honeybee takes it from timm. Convolutions of 1 x 1 are linear layers."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        squeezed = round(in_channels / 4)
        self.linear_in = nn.Linear(in_channels, channels, bias=False)
        self.norm_in = nn.LayerNorm(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm_conv = nn.LayerNorm(channels)
        self.squeeze = nn.Linear(channels, squeezed)
        self.excite = nn.Linear(squeezed, channels)
        self.linear_out = nn.Linear(channels, channels, bias=False)
        self.norm_out = nn.LayerNorm(channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(nn.Linear(in_channels, channels, bias=False), nn.LayerNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        found = F.silu(self.norm_in(self.linear_in(x)))
        found = self.conv(found.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        found = F.silu(self.norm_conv(found))
        weights = self.excite(F.silu(self.squeeze(found.mean(dim=(1, 2), keepdim=True)))).sigmoid()
        return F.silu(self.norm_out(self.linear_out(found * weights)) + self.shortcut(x))


class CAbstractorProjector(Projector):
    """`depth` convolution blocks, the grid averaged down to `num_image_tokens` (a square number), `depth` more blocks,
    and two linear layers (Honeybee, arXiv 2312.06742), without its learned positions, which fit one grid only."""

    output = "linear_2"

    def __init__(
        self,
        vision_hidden_size: int,
        text_hidden_size: int,
        num_image_tokens: int = 64,
        hidden_size: int = 1024,
        depth: int = 3,
    ) -> None:
        super().__init__(vision_hidden_size)
        self.side = pooled_side("c_abstractor", num_image_tokens)
        widths = [vision_hidden_size, *[hidden_size] * depth]
        self.before = nn.Sequential(*map(ConvBlock, widths, widths[1:]))
        self.after = nn.Sequential(*(ConvBlock(hidden_size, hidden_size) for _ in range(depth)))
        self.linear_1 = nn.Linear(hidden_size, text_hidden_size)
        self.linear_2 = nn.Linear(text_hidden_size, text_hidden_size)

    def num_tokens(self, num_prefix: int, grid: Grid) -> int:
        refuse_prefix("c_abstractor", num_prefix)
        check_pool("c_abstractor", self.side, grid)
        return self.side**2

    def token_grid(self, grid: Grid) -> Grid:
        return self.side, self.side

    def project(self, features: Tensor, grid: Grid) -> Tensor:
        image = self.before(features.unflatten(1, grid)).permute(0, 3, 1, 2)
        image = self.after(average_to(image, self.side).permute(0, 2, 3, 1))
        return self.linear_2(F.silu(self.linear_1(image.flatten(1, 2))))
