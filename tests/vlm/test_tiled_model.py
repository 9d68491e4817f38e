"""A model with tiling, from images to answers: in batches, cached, in beams, in a conversation, saved and loaded."""

import pytest
import torch
from torch.nn.functional import interpolate
from transformers import BitImageProcessor, ConvNextImageProcessor, SiglipImageProcessor

from tests.tiny import (
    byte_level_tokenizer,
    continuation,
    encode,
    image,
    image_processor,
    logits,
    metaspace_tokenizer,
    tiny,
    user,
)
from tests.vlm.test_session import Reads, assistant, both, unending
from tests.vlm.test_session import user as asked
from vlm import generation
from vlm.image_processors import image_size_of, keep_tiles_whole
from vlm.recipe_model import Tiling
from vlm.session import Session
from vlm.shared_prefix import SharedPrefixLayer

KINDS = [
    ("prefix", "tiles"),
    ("prefix", "anyres"),
    ("cross_attention", "tiles"),
    ("cross_attention_block", "tiles"),
    ("cross_attention_layers", "internvl"),
    ("prefix+cross_attention", "idefics3"),
    ("prefix+cross_attention", "anyres"),
]
SMALL, WIDE, LARGE, HIGH = image(0, (20, 30)), image(1, (70, 30)), image(2, (80, 64)), image(3, (30, 100))


def tiled(fusion="prefix", kind="tiles", **options):
    model, processor = tiny(fusion=fusion, tiling={"type": kind, "max_tiles": 4}, **options)
    for name, parameter in model.named_parameters():
        if "tile_positions" in name or "image_newline" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model, processor


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind))
def made(request):
    return tiled(*request.param)


CONVERSATIONS = [
    [user(SMALL, "what is it")],
    [user("no image at all")],
    [user(WIDE, "a cat", LARGE, "a dog", SMALL, "and ?")],
    # a few-shot prompt: images and answers in turns
    [user(HIGH, "what"), {"role": "assistant", "content": "a cat"}, user(LARGE, "what")],
]


def test_a_batch_equals_one_by_one(made):
    model, processor = made
    batch = encode(processor, CONVERSATIONS)
    together = continuation(model, batch)
    for row, conversation in enumerate(CONVERSATIONS):
        inputs = encode(processor, [conversation])
        scores = logits(model, **inputs)[0]
        same = logits(model, **batch)[row, -len(scores) :] if row == 3 else scores  # the longest has no padding
        assert torch.allclose(scores, same, atol=1e-4)
        assert continuation(model, inputs) == [together[row]]


def test_cached_equals_uncached(made):
    model, processor = made
    for conversation in CONVERSATIONS:
        inputs = encode(processor, [conversation])
        assert continuation(model, inputs) == continuation(model, inputs, use_cache=False)


def test_beams_and_samples_equal_one_by_one(made):
    model, processor = made
    batch = encode(processor, CONVERSATIONS)
    together = continuation(model, batch, num_beams=2)
    alone = [continuation(model, encode(processor, [c]), num_beams=2)[0] for c in CONVERSATIONS]
    assert together == alone


def test_every_tile_is_looked_at(made):
    """Change one tile's pixels: what comes after the image changes, what comes before does not."""
    model, processor = made
    inputs = encode(processor, [[user("before", LARGE, "after")]])
    before = logits(model, **inputs)
    first = (inputs["input_ids"][0] == processor.image_token_id).nonzero()[0]
    for tile in range(len(inputs["pixel_values"])):
        pixels = inputs["pixel_values"].clone()
        pixels[tile] += 1
        after = logits(model, **{**inputs, "pixel_values": pixels})
        assert (after - before)[0, -1].abs().max() > 1e-3, tile
        assert torch.equal(after[0, :first], before[0, :first])


def test_cross_attention_tells_tiles_apart():
    """Two tiles changed for one another are another image, only by their positions."""
    model, processor = tiled("cross_attention")
    inputs = encode(processor, [[user(LARGE, "what")]])
    swapped = inputs["pixel_values"][[1, 0, 2, 3, 4]]
    apart = logits(model, **{**inputs, "pixel_values": swapped}) - logits(model, **inputs)
    assert apart.abs().max() > 1e-3
    torch.nn.init.zeros_(model.model.tile_positions.row)
    torch.nn.init.zeros_(model.model.tile_positions.column)
    apart = logits(model, **{**inputs, "pixel_values": swapped}) - logits(model, **inputs)
    assert apart.abs().max() < 1e-4


def test_the_tokens_of_tiles_are_those_of_images():
    """With tiles, the visual tokens are those that a model without tiling makes of each tile."""
    model, processor = tiled()
    plain, _ = tiny()
    plain.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
    plain.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
    tiles = processor.tiler.split(LARGE)
    with torch.no_grad():
        pixels = processor.image_processor(tiles, return_tensors="pt")["pixel_values"]
        expected = plain.get_image_features(pixels).pooler_output
        [found] = model.get_image_features(**processor.prepare_images([LARGE])).pooler_output
    assert torch.allclose(found, torch.cat(expected), atol=1e-5)


def test_features_in_place_of_pixels(made):
    model, processor = made
    inputs = encode(processor, CONVERSATIONS)
    expected = logits(model, **inputs)
    with torch.no_grad():
        features, grid = model.get_vision_features(inputs.pop("pixel_values"))
    assert torch.equal(logits(model, **inputs, vision_features=features, vision_grid=grid), expected)


def test_saved_and_loaded(made, tmp_path):
    model, processor = made
    for part in made:
        part.save_pretrained(tmp_path)
    again = generation.load(str(tmp_path), device="cpu")
    assert again[1].tiler == again[0].tiler == processor.tiler == model.tiler
    inputs = encode(again[1], CONVERSATIONS)
    assert torch.equal(inputs["input_ids"], encode(processor, CONVERSATIONS)["input_ids"])
    assert torch.equal(logits(again[0], **inputs), logits(model, **inputs))


# --- ids without pixels, and what users write


def test_ids_without_pixels_are_those_with_them(made):
    _, processor = made
    parts = [{"type": "image"}, {"type": "text", "text": "a <image>"}, {"type": "image"}]

    def ids_for(*sizes):
        options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"pixels": False, "image_sizes": sizes}}
        return processor.apply_chat_template([{"role": "user", "content": parts}], **options)

    found = ids_for((30, 20), (64, 80))
    expected = encode(processor, [[user(SMALL, "a <image>", LARGE)]], sanitize_control_tokens=True)["input_ids"][0]
    assert found["input_ids"][0] == expected[: len(found["input_ids"][0])].tolist()
    assert found["image_sizes"].tolist() == [[30, 20], [64, 80]]
    with pytest.raises(ValueError, match="2 <image> placeholders, and the sizes of 1 images"):
        ids_for((30, 20))


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("text", ["<row_1_col_1>", "<global-img><image>", "<row_<row_1_col_2>1_col_1>"])
def test_what_users_write_is_no_marker(text, tokenizer):
    _, processor = tiled(tokenizer=tokenizer())
    markers = processor.tokenizer.convert_tokens_to_ids([*processor.tiler.markers(), "<image>"])
    rows = encode(processor, [[user(LARGE, words)] for words in ("what", text)])["input_ids"]
    plain, written = ([token for token in row.tolist() if token in markers] for row in rows)
    assert written == plain
    request = ([LARGE], [asked(text, 1)])
    ids = generation.tokenize(processor, [request])["input_ids"][0].tolist()
    assert [token for token in ids if token in markers] == plain


def test_markers_are_never_written():
    model, processor = tiled()
    markers = processor.tokenizer.convert_tokens_to_ids(list(processor.tiler.markers()))
    assert set(markers) <= set(model.generation_config.suppress_tokens)


def test_markers_begin_as_the_mean_of_their_words():
    """So that a frozen language model can tell one from another."""
    model, processor = tiled()
    weight, tokenizer = model.get_input_embeddings().weight, processor.tokenizer
    words = tokenizer("row 2 row 2 column 1")["input_ids"]
    marker = weight[tokenizer.convert_tokens_to_ids("<row_2_col_1>")]
    assert torch.allclose(marker, weight[words].mean(dim=0), atol=1e-6)
    ids = tokenizer.convert_tokens_to_ids(list(processor.tiler.markers()))
    apart = torch.cdist(weight[ids], weight[ids]) + torch.eye(len(ids))
    assert apart.min() > 1e-2


# --- many answers at once


def request(text, *pictures):
    return list(pictures), [asked(text, len(pictures))]


def test_many_questions_equal_one_by_one(made):
    model, processor = unending(*made)
    requests = [request(text, *p) for p in ((SMALL,), (LARGE,), (WIDE, HIGH), ()) for text in ("what is it", "who ?")]
    together = generation.generate(model, processor, requests, max_new_tokens=5)
    assert together == [generation.generate(model, processor, [r], max_new_tokens=5)[0] for r in requests]
    assert len(set(together)) > 2
    lengths = [generation.encode_requests(model, processor, [r])["input_ids"].shape[1] for r in requests]
    assert generation.prompt_lengths(model, processor, requests) == lengths


def test_questions_about_images_of_one_size_share_them(made, monkeypatch):
    model, processor = unending(*made)
    layers = []
    made_shared = SharedPrefixLayer.__init__
    monkeypatch.setattr(SharedPrefixLayer, "__init__", lambda self, *a: layers.append(a) or made_shared(self, *a))
    pictures = [image(n, (80, 64)) for n in range(3)]
    requests = [request(text, picture) for picture in pictures for text in ("what is it", "what", "what a cat")]
    rows = []
    hook = model.model.language_model.register_forward_hook(
        lambda m, a, kw, out: rows.append(kw["inputs_embeds"].shape[0]), with_kwargs=True
    )
    together = generation.generate(model, processor, requests, max_new_tokens=5)
    assert rows[0] == 3, "the images were not shared"
    assert len(layers) == 4, "each layer's keys and values of what is shared are kept once"
    assert together == [generation.generate(model, processor, [r], max_new_tokens=5)[0] for r in requests]
    rows.clear()
    other = [request(text, HIGH) for text in ("what is it", "what")]
    assert generation.generate(model, processor, requests[:2] + other, max_new_tokens=5)[:2] == together[:2]
    hook.remove()
    assert rows.count(1) == 2, "images of other sizes keep them from being shared"


# --- a conversation


def test_a_conversation_equals_reading_everything_again(made):
    model, processor = unending(*made)
    session, reads = Session(model, processor), Reads(model)
    first = [LARGE], [asked("what is it", 1)]
    said, _, _, images = both(model, processor, session, first, reads)
    assert images == 5
    second = [LARGE], [*first[1], assistant(said), asked("where is it ?")]
    said, read, whole, images = both(model, processor, session, second, reads)
    assert images == 0
    assert read < whole - 10, "the image was read again"
    third = [LARGE, WIDE, SMALL], [*second[1], assistant(said), asked("and these, dogs ?", 2)]
    said, read, whole, images = both(model, processor, session, third, reads)
    assert images == processor.num_tiles(WIDE) + processor.num_tiles(SMALL)
    assert read < whole - 10
    fourth = third[0], [*third[1], assistant(said), asked("what ?")]
    _, read, whole, images = both(model, processor, session, fourth, reads)
    assert images == 0
    other = [image(9, (80, 64))], first[1]  # of the same size, so that its ids are the same
    _, read, whole, images = both(model, processor, session, other, reads)
    assert images == 5


# --- what does not fit together


def test_tiles_and_sizes_that_do_not_match_are_refused(made):
    model, processor = made
    inputs = encode(processor, [[user(LARGE, "what")]])
    with pytest.raises(ValueError, match=r"1 images of these image_sizes have 5 tiles, and 2 came"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(ValueError, match="need image_sizes, which the processor gives"):
        model(**{**inputs, "image_sizes": None})


def test_a_row_that_cuts_an_image_is_refused():
    model, processor = tiled()
    inputs = encode(processor, [[user(SMALL, "a")], [user(WIDE, "a")]])
    ids = inputs["input_ids"].clone()
    places = (ids == processor.image_token_id).nonzero()
    row, column = places[0].tolist()
    ids[row, column] = 5
    ids[1, -1] = processor.image_token_id
    with pytest.raises(ValueError, match="row 0 of the inputs holds 15 image tokens, and an image takes 16"):
        model(**{**inputs, "input_ids": ids})


def test_what_anyres_cannot_go_with_is_refused():
    with pytest.raises(ValueError, match="which cross_attention does not see: choose type tiles"):
        tiled("cross_attention", "anyres")
    with pytest.raises(ValueError, match=r"this projector \(resampler\) lie on none"):
        tiled(kind="anyres", projector={"type": "resampler", "num_image_tokens": 16})
    with pytest.raises(ValueError, match="class tokens"):
        tiled(kind="anyres", vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="unknown tiling 'tilez'"):
        tiled(kind="tilez")
    with pytest.raises(ValueError, match=r"unknown option of tiling 'max_tile'\. Did you mean 'max_tiles'"):
        tiny(tiling={"type": "tiles", "max_tile": 4})


def test_without_a_number_of_tiles_it_is_that_of_a_recipe():
    model, processor = tiny(tiling={"type": "tiles"})
    assert model.tiler.max_tiles == processor.tiler.max_tiles == Tiling().max_tiles


@pytest.mark.parametrize("projector", ["pixel_shuffle", {"type": "average_pool", "num_image_tokens": 9}, "linear"])
@pytest.mark.parametrize("kind", ["tiles", "anyres"])
def test_projectors(projector, kind):
    model, processor = tiled(kind=kind, projector=projector)
    inputs = encode(processor, CONVERSATIONS)
    assert continuation(model, inputs)[2] == continuation(model, encode(processor, CONVERSATIONS[2:3]))[0]


# --- image processors: a tile passes whole


@pytest.mark.parametrize(
    "processor",
    [
        image_processor(),
        SiglipImageProcessor(size={"height": 32, "width": 32}),
        BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),  # as DINOv2's
        ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_a_tile_passes_whole(processor):
    """The pixels that come out are those that went in, one by one, but for their scale."""
    whole = keep_tiles_whole(processor)
    assert image_size_of(whole) == (32, 32)
    tile = image(0, (32, 32))
    given = torch.tensor(list(tile.getdata())).view(32, 32, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (whole.image_mean, whole.image_std))
    found = whole(tile, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(found, (given - mean) / std, atol=1e-5)


def test_an_image_processor_that_cuts_tiles_is_refused():
    class Cuts(SiglipImageProcessor):
        def _preprocess(self, images, *args, **kwargs):
            images = [interpolate(image[None, :, 2:-2, 2:-2], (32, 32))[0] for image in images]
            return super()._preprocess(images, *args, **kwargs)

    with pytest.raises(ValueError, match="so that tiles would lose their edges"):
        keep_tiles_whole(Cuts(size={"height": 32, "width": 32}))
