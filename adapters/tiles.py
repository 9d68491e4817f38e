"""From the visual tokens of tiles to those of images.

Shapes: T tiles of all images, M visual tokens a tile on a grid of h x w, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Box = tuple[int, int, int, int]


class TilePositions(nn.Module):
    """Adds to a tile's tokens a learned embedding of where in the image the tile is (Mllama's is such a table too).

    Where tokens stand in a sequence, markers and their order tell; to cross-attention all tiles look alike otherwise.
    """

    def __init__(self, max_tiles: int, hidden_size: int) -> None:
        super().__init__()
        # Zero, so that a new bridge sees tiles as an encoder shows them, and learns from there.
        self.row = nn.Parameter(torch.zeros(max_tiles + 1, hidden_size))
        self.column = nn.Parameter(torch.zeros(max_tiles + 1, hidden_size))

    def reset_own(self) -> None:
        nn.init.zeros_(self.row)
        nn.init.zeros_(self.column)

    def forward(self, visual_tokens: Tensor, places: Tensor) -> Tensor:
        """`visual_tokens [T, M, D]`, and `places [T, 2]`, each tile's row and column from 1; 0 is the thumbnail."""
        rows, columns = places.unbind(dim=1)
        return visual_tokens + (self.row[rows] + self.column[columns]).unsqueeze(1)


class AnyresMerger(nn.Module):
    """Puts the tokens of an image's tiles together to one grid, and a learned `image_newline` at the end of each row
    (LLaVA-NeXT's `pack_image_features`)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.image_newline = nn.Parameter(torch.empty(hidden_size))
        self.reset_own()

    def reset_own(self) -> None:
        nn.init.normal_(self.image_newline, std=len(self.image_newline) ** -0.5)

    def forward(self, visual_tokens: Tensor, grid: tuple[int, int], token_grid: tuple[int, int], box: Box) -> Tensor:
        """The tokens of one image, `[N, D]`.

        Args:
            visual_tokens: `[1 + rows * columns, h * w, D]`, the thumbnail first; it alone if there is one tile.
            grid: rows and columns of tiles.
            token_grid: h and w.
            box: top, left, height and width of what is kept of the whole grid; around it is padding.
        """
        thumbnail, tiles = visual_tokens[0], visual_tokens[1:]
        if not len(tiles):
            return torch.cat([thumbnail, self.image_newline[None].to(thumbnail)])
        (rows, columns), (h, w), (top, left, height, width) = grid, token_grid, box
        whole = tiles.view(rows, columns, h, w, -1).transpose(1, 2).reshape(rows * h, columns * w, -1)
        kept = whole[top : top + height, left : left + width]
        newline = self.image_newline.to(kept).expand(height, 1, -1)
        return torch.cat([thumbnail, torch.cat([kept, newline], dim=1).flatten(0, 1)])
