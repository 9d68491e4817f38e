"""Tiling: an image in more detail than the encoder's input has room for, as a grid of tiles and a thumbnail.

    an image of 640 x 480, tiles of 224 x 224     +---+---+---+     +---+
                                                  |   |   |   |     |   |  thumbnail
                                                  +---+---+---+     +---+
                                                  |   |   |   |
                                                  +---+---+---+  2 rows, 3 columns

To the encoder a tile is what an image is without tiling. What becomes of an image follows from its size alone. Sizes
are `(height, width)`, as in `image_sizes` of transformers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from vlm.adapters import unknown_name

Size = tuple[int, int]

TILINGS = ("tiles", "anyres")
MAX_TILES = 6
"""Where nothing says how many."""

GLOBAL_TOKEN = "<global-img>"


@dataclass(frozen=True)
class Tiler:
    """Cuts images, and knows how many tiles and tokens an image becomes.

    The grid is the one of at most `max_tiles` tiles that keeps most of the image's own pixels and, among equals, has
    the fewest that the image does not fill (`select_best_resolution` of LLaVA-NeXT, over all grids). InternVL's rule,
    the nearest aspect ratio, would cut small images into tiles too, at the price of tokens that show nothing more.

    Attributes:
        type: `tiles` stretches the image over its grid and keeps tiles apart, row by row and the thumbnail last, with a
            marker before each (Idefics3, SmolVLM). `anyres` keeps the image's proportions, pads it to the grid, and
            puts the tiles' tokens together to one grid again, behind those of the thumbnail (LLaVA-NeXT).
        max_tiles: how many tiles an image may become, the thumbnail not counted.
        tile_size: of a tile in pixels, the size of the encoder's input.
        token_grid: with `anyres`, the grid that a tile's visual tokens lie on.
    """

    type: Literal["tiles", "anyres"]
    max_tiles: int
    tile_size: Size
    token_grid: Size | None = None

    def grid(self, image_size: Size) -> tuple[int, int]:
        """Rows and columns. One tile would show what the thumbnail does: an image of 1 x 1 is a thumbnail alone."""
        return _grid(self, image_size)

    def grids(self) -> list[tuple[int, int]]:
        """All grids that an image may be cut into."""
        side = range(1, self.max_tiles + 1)
        return [(rows, columns) for rows in side for columns in side if rows * columns <= self.max_tiles]

    def places(self, image_size: Size) -> list[tuple[int, int]]:
        """Row and column of each tile, from 1, in the order of `split`; the thumbnail's are 0."""
        rows, columns = self.grid(image_size)
        tiles = [(r, c) for r in range(1, rows + 1) for c in range(1, columns + 1)] if rows * columns > 1 else []
        return [(0, 0), *tiles] if self.type == "anyres" else [*tiles, (0, 0)]

    def num_tiles(self, image_size: Size) -> int:
        """How many images of `tile_size` an image becomes, the thumbnail among them."""
        rows, columns = self.grid(image_size)
        return rows * columns + 1 if rows * columns > 1 else 1

    def split(self, image: Image.Image) -> list[Image.Image]:
        """The tiles and the thumbnail, each of `tile_size`, in the order of their tokens."""
        height, width = self.tile_size
        thumbnail = image.resize((width, height), Image.Resampling.BICUBIC)
        rows, columns = self.grid(size_of(image))
        if rows * columns == 1:
            return [thumbnail]
        whole = (columns * width, rows * height)
        canvas = _padded(image, *whole) if self.type == "anyres" else image.resize(whole, Image.Resampling.BICUBIC)
        corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
        tiles = [canvas.crop((left, top, left + width, top + height)) for left, top in corners]
        return [thumbnail, *tiles] if self.type == "anyres" else [*tiles, thumbnail]

    def num_image_tokens(self, image_size: Size, tokens_per_tile: int) -> int:
        """How many image tokens stand for an image in `input_ids`; markers are no image tokens."""
        if self.type == "tiles":
            return self.num_tiles(image_size) * tokens_per_tile
        _, _, height, width = self.unpadded(image_size)
        return tokens_per_tile + height * (width + 1) if self.num_tiles(image_size) > 1 else tokens_per_tile + 1

    def unpadded(self, image_size: Size) -> tuple[int, int, int, int]:
        """Where the image itself is in the grid of all tiles' tokens: top, left, height and width.

        To the number as LLaVA-NeXT's `unpad_image`, whose rounding leaves a row or a column of padding at times.
        Raises ValueError without a `token_grid`.
        """
        if self.token_grid is None:
            raise ValueError(f"tiling of type {self.type} has no grid of tokens")
        rows, columns = self.grid(image_size)
        height, width = rows * self.token_grid[0], columns * self.token_grid[1]
        if image_size[1] / image_size[0] > width / height:
            top = (height - int(round(image_size[0] * (width / image_size[1]), 7))) // 2
            return top, 0, height - 2 * top, width
        left = (width - int(round(image_size[1] * (height / image_size[0]), 7))) // 2
        return 0, left, height, width - 2 * left

    def text(self, image_size: Size, image_token: str, tokens_per_tile: int) -> str:
        """What stands for an image in a text.

        With `tiles` a marker before each, and a line break after each row, as Idefics3 has them. The tokens that it
        puts around images are left out: the markers stand between the tiles already.
        """
        if self.type == "anyres":
            return image_token * self.num_image_tokens(image_size, tokens_per_tile)
        rows, columns = self.grid(image_size)
        tile, whole = image_token * tokens_per_tile, GLOBAL_TOKEN + image_token * tokens_per_tile
        if rows * columns == 1:
            return whole
        lines = ["".join(marker(r, c) + tile for c in range(1, columns + 1)) for r in range(1, rows + 1)]
        return "".join(line + "\n" for line in lines) + "\n" + whole

    def markers(self) -> dict[str, str]:
        """All tokens that [`text`][Tiler.text] puts before tiles, and words for each. The row is named twice, so that
        the words of two differ in whatever order."""
        if self.type == "anyres":
            return {}
        # The last tile of a grid is where the grid's numbers say: there are as many places as grids.
        return {GLOBAL_TOKEN: "whole image"} | {marker(r, c): f"row {r} row {r} column {c}" for r, c in self.grids()}


def size_of(image: Image.Image) -> Size:
    """`(height, width)`."""
    return image.height, image.width


def marker(row: int, column: int) -> str:
    """The token before a tile, counted from 1."""
    return f"<row_{row}_col_{column}>"


def tiler_of(tiling: dict[str, Any] | None) -> Tiler | None:
    """The tiler of a configuration, whose tuples are lists once it has been JSON. Raises ValueError for another type or
    option than there is."""
    if tiling is None:
        return None
    options = [field.name for field in fields(Tiler)]
    if unknown := [key for key in tiling if key not in options]:
        raise unknown_name("option of tiling", unknown[0], options)
    if tiling.get("type") not in TILINGS:
        raise unknown_name("tiling", str(tiling.get("type")), TILINGS)
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in tiling.items()}
    return Tiler(**values)


def _padded(image: Image.Image, width: int, height: int) -> Image.Image:
    """As large as it fits into `width` x `height`, in the middle, on black."""
    across, down = width / image.width, height / image.height
    if across < down:
        size = width, min(math.ceil(image.height * across), height)
    else:
        size = min(math.ceil(image.width * down), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas


@lru_cache(maxsize=4096)  # a data set has few sizes, and many examples of each
def _grid(tiler: Tiler, image_size: Size) -> tuple[int, int]:
    height, width = tiler.tile_size
    resolutions = [(rows * height, columns * width) for rows, columns in tiler.grids()]
    best = select_best_resolution(image_size, resolutions)
    return best[0] // height, best[1] // width
