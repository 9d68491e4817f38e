"""Generation: with and without a cache, one by one and in batches, by beams; what is computed once."""

import pytest
import torch

from tests.tiny import DECODERS, FUSIONS, continuation, encode, image, text_config, tiny, user
from vlm.errors import UserError
from vlm.generation import generate, prompt_lengths
from vlm.positions import learned_positions, room
from vlm.processing import IMAGE_TOKEN
from vlm.session import Session

CONVERSATIONS = [
    [user(image(0), "what is it")],
    [user("a cat and", image(1), "a dog, then", image(2), "what is in the image ?")],
    [user("no image at all")],
]


def calls_of(model, suffix):
    counts = []
    for name, module in model.named_modules():
        if name.endswith(suffix):
            module.register_forward_hook(lambda *_: counts.append(1))
    return counts


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.few(10)
def test_with_a_cache_equals_without(decoder, fusion):
    model, processor = tiny(decoder, fusion)
    inputs = encode(processor, CONVERSATIONS)
    cached = continuation(model, inputs)
    assert cached == continuation(model, inputs, use_cache=False)
    options = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "output_logits": True}
    steps = [model.generate(**inputs, **options, return_dict_in_generate=True, use_cache=use) for use in (True, False)]
    for with_cache, without in zip(steps[0].logits, steps[1].logits, strict=True):
        assert torch.allclose(with_cache, without, atol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_prefix_and_mllamas_layers_at_once(decoder):
    """With a cache as without, in a batch with several images as alone."""
    model, processor = tiny(decoder, "prefix+cross_attention", cross_attention_layers=[0, 3])
    inputs = encode(processor, CONVERSATIONS)
    together = continuation(model, inputs)
    assert together == continuation(model, inputs, use_cache=False)
    assert together == [continuation(model, encode(processor, [one]))[0] for one in CONVERSATIONS]


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.few(10)
def test_a_left_padded_batch_equals_one_by_one(decoder, fusion):
    model, processor = tiny(decoder, fusion)
    together = continuation(model, encode(processor, CONVERSATIONS))
    alone = [continuation(model, encode(processor, [conversation]))[0] for conversation in CONVERSATIONS]
    assert together == alone
    assert len({tuple(row) for row in together}) > 1


@pytest.mark.parametrize("fusion", FUSIONS)
def test_generation_looks_at_the_image(fusion):
    model, processor = tiny(fusion=fusion)
    answers = {
        tuple(continuation(model, encode(processor, [[user(image(seed), "what is it")]]))[0]) for seed in range(4)
    }
    assert len(answers) > 1


@pytest.mark.parametrize("fusion", ["cross_attention_layers", "prefix+cross_attention"])
def test_images_are_encoded_and_projected_once_per_answer(fusion):
    model, processor = tiny(fusion=fusion)
    parts = (".cross_attention.k_proj", ".cross_attention.v_proj", "multi_modal_projector", "vision_tower")
    counts = [calls_of(model, part) for part in parts]
    queries = calls_of(model, ".cross_attention.q_proj")
    continuation(model, encode(processor, CONVERSATIONS), tokens=6)
    blocks = 2
    assert [len(count) for count in counts] == [blocks, blocks, 1, 1]
    assert len(queries) == 6 * blocks


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("decoder", ["llama", "gemma3"])
def test_a_static_cache_gives_the_same(decoder, fusion):
    model, processor = tiny(decoder, fusion)
    inputs = encode(processor, CONVERSATIONS[:2])
    static = continuation(model, inputs, cache_implementation="static", disable_compile=True)
    assert static == continuation(model, inputs)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_keep_images_with_their_row(fusion, options):
    model, processor = tiny(fusion=fusion)
    inputs = encode(processor, CONVERSATIONS)
    together = continuation(model, inputs, **options)
    each = options.get("num_return_sequences", 1)
    alone = [
        row
        for conversation in CONVERSATIONS
        for row in continuation(model, encode(processor, [conversation]), **options)
    ]
    assert together == alone
    assert len(together) == each * len(CONVERSATIONS)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_samples_of_a_row_see_the_rows_images(fusion):
    """With the lowest temperature samples are the greedy answer, each for its own images."""
    model, processor = tiny(fusion=fusion)
    inputs = encode(processor, CONVERSATIONS)
    options = {"do_sample": True, "temperature": 1e-6, "top_k": None, "num_return_sequences": 2}
    samples = continuation(model, inputs, **options)
    assert samples[0::2] == samples[1::2] == continuation(model, inputs)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_features_in_place_of_pixels_generate_the_same(fusion):
    model, processor = tiny(fusion=fusion)
    inputs = dict(encode(processor, CONVERSATIONS))
    expected = [continuation(model, inputs), continuation(model, inputs, num_beams=2)]
    with torch.no_grad():
        features, grid = model.get_vision_features(inputs.pop("pixel_values"))
    inputs |= {"vision_features": features, "vision_grid": grid}
    assert [continuation(model, inputs), continuation(model, inputs, num_beams=2)] == expected


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_conversation_goes_on_from_its_cache(fusion):
    """The images are in the cache, or in `vision_states`; only new ids are given."""
    model, processor = tiny(fusion=fusion)
    inputs = encode(processor, CONVERSATIONS[:1])
    more = torch.tensor([[7, 9, 11]])
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        after = model(
            input_ids=more,
            attention_mask=torch.ones(1, inputs["input_ids"].shape[1] + 3),
            cache=first.cache,
            vision_states=first.vision_states,
        ).logits
        whole = model(input_ids=torch.cat([inputs["input_ids"], more], 1), pixel_values=inputs["pixel_values"]).logits
    assert torch.allclose(after, whole[:, -3:], atol=1e-4)


def test_the_image_token_is_never_written():
    model, processor = tiny()
    with torch.no_grad():  # the language model would say nothing else
        model.get_output_embeddings().weight[model.config.image_token_id] *= 100
    inputs = encode(processor, CONVERSATIONS)
    assert all(model.config.image_token_id not in row for row in continuation(model, inputs))
    assert model.generation_config.suppress_tokens == [processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)]


def test_gemma_really_slides():
    assert text_config("gemma3").sliding_window < 16 < encode(tiny()[1], CONVERSATIONS[:1])["input_ids"].shape[1]


@pytest.mark.parametrize("decoder", ["gpt2", "llama"])
def test_a_prompt_that_is_longer_than_the_model_has_positions(decoder):
    """GPT-2 has learned positions, which end; llama's rotary ones do not."""
    model, processor = tiny(decoder)
    places = model.config.get_text_config().max_position_embeddings
    too_long = ([], [{"role": "user", "content": [{"type": "text", "text": "a" * (places + 5)}]}])
    nearly = ([], [{"role": "user", "content": [{"type": "text", "text": "a" * 20}]}])
    if decoder == "llama":
        assert learned_positions(model) is None
        assert room(None, places, 7) == 7
        return
    with pytest.raises(UserError, match=rf"the model has {places:,} positions; ask something shorter"):
        generate(model, processor, [too_long], max_new_tokens=2)
    length = prompt_lengths(model, processor, [nearly])[0]
    assert learned_positions(model) == places
    assert room(places, length, 10**6) == places - length
    assert room(places, places - 1, 8) == 1


def test_beyond_positions_that_do_not_end_there_is_a_warning_once(caplog):
    model, processor = tiny("llama", text=text_config("llama", max_position_embeddings=40))
    short, long = (([], [{"role": "user", "content": [{"type": "text", "text": "a" * n}]}]) for n in (2, 200))
    (length,) = prompt_lengths(model, processor, [long])
    assert prompt_lengths(model, processor, [short])[0] < 40 < length
    generate(model, processor, [short], max_new_tokens=2)
    assert not caplog.messages
    generate(model, processor, [short, long], max_new_tokens=2)
    [*Session(model, processor).stream(long, max_new_tokens=2)]
    (said,) = caplog.messages
    assert f"the prompt has {length} tokens" in said
    assert "the model has 40 positions (max_position_embeddings)" in said
    caplog.clear()
    again, _ = tiny("llama", text=text_config("llama", max_position_embeddings=40))
    [*Session(again, processor).stream(long, max_new_tokens=2)]
    assert len(caplog.messages) == 1, "another model"


def test_a_prompt_near_the_last_position_does_not_cut_other_answers():
    model, processor = tiny("gpt2")
    places = model.config.get_text_config().max_position_embeddings
    short = ([], [{"role": "user", "content": [{"type": "text", "text": "a"}]}])
    nearly = next(
        ([], [{"role": "user", "content": [{"type": "text", "text": "a" * count}]}])
        for count in range(places, 0, -1)
        if prompt_lengths(model, processor, [([], [{"role": "user", "content": "a" * count}])])[0] < places
    )
    options = {"max_new_tokens": 6, "min_new_tokens": 1}
    alone = [generate(model, processor, [request], **options)[0] for request in (short, nearly)]
    assert generate(model, processor, [short, nearly], **options) == alone


@pytest.mark.parametrize("assistant", ["itself", "another"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_with_an_assistant_the_tokens_are_those_of_greedy_decoding(fusion, assistant):
    """Drafts that are refused are dropped from both caches."""
    model, processor = tiny(fusion=fusion)
    helper = model if assistant == "itself" else tiny(fusion=fusion, seed=1)[0]
    inputs = encode(processor, CONVERSATIONS[:1])
    assert continuation(model, inputs, assistant_model=helper) == continuation(model, inputs)
