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
from typing import Any, Literal, get_args

import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from vlm.adapters import unknown_name

Size = tuple[int, int]

TilingType = Literal["tiles", "anyres", "idefics3", "internvl"]
TILINGS = get_args(TilingType)
MOST_TILES = 1000
MAX_TILES = 6
"""Where nothing says how many."""

GLOBAL_TOKEN = "<global-img>"
FAKE_TOKEN = "<fake_token_around_image>"


@dataclass(frozen=True)
class Tiler:
    """Cuts images, and knows how many tiles and tokens an image becomes.

    With `tiles` and `anyres` the grid is the one of `grids`, or of at most `max_tiles` tiles, that keeps most of the
    image's own pixels and, among equals, has the fewest that the image does not fill (`select_best_resolution` of
    LLaVA-NeXT). `idefics3` scales an image up or down to as many tiles as the longest side may have, and `internvl`
    takes the nearest aspect ratio: both cut small images too, at the price of tokens that show nothing more.

    Attributes:
        type: `tiles` stretches the image over its grid and keeps tiles apart, row by row and the thumbnail last, with a
            marker before each. `anyres` keeps the image's proportions, pads it to the grid, and puts the tiles' tokens
            together to one grid again, behind those of the thumbnail (LLaVA-NeXT). `idefics3` and `internvl` cut, order
            and mark tiles as the processors of Idefics3 and SmolVLM, and that of InternVL.
        max_tiles: how many tiles an image may become, the thumbnail not counted. With `idefics3` the longest side has
            as many tiles as a square of at most `max_tiles` has.
        tile_size: of a tile in pixels, the size of the encoder's input.
        token_grid: with `anyres`, the grid that a tile's visual tokens lie on.
        grids: with `tiles` and `anyres`, rows and columns of the grids to choose from, the first of equally good ones
            (`image_grid_pinpoints` of LLaVA-NeXT, in tiles); None: all of at most `max_tiles` tiles.
    """

    type: TilingType
    max_tiles: int
    tile_size: Size
    token_grid: Size | None = None
    grids: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for what does not go together."""
        if self.grids is not None and self.type not in ("tiles", "anyres"):
            raise ValueError(f"tiling of type {self.type} has a rule of its own for grids: leave grids out")
        for rows, columns in self.grids or ():
            if not 1 <= rows * columns <= self.max_tiles:
                raise ValueError(f"a grid of {rows} x {columns} does not have 1 to {self.max_tiles} tiles (max_tiles)")
        if self.type == "idefics3" and self.tile_size[0] != self.tile_size[1]:
            height, width = self.tile_size
            raise ValueError(
                f"tiles of type idefics3 are squares, and the encoder's input is {height} x {width} pixels"
            )

    def grid(self, image_size: Size) -> tuple[int, int]:
        """Rows and columns. One tile would show what the thumbnail does: an image of 1 x 1 is a thumbnail alone."""
        return _grid(self, image_size)

    def all_grids(self) -> list[tuple[int, int]]:
        """All grids that an image may be cut into, as rows and columns."""
        if self.grids is not None:
            return list(self.grids)
        if self.type == "idefics3":
            side = self.tiles_a_side
            return [(rows, columns) for rows in range(1, side + 1) for columns in range(1, side + 1)]
        numbers = range(1, self.max_tiles + 1)
        return [(rows, columns) for rows in numbers for columns in numbers if rows * columns <= self.max_tiles]

    @property
    def tiles_a_side(self) -> int:
        """With `idefics3`, how many tiles the longest side of every image has."""
        return math.isqrt(self.max_tiles)

    def places(self, image_size: Size) -> list[tuple[int, int]]:
        """Row and column of each tile, from 1, in the order of `split`; the thumbnail's are 0."""
        rows, columns = self.grid(image_size)
        tiles = [(r, c) for r in range(1, rows + 1) for c in range(1, columns + 1)] if rows * columns > 1 else []
        return [(0, 0), *tiles] if self.type == "anyres" else [*tiles, (0, 0)]

    def num_tiles(self, image_size: Size) -> int:
        """How many images of `tile_size` an image becomes, the thumbnail among them."""
        rows, columns = self.grid(image_size)
        return rows * columns + 1 if rows * columns > 1 else 1

    def split(self, image: Image.Image, resample: int | None = None) -> list[Tensor]:
        """The tiles and the thumbnail, `[3, height, width]` bytes of `tile_size`, in the order of their tokens; to the
        byte as the published processors cut them.

        `resample` is the filter by its number in Pillow, as in image processors; None is bicubic.
        """
        resample = PILImageResampling.BICUBIC if resample is None else resample
        pixels = pil_to_tensor(image.convert("RGB")).contiguous()
        height, width = self.tile_size
        rows, columns = self.grid(size_of(image))
        whole = (rows * height, columns * width)
        if self.type == "idefics3":
            scaled = _resized(pixels, _idefics3_size(size_of(image), self.tiles_a_side * height), resample)
            canvas = pixels = _resized(scaled, whole, resample)
        elif rows * columns > 1:
            canvas = _padded(pixels, whole, resample) if self.type == "anyres" else _resized(pixels, whole, resample)
        thumbnail = _resized(pixels, self.tile_size, resample)
        if rows * columns == 1:
            return [thumbnail]
        tiles = [tile for row in canvas.split(height, dim=1) for tile in row.split(width, dim=2)]
        return [thumbnail, *tiles] if self.type == "anyres" else [*tiles, thumbnail]

    def num_image_tokens(self, image_size: Size, tokens_per_tile: int) -> int:
        """How many image tokens stand for an image in `input_ids`; markers are no image tokens."""
        if self.type != "anyres":
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

        With `idefics3` a marker before each tile, and a line break after each row; `tiles` has the same without the
        tokens around images, since markers stand between the tiles already.
        """
        if self.type in ("anyres", "internvl"):
            return image_token * self.num_image_tokens(image_size, tokens_per_tile)
        around = FAKE_TOKEN if self.type == "idefics3" else ""
        rows, columns = self.grid(image_size)
        tile = image_token * tokens_per_tile
        whole = around + GLOBAL_TOKEN + tile + around
        if rows * columns == 1:
            return whole
        lines = ["".join(around + marker(r, c) + tile for c in range(1, columns + 1)) for r in range(1, rows + 1)]
        return "".join(line + "\n" for line in lines) + "\n" + whole

    def markers(self) -> dict[str, str]:
        """All tokens that [`text`][Tiler.text] puts around tiles, and words for each. The row is named twice, so that
        the words of two differ in whatever order."""
        if self.type in ("anyres", "internvl"):
            return {}
        around = {FAKE_TOKEN: "image"} if self.type == "idefics3" else {}
        places = {(r + 1, c + 1) for rows, columns in self.all_grids() for r in range(rows) for c in range(columns)}
        tiles = {marker(r, c): f"row {r} row {r} column {c}" for r, c in sorted(places)}
        return around | {GLOBAL_TOKEN: "whole image"} | tiles


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
    if not isinstance(tiling, dict):
        raise ValueError(f"tiling must be an object with `type`, not {tiling!r:.80}")
    options = [field.name for field in fields(Tiler)]
    if unknown := [key for key in tiling if key not in options]:
        raise unknown_name("option of tiling", unknown[0], options)
    if tiling.get("type") not in TILINGS:
        raise unknown_name("tiling", str(tiling.get("type")), TILINGS)
    if not _is_count(most := tiling.get("max_tiles", MAX_TILES)) or most > MOST_TILES:
        raise ValueError(f"max_tiles of tiling must be a whole number from 1 to {MOST_TILES}, not {most!r:.80}")
    if tiling.get("tile_size") is None:
        raise ValueError("tiling has no tile_size, the pixels of a tile: [height, width]")
    pairs = [tiling[key] for key in ("tile_size", "token_grid") if tiling.get(key) is not None]
    grids = tiling.get("grids")
    for pair in [*pairs, *(grids if isinstance(grids, list | tuple) else [] if grids is None else [grids])]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(_is_count, pair)):
            raise ValueError(f"sizes and grids of tiling are pairs of whole numbers, [rows, columns], not {pair!r:.80}")
    return Tiler(**{key: _tuples(value) for key, value in tiling.items()})


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1_000_000


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


_BACKEND = TorchvisionBackend()


def _resized(pixels: Tensor, size: Size, resample: int) -> Tensor:
    return _BACKEND.resize(pixels, SizeDict(height=size[0], width=size[1]), resample=resample)


def _padded(pixels: Tensor, whole: Size, resample: int) -> Tensor:
    """As large as it fits into `whole`, in the middle, on black."""
    height, width = get_patch_output_size(pixels, whole, ChannelDimension.FIRST)
    top, left = (whole[0] - height) // 2, (whole[1] - width) // 2
    around = (left, whole[1] - width - left, top, whole[0] - height - top)
    return F.pad(_resized(pixels, (height, width), resample), around)


def _idefics3_size(image_size: Size, longest: int) -> Size:
    """To the number as Idefics3's image processor: the other side keeps the proportions, and is even."""
    height, width = image_size
    shortest = int(longest / (width / height)) if width >= height else int(longest * (width / height))
    shortest = max(shortest + shortest % 2, 1)
    return (shortest, longest) if width >= height else (longest, shortest)


@lru_cache(maxsize=4096)  # a data set has few sizes, and many examples of each
def _grid(tiler: Tiler, image_size: Size) -> tuple[int, int]:
    height, width = tiler.tile_size
    if tiler.type == "internvl":
        columns, rows = get_optimal_tiled_canvas(image_size, tiler.tile_size, 1, tiler.max_tiles)
        return rows, columns
    if tiler.type == "idefics3":
        scaled = _idefics3_size(image_size, tiler.tiles_a_side * height)
        # Its processor goes by the proportions a second time, whose rounding it leaves in.
        ratio, longest = scaled[1] / scaled[0], max(scaled)
        across = scaled[1] >= scaled[0]
        shortest = math.ceil(int(longest / ratio if across else longest * ratio) / height)
        return (shortest, tiler.tiles_a_side) if across else (tiler.tiles_a_side, shortest)
    best = select_best_resolution(image_size, [(rows * height, columns * width) for rows, columns in tiler.all_grids()])
    return best[0] // height, best[1] // width
