"""A cache that goes on without its images: what it has read of them follows whatever is done to it. Each case against
reading everything anew."""

import copy

import pytest
import torch

from tests.tiny import ALL_FUSIONS, encode, image, tiny, user
from vlm.vision_cache import kept_vision

LOOKING = [fusion for fusion in ALL_FUSIONS if fusion != "prefix"]
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module", params=LOOKING)
def made(request):
    model, processor = tiny(fusion=request.param)
    return model.requires_grad_(False), processor


def conversations(processor):
    """Two rows: an image, words, another image, and more words; no padding."""
    rows = [[user("so", image(n), "a cat on the street", image(n + 1), "and a dog")] for n in (0, 4)]
    return encode(processor, rows)


def read(model, inputs, length=None, rows=slice(None)):
    """The first `length` tokens of some rows, with all images that stand among them."""
    ids = inputs["input_ids"][:, :length]
    images = int((ids[0] == model.config.image_token_id).sum()) // model.image_tokens([(0, 0)])[0]
    pixels = inputs["pixel_values"].unflatten(0, (2, 2))[rows, :images].flatten(0, 1)
    return model(input_ids=ids[rows], pixel_values=pixels if images else None, use_cache=True)


MORE = torch.tensor([[7, 9, 11]])


def after(model, cache):
    return model(input_ids=MORE.expand(len(cache.layers[0].keys), -1), cache=cache).logits


def anew(model, inputs, length=None, rows=slice(None)):
    ids = inputs["input_ids"][:, :length]
    longer = {**inputs, "input_ids": torch.cat([ids, MORE.expand(len(ids), -1)], dim=1)}
    return read(model, longer, rows=rows).logits[:, -3:]


def assert_same(found, wanted):
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("use", ["as it is", "deepcopy", "select", "reorder", "repeat"])
def test_it_follows_its_rows(made, use):
    model, processor = made
    inputs = conversations(processor)
    cache, rows = read(model, inputs).cache, [0, 1]
    if use == "deepcopy":
        original, cache = cache, copy.deepcopy(cache)
        original.reset()
    elif use == "select":
        rows = [1]
        cache.batch_select_indices(torch.tensor(rows))
    elif use == "reorder":
        rows = [1, 1]
        cache.reorder_cache(torch.tensor(rows))
    elif use == "repeat":
        rows = [0, 0, 1, 1]
        cache.batch_repeat_interleave(2)
    assert_same(after(model, cache), anew(model, inputs, rows=rows))
    twice = torch.cat([inputs["input_ids"], MORE.expand(2, -1)], dim=1)
    assert_same(after(model, cache), anew(model, {**inputs, "input_ids": twice}, rows=rows))


@pytest.mark.parametrize("left", ["all", "one image", "no image"])
def test_tokens_that_are_dropped_take_their_image_along(made, left):
    model, processor = made
    inputs = conversations(processor)
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    after_first = int(places[len(places) // 2 - 1]) + 3
    length = {"all": inputs["input_ids"].shape[1], "one image": after_first, "no image": int(places[0])}[left]
    cache = read(model, inputs).cache
    cache.crop(length - cache.get_seq_length())
    assert_same(after(model, cache), anew(model, inputs, length))
    assert (kept_vision(cache) is None) == (left == "no image")


def test_an_image_comes_after_others_were_dropped(made):
    model, processor = made
    inputs = conversations(processor)
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    length = int(places[len(places) // 2 - 1]) + 3
    cache = read(model, inputs).cache
    cache.crop(length - cache.get_seq_length())
    tokens = torch.full((2, model.image_tokens([(0, 0)])[0]), model.config.image_token_id)
    ids = torch.cat([tokens, MORE.expand(2, -1)], dim=1)
    pixels = inputs["pixel_values"].unflatten(0, (2, 2))[:, 1].flip(0)
    found = model(input_ids=ids, pixel_values=pixels, cache=cache).logits[:, -3:]
    both = torch.stack([inputs["pixel_values"].unflatten(0, (2, 2))[:, 0], pixels], dim=1).flatten(0, 1)
    whole = torch.cat([inputs["input_ids"][:, :length], ids], dim=1)
    assert_same(found, model(input_ids=whole, pixel_values=both).logits[:, -3:])


def test_a_follow_up_question_is_answered_as_anew(made):
    """Without the image, from the cache that `generate` gives."""
    model, processor = made
    inputs = encode(processor, [[user(image(0), "what is it?")], [user(image(3), "what is the cat?")]])
    first = model.generate(**inputs, **OPTIONS, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[5, 6, 7]] * 2)], dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more.shape[1] - inputs["input_ids"].shape[1]), value=1)
    wanted = model.generate(input_ids=more, attention_mask=mask, pixel_values=inputs["pixel_values"], **OPTIONS)
    found = model.generate(input_ids=more, attention_mask=mask, cache=first.cache, **OPTIONS)
    assert found.tolist() == wanted.tolist()


def test_beams_of_a_prompt_share_their_images(made):
    """Nothing is copied where each row gets one that sees the same; rows of other prompts are."""
    model, processor = made
    inputs = conversations(processor)
    cache = read(model, inputs).cache
    cache.batch_repeat_interleave(2)
    before = kept_vision(cache)
    cache.reorder_cache(torch.tensor([1, 0, 2, 2]))
    assert kept_vision(cache) is before
    assert_same(after(model, copy.deepcopy(cache)), anew(model, inputs)[[0, 0, 1, 1]])
    cache.reorder_cache(torch.tensor([0, 2, 3, 1]))
    assert_same(after(model, cache), anew(model, inputs)[[0, 1, 1, 0]])
