"""How images are cut, and into how many tokens: against the processors and models of transformers that do the same."""

import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPImageProcessor,
    Idefics3ImageProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)
from transformers.models.idefics3.image_processing_idefics3 import get_resize_output_image_size

from tests.stock import decoder, stock, tokenizer_with
from tests.tiny import clip_config, image
from vlm.adapters import AnyresMerger, TilePositions
from vlm.recipe_model import Tiling
from vlm.tiling import FAKE_TOKEN, TILINGS, Tiler, tiler_of

SIDES = st.integers(1, 3000)
ANYRES = Tiler("anyres", 6, (32, 32), (4, 4))
TILES = Tiler("tiles", 6, (32, 32))


def pinpoints(tiler):
    """The grids of several tiles as LLaVA-NeXT's configuration has them."""
    return [[rows * 32, columns * 32] for rows, columns in tiler.all_grids()]


# --- the grid


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [
        (32, 32, (1, 1)),
        (20, 30, (1, 1)),  # smaller than a tile: cutting would show nothing more
        (32, 64, (1, 2)),
        (64, 64, (2, 2)),
        (480, 640, (2, 3)),
        (640, 480, (3, 2)),
        (100, 1000, (1, 6)),
        (1, 3000, (1, 1)),  # scaled to any grid it would be less than a pixel high
    ],
)
def test_grids_by_hand(height, width, grid):
    assert TILES.grid((height, width)) == grid


@given(SIDES, SIDES, st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_an_image_keeps_to_its_budget_and_its_direction(height, width, max_tiles):
    rows, columns = Tiler("tiles", max_tiles, (32, 32)).grid((height, width))
    assert rows * columns <= max_tiles
    if rows != columns:
        assert (rows > columns) == (height > width)


@given(SIDES, SIDES)
@settings(max_examples=60, deadline=None)
def test_turned_images_have_turned_grids(height, width):
    """Unless two grids are equally good."""
    rows, columns = TILES.grid((height, width))
    turned = TILES.grid((width, height))
    assert turned in ((columns, rows), (rows, columns))


# --- idefics3 and internvl, against their processors


def tiled_processor(kind, resample):
    """A stock processor of images of at most nine tiles, and the tiler of ours that does the same."""
    _, processor = stock(kind)
    processor.image_processor.resample = resample
    if kind == "idefics3":
        processor.image_processor.size = {"longest_edge": 96}
    else:
        processor.image_processor.max_patches = 9
    return processor, Tiler(kind, 9, (32, 32))


ODD_SIZES = [(64, 96), (96, 96), (20, 30), (33, 200), (500, 480), (1, 300), (301, 7), (65, 63)]


@pytest.mark.parametrize("resample", [2, 3, 1])  # bilinear, bicubic, Lanczos
@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("kind", ["idefics3", "internvl"])
def test_tiles_are_those_of_the_stock_processor(kind, size, resample):
    processor, tiler = tiled_processor(kind, resample)
    picture = image(1, (size[1], size[0]))
    theirs = processor(text=processor.image_token, images=[picture], return_tensors="pt")["pixel_values"]
    tiles = tiler.split(picture, resample)
    pixels = processor.image_processor
    ours = CLIPImageProcessor(do_resize=False, do_center_crop=False, image_mean=pixels.image_mean)
    ours.image_std = pixels.image_std
    assert len(tiles) == tiler.num_tiles(size)
    assert torch.equal(ours(tiles, return_tensors="pt")["pixel_values"], theirs.flatten(0, -4))


@given(SIDES, SIDES)
@example(1, 3000)
@example(3000, 1)
@settings(max_examples=60, deadline=None)
def test_the_grid_of_idefics3_is_its_processors(height, width):
    scaled = get_resize_output_image_size(torch.empty(3, height, width, device="meta"), 96)
    seen = []
    Idefics3ImageProcessor.resize_for_vision_encoder(
        SimpleNamespace(resize=lambda image, size, resample: seen.append(size)), torch.empty(3, *scaled), 32
    )
    grid = Tiler("idefics3", 9, (32, 32)).grid((height, width))
    assert grid == (seen[0].height // 32, seen[0].width // 32)


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("kind", ["idefics3", "internvl"])
def test_their_text_is_that_of_the_stock_processor(kind, size):
    processor, tiler = tiled_processor(kind, 3)
    inputs = processor(text=processor.image_token, images=[image(0, (size[1], size[0]))])
    theirs = processor.tokenizer.decode(inputs["input_ids"][0])
    around = ("<img>", "</img>") if kind == "internvl" else ("", "")  # image_markers
    assert around[0] + tiler.text(size, processor.image_token, 4) + around[1] == theirs
    assert tiler.num_image_tokens(size, 4) == theirs.count(processor.image_token)


@pytest.mark.parametrize("size", ODD_SIZES)
def test_tiles_have_the_markers_of_idefics3(size):
    """But for the tokens around them."""
    theirs = Tiler("idefics3", 9, (32, 32))
    tiles = Tiler("tiles", 9, (32, 32), grids=(theirs.grid(size),))
    assert tiles.text(size, "<image>", 4) == theirs.text(size, "<image>", 4).replace(FAKE_TOKEN, "")


def test_grids_are_chosen_from_those_named():
    tiler = tiler_of({"type": "anyres", "max_tiles": 4, "tile_size": [32, 32], "grids": [[1, 2], [2, 1], [2, 2]]})
    assert tiler.grid((20, 30)) == (1, 2), "there is none of one tile"
    assert tiler.grid((300, 30)) == (2, 1)
    with pytest.raises(ValueError, match="a grid of 2 x 3 does not have 1 to 4 tiles"):
        Tiler("tiles", 4, (32, 32), grids=((2, 3),))
    with pytest.raises(ValueError, match="leave grids out"):
        Tiler("internvl", 4, (32, 32), grids=((2, 2),))
    with pytest.raises(ValueError, match="are squares, and the encoder's input is 32 x 64"):
        Tiler("idefics3", 4, (32, 64))


def test_an_image_of_one_tile_is_its_thumbnail():
    assert TILES.text((20, 30), "<image>", 2) == "<global-img><image><image>"
    [thumbnail] = TILES.split(image(0, (30, 20)))
    assert thumbnail.shape == (3, 32, 32)
    assert TILES.num_image_tokens((20, 30), 16) == 16


@pytest.mark.parametrize("tiler", [TILES, Tiler("tiles", 4, (24, 40)), Tiler("idefics3", 9, (32, 32))])
def test_every_marker_of_a_text_is_among_the_markers(tiler):
    texts = [tiler.text((rows * 1000, columns * 1000), "", 1) for rows in range(1, 7) for columns in range(1, 7)]
    written = {part + ">" for text in texts for part in text.replace("\n", "").split(">") if part}
    assert written <= set(tiler.markers())
    assert len(tiler.markers()) == len(set(tiler.markers()))


@pytest.mark.parametrize("kind", ["tiles", "anyres"])
def test_tiles_that_are_not_square(kind):
    tiler = Tiler(kind, 6, (24, 40), (3, 5))
    tiles = tiler.split(image(0, (80, 72)))
    assert {tile.shape for tile in tiles} == {(3, 24, 40)}
    assert len(tiles) == tiler.num_tiles((72, 80)) == 7
    places = tiler.places((72, 80))
    assert len(places) == 7
    assert places[0 if kind == "anyres" else -1] == (0, 0)


# --- anyres, against LLaVA-NeXT


def llava_next():
    tokenizer = tokenizer_with("<image>")
    config = LlavaNextConfig(
        vision_config=clip_config(),
        text_config=decoder(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints(ANYRES),
    )
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints(ANYRES)
    )
    processor = LlavaNextProcessor(
        pictures,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=0,
    )
    return LlavaNextForConditionalGeneration(config).eval(), processor


MODEL, PROCESSOR = llava_next()


@pytest.mark.parametrize("size", [(64, 96), (100, 70), (33, 200), (500, 480), (64, 64)])
def test_anyres_tiles_are_those_of_llava_next(size):
    picture = image(2, (size[1], size[0]))
    theirs = PROCESSOR.image_processor(picture, return_tensors="pt")["pixel_values"][0]
    plain = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    ours = plain(ANYRES.split(picture), return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape
    assert torch.equal(ours, theirs)


@given(SIDES, SIDES)
@example(1, 3000)
@example(3000, 1)
@settings(max_examples=150, deadline=None)
def test_the_number_of_tokens_is_that_of_llava_next(height, width):
    if ANYRES.num_tiles((height, width)) == 1:
        return  # its processor has no such images
    assert ANYRES.num_image_tokens((height, width), 16) == PROCESSOR._get_number_of_features(height, width, 32, 32)


@given(SIDES, SIDES, st.integers(0, 100))
@example(1, 3000, 0)
@example(20, 30, 0)
@settings(max_examples=60, deadline=None)
def test_merged_tokens_are_those_of_llava_next_and_as_many_as_promised(height, width, seed):
    size = (height, width)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(ANYRES.num_tiles(size), 16, 8, generator=generator)
    merger = AnyresMerger(8)
    found = merger(tokens, ANYRES.grid(size), (4, 4), ANYRES.unpadded(size))
    newline = merger.image_newline
    [expected], _ = MODEL.model.pack_image_features([tokens], torch.tensor([size]), "default", newline)
    assert torch.equal(found, expected)
    assert len(found) == ANYRES.num_image_tokens(size, 16)


def test_what_is_kept_of_a_grid_is_the_image():
    """A white image on black padding: the tokens kept are those with white in them."""
    for size in [(64, 96), (100, 70), (33, 200), (300, 280)]:
        tiler = Tiler("anyres", 6, (32, 32), (32, 32))  # a token a pixel
        tiles = tiler.split(image(0, (size[1], size[0])).point(lambda value: 255))
        rows, columns = tiler.grid(size)
        pixels = torch.stack([tile[0].flatten() for tile in tiles])[..., None].float()
        merged = AnyresMerger(1)(pixels, (rows, columns), (32, 32), tiler.unpadded(size)).detach()
        _, _, height, width = tiler.unpadded(size)
        kept = merged[32 * 32 :].view(height, width + 1)[:, :-1]
        assert (kept == 255).float().mean() > 0.95, size
        total = sum(int((tile == 255).sum()) for tile in pixels[1:])
        assert math.isclose(int((kept == 255).sum()), total, rel_tol=0.05)


def test_tile_positions_are_added_to_every_token_of_a_tile():
    positions = TilePositions(2, 4)
    tokens = torch.randn(3, 5, 4)
    places = torch.tensor([[0, 0], [1, 2], [2, 1]])
    assert torch.equal(positions(tokens, places), tokens), "zero at first"
    torch.nn.init.normal_(positions.row)
    torch.nn.init.normal_(positions.column)
    moved = positions(tokens, places) - tokens
    assert torch.allclose(moved[1], (positions.row[1] + positions.column[2]).expand(5, 4), atol=1e-6)


def test_a_recipe_knows_every_type():
    assert get_args(Tiling.model_fields["type"].annotation) == TILINGS


def test_a_configuration_from_json_is_the_same_tiler():
    assert tiler_of({"type": "anyres", "max_tiles": 6, "tile_size": [32, 32], "token_grid": [4, 4]}) == ANYRES
    assert tiler_of(None) is None
    with pytest.raises(ValueError, match=r"unknown tiling 'tile'.*Did you mean 'tiles'"):
        tiler_of({"type": "tile"})
