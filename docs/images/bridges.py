"""Draws the pictures of docs/bridges.md: `python docs/images/bridges.py` writes bridge_*.svg beside this file.

Blue squares are patches, violet ones learned, green ones visual tokens, grey ones text.
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

PATCH, LEARNED, VISUAL, TEXT, LAYER, INK, MUTED = (
    "#5b8def",
    "#9a6dd7",
    "#3fa66b",
    "#9aa4b2",
    "#eef1f6",
    "#1f2733",
    "#5c6776",
)
TINTS = ("#2f62c9", "#5b8def", "#8fb3f7", "#c0d5fb")
CELL, GAP = 15, 3
STEP = CELL + GAP


class Picture:
    """A card, dark on light whatever the page's colour, that shapes are added to. Measures are in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.shapes: list[str] = []
        self.rect(0.5, 0.5, width - 1, height - 1, "#ffffff", stroke="#d0d7e2", radius=10)

    def rect(self, x: float, y: float, w: float, h: float, fill: str, *, stroke: str = "none", radius: int = 2) -> None:
        self.shapes.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(self, x: float, y: float, words: str, *, size: int = 13, fill: str = INK, anchor: str = "middle") -> None:
        self.shapes.append(
            f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through `points` with a head at the end."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{MUTED}" stroke-width="1.5" marker-end="url(#head)"/>'
        )

    def box(self, x: float, y: float, w: float, h: float, *lines: str) -> None:
        """A layer; the first line says which, the others how."""
        self.rect(x, y, w, h, LAYER, stroke="#b9c3d3", radius=6)
        top = y + h / 2 + 4.5 - 8 * (len(lines) - 1)
        for number, line in enumerate(lines):
            size, fill = (13, INK) if number == 0 else (11, MUTED)
            self.text(x + w / 2, top + 16 * number, line, size=size, fill=fill)

    def grid(
        self, x: float, y: float, rows: int, columns: int, fill: str | Callable[[int, int], str], caption: str = ""
    ) -> None:
        for row in range(rows):
            for column in range(columns):
                colour = fill if isinstance(fill, str) else fill(row, column)
                self.rect(x + column * STEP, y + row * STEP, CELL, CELL, colour)
        if caption:
            self.text(x + (columns * STEP - GAP) / 2, y + rows * STEP + 14, caption, size=11, fill=MUTED)

    def svg(self) -> str:
        width, height = self.size
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{MUTED}"/></marker>'
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">\n<defs>{head}</defs>\n'
            + "\n".join(self.shapes)
            + "\n</svg>\n"
        )


def quarter(row: int, column: int) -> str:
    """The colour of a patch by the square of 2 x 2 that it belongs to."""
    return TINTS[2 * (row // 2) + column // 2]


def each_patch(*layers: str) -> Picture:
    """Projectors that take one patch at a time."""
    picture = Picture(270 + 116 * len(layers), 130)
    picture.grid(30, 24, 4, 4, PATCH, "h x w patches")
    picture.arrow((112, 58), (150, 58))
    x = 156
    for layer in layers:
        picture.box(x, 38, 78, 40, layer)
        x += 78
        picture.arrow((x + 4, 58), (x + 32, 58))
        x += 38
    picture.grid(x + 4, 24, 4, 4, VISUAL, "h x w visual tokens")
    return picture


def pixel_shuffle(*layers: str) -> Picture:
    picture = Picture(540 + 50 * (len(layers) - 1), 130)
    picture.grid(30, 24, 4, 4, quarter, "h x w patches")
    picture.arrow((112, 58), (160, 58))
    for row, tint in enumerate(TINTS):
        picture.grid(170, 24 + row * STEP, 1, 4, tint)
    picture.text(205, 110, "each square side by side", size=11, fill=MUTED)
    picture.arrow((252, 58), (290, 58))
    width = 84 + 50 * (len(layers) - 1)
    picture.box(296, 38, width, 40, *layers)
    picture.arrow((302 + width, 58), (340 + width, 58))
    picture.grid(356 + width, 24, 4, 1, VISUAL, "h x w / 4 visual tokens")
    return picture


def average_pool() -> Picture:
    picture = Picture(650, 130)
    picture.grid(30, 24, 4, 4, quarter, "h x w patches")
    picture.arrow((112, 58), (150, 58))
    picture.box(156, 38, 96, 40, "mean", "of each square")
    picture.arrow((258, 58), (292, 58))
    picture.grid(304, 42, 2, 2, lambda row, column: TINTS[2 * row + column])
    picture.arrow((350, 58), (384, 58))
    picture.box(390, 38, 120, 40, "RMSNorm, linear")
    picture.arrow((516, 58), (550, 58))
    picture.grid(562, 42, 2, 2, VISUAL)
    picture.text(570, 110, "visual tokens", size=11, fill=MUTED)
    return picture


def c_abstractor() -> Picture:
    picture = Picture(760, 130)
    picture.grid(30, 24, 4, 4, PATCH, "h x w patches")
    picture.arrow((112, 58), (142, 58))
    picture.box(148, 38, 110, 40, "convolutions", "depth blocks, 3 x 3")
    picture.arrow((264, 58), (294, 58))
    picture.box(300, 38, 84, 40, "mean", "of each square")
    picture.arrow((390, 58), (420, 58))
    picture.box(426, 38, 110, 40, "convolutions", "depth blocks, 3 x 3")
    picture.arrow((542, 58), (572, 58))
    picture.box(578, 38, 74, 40, "MLP")
    picture.arrow((658, 58), (684, 58))
    picture.grid(694, 42, 2, 2, VISUAL)
    picture.text(706, 110, "visual tokens", size=11, fill=MUTED)
    return picture


def resampler() -> Picture:
    picture = Picture(760, 190)
    picture.grid(30, 20, 4, 4, PATCH, "h x w patches")
    picture.grid(36, 134, 1, 3, LEARNED, "learned latents")
    picture.arrow((112, 54), (142, 54))
    picture.box(148, 34, 74, 40, "linear")
    picture.rect(252, 16, 310, 158, "none", stroke="#b9c3d3", radius=8)
    picture.text(407, 166, "depth times", size=11, fill=MUTED)
    picture.arrow((222, 54), (278, 54))
    picture.box(284, 34, 116, 106, "attention", "keys and values:", "patches and latents")
    picture.arrow((94, 141), (120, 141), (120, 118), (278, 118))
    picture.text(196, 112, "queries", size=11, fill=MUTED)
    picture.arrow((400, 87), (434, 87))
    picture.box(440, 67, 100, 40, "feed-forward")
    picture.arrow((562, 87), (590, 87))
    picture.box(596, 67, 60, 40, "norm")
    picture.arrow((662, 87), (684, 87))
    picture.grid(692, 79, 1, 3, VISUAL)
    picture.text(712, 118, "visual tokens", size=11, fill=MUTED)
    return picture


def qformer() -> Picture:
    picture = Picture(760, 200)
    picture.grid(30, 20, 4, 4, PATCH, "h x w patches")
    picture.grid(36, 138, 1, 3, LEARNED, "learned queries")
    picture.rect(140, 68, 450, 116, "none", stroke="#b9c3d3", radius=8)
    picture.text(365, 177, "num_hidden_layers times, a norm after each part", size=11, fill=MUTED)
    picture.arrow((96, 146), (118, 146), (118, 122), (154, 122))
    picture.box(160, 90, 116, 64, "self-attention", "of the queries")
    picture.arrow((276, 122), (304, 122))
    picture.box(310, 90, 136, 64, "cross-attention", "to the patches, in", "every second layer")
    picture.arrow((112, 46), (378, 46), (378, 84))
    picture.arrow((446, 122), (474, 122))
    picture.box(480, 90, 96, 64, "feed-forward")
    picture.arrow((590, 122), (614, 122))
    picture.box(620, 102, 56, 40, "linear")
    picture.arrow((676, 122), (694, 122))
    picture.grid(700, 114, 1, 3, VISUAL)
    picture.text(716, 154, "visual tokens", size=11, fill=MUTED)
    return picture


def sequence(picture: Picture, x: float, y: float, kinds: str) -> None:
    """A row of tokens: `v` is visual, anything else text."""
    for place, kind in enumerate(kinds):
        picture.rect(x + place * STEP, y, CELL, CELL, VISUAL if kind == "v" else TEXT)


def prefix() -> Picture:
    picture = Picture(760, 130)
    sequence(picture, 30, 46, "ttvvvvvvtttt")
    picture.text(136, 82, "visual tokens in place of the image token", size=11, fill=MUTED)
    picture.arrow((252, 54), (290, 54))
    x = 296
    for _ in range(4):
        picture.box(x, 34, 70, 40, "layer")
        picture.arrow((x + 70, 54), (x + 90, 54))
        x += 96
    sequence(picture, x + 2, 46, "tt")
    picture.text(488, 104, "the language model, as it is", size=11, fill=MUTED)
    return picture


def fused(blocks: Sequence[int], caption: str, *, count_blocks: bool) -> Picture:
    """A decoder with cross-attention, in green, before some of its four layers. Layers are counted from 0 with these
    among them, or from 1 without."""
    picture = Picture(720, 196)
    sequence(picture, 24, 46, "titttt")
    picture.rect(24 + STEP, 46, CELL, CELL, "#ffffff", stroke=VISUAL)
    picture.text(76, 82, "one token an image", size=11, fill=MUTED)
    picture.arrow((134, 54), (154, 54))
    x, number = 160, 0 if count_blocks else 1
    for layer in range(4):
        if layer in blocks:
            if count_blocks:
                picture.text(x + 31, 26, str(number), size=11, fill=MUTED)
                number += 1
            picture.rect(x, 34, 62, 40, "#e3f4ea", stroke=VISUAL, radius=6)
            picture.text(x + 31, 51, "cross-", size=12)
            picture.text(x + 31, 66, "attention", size=12)
            picture.arrow((x + 31, 130), (x + 31, 80))
            picture.arrow((x + 62, 54), (x + 80, 54))
            x += 86
        picture.text(x + 28, 26, str(number), size=11, fill=MUTED)
        number += 1
        picture.box(x, 34, 56, 40, "layer")
        picture.arrow((x + 56, 54), (x + 74, 54))
        x += 80
    sequence(picture, x + 2, 46, "tt")
    first = 160 + sum(80 + 86 * (layer in blocks) for layer in range(blocks[0])) + 31
    last = x - 80 * (4 - blocks[-1]) - 86 + 31
    picture.shapes.append(f'<line x1="{first}" y1="130" x2="{last}" y2="130" stroke="{MUTED}" stroke-width="1.5"/>')
    middle = (first + last) / 2
    sequence(picture, middle - 3 * STEP, 140, "vvvvvv")
    picture.text(middle, 176, caption, size=11, fill=MUTED)
    return picture


PICTURES = {
    "linear": lambda: each_patch("linear"),
    "mlp": lambda: each_patch("linear", "GELU", "linear"),
    "pixel_shuffle": lambda: pixel_shuffle("linear"),
    "pixel_shuffle_mlp": lambda: pixel_shuffle("LayerNorm, linear,", "GELU, linear"),
    "average_pool": average_pool,
    "c_abstractor": c_abstractor,
    "resampler": resampler,
    "qformer": qformer,
    "prefix": prefix,
    "cross_attention": lambda: fused([1, 3], "cross_attention_every: 2", count_blocks=False),
    "cross_attention_layers": lambda: fused([1, 3], "cross_attention_layers: [1, 4]", count_blocks=True),
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"bridge_{name}.svg").write_text(draw().svg(), encoding="utf-8")
