"""Tokens that see ahead, wherever a row is read: at once, in trees, from a cache, with a shared beginning. Of an image
(Gemma 3), or of image and prompt (PaliGemma); `tests/vlm/test_interop.py` has them against those of transformers.
"""

import pytest
import torch

from tests.data.test_tree_masks import examples, in_trees, one_conversation_at_a_time
from tests.data.test_trees import assert_close
from tests.tiny import continuation, encode, image, logits, tiny, user
from tests.training.test_exactness import RATES, one_at_a_time, trained_loss
from tests.training.test_stock_families import plain_loss
from tests.vlm.test_generate_text import request
from tests.vlm.test_session import Reads, assistant, both, unending
from tests.vlm.test_session import user as asked
from vlm import generation
from vlm.configuration import VLMConfig
from vlm.session import Session

DECODERS = ["llama", "qwen2", "gpt2", "gemma3"]
WAYS = ["bidirectional", "prefix_lm"]
CASES = [(decoder, way) for way in WAYS for decoder in DECODERS]


def seeing(decoder="llama", way="bidirectional", **options):
    return unending(*tiny(decoder, image_attention=way, **options))


@pytest.mark.parametrize("way", ["causal", "bidirectional"])
def test_who_sees_the_last_patch_of_an_image(way):
    model, processor = tiny(image_attention=way)
    inputs = encode(processor, [[user("what", image(0), "is it")]])
    with torch.no_grad():
        features, grid = model.get_vision_features(inputs.pop("pixel_values"))
    other = features.clone()
    other[:, -1] += 1
    before, after = (logits(model, **inputs, vision_features=f, vision_grid=grid)[0] for f in (features, other))
    changed = (before != after).any(dim=-1)
    at = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    assert not changed[: at[0]].any()
    assert changed[at[0] : at[-1]].all() if way == "bidirectional" else not changed[at[0] : at[-1]].any()
    assert changed[at[-1] :].all()


def test_who_sees_a_prompt_and_an_answer():
    """Of what is predicted, before a word of the first question, of its answer and of the next question is changed."""
    model, processor = seeing(way="prefix_lm")
    turns = [user(image(0), "what"), assistant("a cat"), asked("where"), assistant("on the street")]
    inputs = encode(processor, [turns])
    prompt = encode(processor, [turns[:1]])["input_ids"].shape[1]
    types, ids = inputs["token_type_ids"][0], inputs["input_ids"][0]
    assert types.tolist() == [0] * prompt + [1] * (len(ids) - prompt)
    before = logits(model, **inputs)[0]
    for place in (prompt - 1, prompt, prompt + 1, len(ids) - 2):
        other = ids.clone()
        other[place] = ids[place] - 1
        changed = (logits(model, **{**inputs, "input_ids": other[None]})[0] != before).any(dim=-1)
        first = 0 if place < prompt else place
        assert not changed[:first].any()
        assert changed[first:].all()


def test_where_answers_begin_is_known_of_every_row():
    """Padded on either side, as lists, with images cut into tiles, and whatever is in an answer."""
    for tiling in (None, {"type": "tiles", "max_tiles": 4}):
        _, processor = seeing(way="prefix_lm", projector="pixel_shuffle", tiling=tiling)
        ask, wide = user(image(0, (60, 36)), "what <image> is it"), user(image(1, (90, 30)), "and", image(2), "?")
        rows = [
            [ask],
            [ask, assistant("a cat"), wide, assistant("no")],
            [asked("none ?"), assistant("a <image>")],
            [wide],
        ]
        for side in ("left", "right"):
            processor.tokenizer.padding_side = side
            together = processor.apply_chat_template(
                rows, tokenize=True, return_dict=True, processor_kwargs={"return_tensors": "pt", "padding": True}
            )
            for row, messages in enumerate(rows):
                alone = processor.apply_chat_template([messages], tokenize=True, return_dict=True)
                real = together["attention_mask"][row].bool()
                assert together["token_type_ids"][row][real].tolist() == alone["token_type_ids"][0]
                prompt = processor.apply_chat_template(
                    [messages[:1]], tokenize=True, return_dict=True, add_generation_prompt=True
                )["input_ids"][0]
                assert alone["token_type_ids"][0].count(0) == min(len(prompt), len(alone["input_ids"][0]))


def test_what_says_no_types_is_refused():
    model, processor = seeing(way="prefix_lm")
    inputs = encode(processor, [[user(image(0), "what")]])
    del inputs["token_type_ids"]
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        with pytest.raises(ValueError, match=r"prefix_lm needs token_type_ids, 0 in the prompt"):
            continuation(model, inputs, **options)


@pytest.mark.parametrize(("decoder", "way"), CASES)
def test_trees_are_one_conversation_at_a_time(decoder, way):
    model, processor = seeing(decoder, way)
    wanted = one_conversation_at_a_time(model, processor, examples())
    assert_close(in_trees(model, processor, examples())[0], wanted)


def test_trees_are_what_is_trained(tmp_path):
    model, processor = seeing("gemma3")
    assert_close(trained_loss(tmp_path, model, processor, RATES), one_at_a_time(model, processor))


def test_a_row_an_answer_and_trees_have_the_same_loss_with_prefix_lm(tmp_path):
    model, processor = seeing(way="prefix_lm")
    assert_close(trained_loss(tmp_path, model, processor, RATES), plain_loss(model, processor, examples()))


@pytest.mark.parametrize(("decoder", "way"), CASES)
def test_padding_caches_and_static_caches_change_nothing(decoder, way):
    model, processor = seeing(decoder, way)
    rows = [(image(0), "a cat"), ("what", image(1), "and", image(2), "?"), ("no image",)]
    inputs = encode(processor, [[user(*parts)] for parts in rows])
    together = continuation(model, inputs)
    assert together == continuation(model, inputs, use_cache=False)
    assert together == continuation(model, inputs, cache_implementation="static", disable_compile=True)
    assert together == [continuation(model, encode(processor, [[user(*parts)]]))[0] for parts in rows]


@pytest.mark.parametrize(("decoder", "way"), CASES)
def test_a_conversation_and_questions_that_share_an_image(decoder, way):
    model, processor = seeing(decoder, way)
    session, reads = Session(model, processor), Reads(model)
    cat = image(0)
    first = [cat], [asked("what is it", 1)]
    said, *_ = both(model, processor, session, first, reads)
    second = [cat, image(1)], [*first[1], assistant(said), asked("and this, a dog ?", 1)]
    _, read, whole, _ = both(model, processor, session, second, reads)
    assert decoder == "gemma3" or read < whole - 16, "what was read is read again"
    other = [cat], [asked("what is in the image ?", 1)]  # which an image that saw another question knows nothing of
    both(model, processor, session, other, reads)
    shared = image(0)
    requests = [request(question, shared) for question in ("what", "is it a cat ?", "where")]
    together = generation.generate(model, processor, requests, max_new_tokens=6)
    assert together == [generation.generate(model, processor, [r], max_new_tokens=6)[0] for r in requests]


@pytest.mark.parametrize("way", WAYS)
def test_it_is_saved_and_mistakes_are_told(tmp_path, way):
    model, processor = seeing(way=way)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = generation.load(str(tmp_path), device="cpu")
    assert loaded.config.image_attention == again.image_attention == way
    with pytest.raises(ValueError, match="Did you mean 'bidirectional'"):
        VLMConfig(image_attention="bidirektional")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash attention does not take"):
        model(**encode(processor, [[user(image(0), "what")]]))
