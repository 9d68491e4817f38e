"""Draws the picture of docs/tiling.md: `python docs/images/tiling.py` writes tiling.png beside this file."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image

from vlm.tiling import GLOBAL_TOKEN, Tiler, marker

INK, MUTED, LINE, KEPT, NEWLINE = "#1f2733", "#5c6776", "#d0d7e2", "#2f62c9", "#e0782f"
SIZE = (1000, 560)
TILE, TOKENS = 224, 14
"""Sides of a tile in pixels and in tokens, as in an encoder with patches of 16 pixels."""


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def scene() -> Image.Image:
    """A shop front whose opening hours are too small to read where the whole image has the size of a tile."""
    image = Image.new("RGB", SIZE, "#bcdcf5")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 470, 1000, 560), fill="#8d8f94")
    draw.ellipse((850, 40, 930, 120), fill="#ffd75e")
    draw.rectangle((90, 110, 760, 480), fill="#d98b5f", outline="#8a4f30", width=5)
    for x in range(90, 760, 67):
        draw.rectangle((x, 190, x + 33, 240), fill="#c0392b")
        draw.rectangle((x + 33, 190, x + 67, 240), fill="#f6f1e7")
    draw.rectangle((90, 120, 760, 188), fill="#31493c")
    draw.text((425, 154), "BAKERY  MILLER & DAUGHTER", font=font(38), fill="#f6e7b0", anchor="mm")
    draw.rectangle((130, 270, 390, 440), fill="#eaf6ff", outline="#8a4f30", width=5)
    for x, colour in ((150, "#c98a3d"), (225, "#b5722d"), (300, "#d9a24e")):
        draw.ellipse((x, 370, x + 65, 430), fill=colour, outline="#7d4d1c", width=3)
    draw.text((260, 300), "Rye 3.40   Wheat 2.95", font=font(19), fill=INK, anchor="mm")
    draw.text((260, 328), "Poppy seed roll 0.75", font=font(19), fill=INK, anchor="mm")
    draw.rectangle((430, 270, 530, 480), fill="#6b4a34", outline="#4c3323", width=4)
    draw.ellipse((508, 370, 522, 384), fill="#ffd75e")
    draw.rectangle((560, 262, 740, 460), fill="#fffdf5", outline=INK, width=2)
    draw.text((650, 282), "OPENING HOURS", font=font(18), fill=INK, anchor="mm")
    hours = ["Mon  closed", "Tue  06:30 - 18:00", "Wed  06:30 - 13:00", "Thu  06:30 - 18:00", "Fri  06:30 - 18:30"]
    for line, words in enumerate([*hours, "Sat  07:00 - 12:30", "Sun  08:00 - 11:00"]):
        draw.text((575, 300 + 22 * line), words, font=font(17), fill=INK)
    draw.rectangle((860, 250, 872, 480), fill="#5c6776")
    draw.rectangle((815, 170, 950, 250), fill="#2f62c9")
    draw.text((882, 195), "BUS 47", font=font(24), fill="white", anchor="mm")
    draw.text((882, 226), "Old Harbour", font=font(18), fill="white", anchor="mm")
    return image


def draw() -> Image.Image:
    image = scene()
    size = (image.height, image.width)
    tiles, anyres = (Tiler(kind, 6, (TILE, TILE), (TOKENS, TOKENS)) for kind in ("tiles", "anyres"))
    rows, columns = tiles.grid(size)
    card = Image.new("RGB", (1560, 1160), "white")
    paint = ImageDraw.Draw(card)
    paint.rounded_rectangle((0, 0, 1559, 1159), 14, outline=LINE, width=2)

    def title(x: int, y: int, words: str, more: str) -> None:
        paint.text((x, y), words, font=font(24), fill=INK)
        paint.text((x, y + 32), more, font=font(18), fill=MUTED)

    title(40, 24, f"An image of {image.width} x {image.height}", "shown at half its size")
    card.paste(image.resize((500, 280), Image.Resampling.LANCZOS), (40, 92))
    title(40, 400, "without tiling", f"one input of {TILE} x {TILE}: {TOKENS**2} tokens")
    card.paste(image.resize((TILE, TILE), Image.Resampling.BICUBIC), (40, 468))

    title(600, 24, "type: tiles", f"{tiles.num_image_tokens(size, TOKENS**2):,} tokens, and a marker before each tile")
    for tile, (row, column) in zip(tiles.split(image), tiles.places(size), strict=True):
        x, y = (column - 1, row - 1) if row else (columns, 0)  # the thumbnail stands last
        x, y = 600 + x * (TILE + 12), 92 + y * (TILE + 38)
        card.paste(to_pil_image(tile), (x, y))
        name = marker(row, column) if row else GLOBAL_TOKEN
        paint.text((x, y + TILE + 5), name, font=font(17), fill=KEPT)

    title(40, 730, "type: anyres", f"{anyres.num_image_tokens(size, TOKENS**2):,} tokens, those of the thumbnail first")
    thumbnail, *cut = map(to_pil_image, anyres.split(image))
    card.paste(thumbnail, (40, 798))
    whole = Image.new("RGB", (columns * TILE, rows * TILE))
    for number, tile in enumerate(cut):
        whole.paste(tile, (number % columns * TILE, number // columns * TILE))
    left, top, step = 300, 798, 12
    across, down = columns * TOKENS * step, rows * TOKENS * step
    card.paste(whole.resize((across, down), Image.Resampling.LANCZOS), (left, top))
    for column in range(1, columns):
        paint.line([(left + column * TOKENS * step, top + y) for y in (0, down)], fill="white", width=2)
    for row in range(1, rows):
        paint.line([(left + x, top + row * TOKENS * step) for x in (0, across)], fill="white", width=2)
    above, _, height, _ = anyres.unpadded(size)
    paint.rectangle((left, top + above * step, left + across, top + (above + height) * step), outline=KEPT, width=4)
    for row in range(above, above + height):
        y = top + row * step
        paint.rectangle((left + across + 6, y + 2, left + across + 16, y + step - 2), fill=NEWLINE)
    x, y = left + across + 50, top + 60
    paint.rectangle((x, y + 2, x + 20, y + 20), outline=KEPT, width=4)
    words = f"kept of the tiles' tokens: {height} rows of {rows * TOKENS}; the others are padding"
    paint.text((x + 32, y), words, font=font(18), fill=INK)
    paint.rectangle((x + 5, y + 36, x + 15, y + 46), fill=NEWLINE)
    paint.text((x + 32, y + 30), "image_newline: one learned token at the end of each row", font=font(18), fill=INK)
    return card


if __name__ == "__main__":
    draw().quantize(128, dither=Image.Dither.NONE).save(Path(__file__).with_name("tiling.png"), optimize=True)
