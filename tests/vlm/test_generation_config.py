"""Generation configs as models come with them: answers of batches and conversations are those of plain `generate`."""

import copy
from importlib.util import find_spec

import pytest
import torch
from transformers import GenerationConfig

from tests.tiny import image, tiny
from vlm.errors import UserError
from vlm.generation import encode_requests, generate
from vlm.generation_config import REFUSED, make_savable
from vlm.session import Session

PICTURE = image(1)


def user(text):
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


QUESTIONS = ["what", "is it a dog or a cat ?", "where is the cat ?"]
REQUESTS = [*(([PICTURE], [user(text)]) for text in QUESTIONS), ([image(2)], [user(QUESTIONS[0])])]
HONOURED = {
    "cache_implementation": "static",
    "use_cache": False,
    "num_beams": 2,
    "max_length": 4,
    "min_new_tokens": 8,
    "repetition_penalty": 2.0,
    "no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 3.0,
    "min_length": 40,
    "stop_strings": ["a", "e"],
    "suppress_tokens": [*range(40, 120)],
    "sequence_bias": [[[33], 5.0]],
    "bad_words_ids": [[263], [142, 186]],
    "exponential_decay_length_penalty": (2, 1.5),
    "forced_eos_token_id": 5,
    "do_sample": True,
    "temperature": 0.2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "prompt_lookup_num_tokens": 3,
    "prefill_chunk_size": 2,
    "early_stopping": True,
    "max_cache_len": 512,
}


CHANGES_ANSWERS = {
    "num_beams", "repetition_penalty", "no_repeat_ngram_size", "encoder_repetition_penalty", "stop_strings",
    "suppress_tokens", "sequence_bias", "bad_words_ids", "exponential_decay_length_penalty", "forced_eos_token_id",
}  # fmt: skip
"""The others say how an answer is computed, or are overruled by the arguments of a call."""


@pytest.fixture(scope="module")
def made():
    model, processor = tiny()
    model.generation_config.eos_token_id = [319]  # no token of the tokenizer: a random model does not end there
    return model, processor


@pytest.fixture
def model(made):
    model, _ = made
    before = model.generation_config
    model.generation_config = GenerationConfig.from_dict(before.to_dict())
    yield model
    model.generation_config = before


def plain(model, processor, request):
    """The answer of `generate` to one request, by itself."""
    inputs = encode_requests(model, processor, [request])
    # Two that transformers does not have for images: by definition they are as fast as can be, with the same answer.
    for name in ("prompt_lookup_num_tokens", "prefill_chunk_size"):
        setattr(model.generation_config, name, None)
    tokenizer = processor.tokenizer if model.generation_config.stop_strings else None
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8, tokenizer=tokenizer)
    ids = output if isinstance(output, torch.Tensor) else output.sequences
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.few(2)
@pytest.mark.parametrize("key", HONOURED)
def test_a_batch_has_the_answers_of_single_requests(made, model, key):
    _, processor = made
    setattr(model.generation_config, key, HONOURED[key])
    found = generate(model, processor, REQUESTS, max_new_tokens=8)
    streamed = None
    if key != "num_beams":
        session = Session(model, processor)
        streamed = ["".join(session.stream(request, max_new_tokens=8)).strip() for request in REQUESTS]
    assert getattr(model.generation_config, key) == HONOURED[key], "the model keeps its settings"
    wanted = [plain(model, processor, request) for request in REQUESTS]
    assert found == wanted
    assert streamed in (None, wanted)
    setattr(model.generation_config, key, getattr(GenerationConfig(), key, None))
    without = [plain(model, processor, request) for request in REQUESTS]
    assert (wanted != without) == (key in CHANGES_ANSWERS), "else nothing would be seen of a setting that is dropped"


LOOKS_BACK = {
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 0.2,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "min_length": None,  # three tokens after the shortest prompt
}


@pytest.mark.parametrize("key", LOOKS_BACK)
def test_padding_is_no_part_of_a_prompt_that_a_setting_looks_back_at(model, key, monkeypatch):
    """The prompts differ in length, and padding would count: it is the token that the shortest one's answer begins
    with. With it `min_length` would be reached before the answer begins."""
    processor = copy.deepcopy(tiny()[1])
    inputs = encode_requests(model, processor, REQUESTS[:1])
    (first,) = model.generate(**inputs, do_sample=False, max_new_tokens=1)[:, -1].tolist()
    value = LOOKS_BACK[key] or inputs["input_ids"].shape[1] + 3
    if key == "min_length":
        model.generation_config.eos_token_id = [first]
    else:
        processor.tokenizer.pad_token = processor.tokenizer.convert_ids_to_tokens(first)
        model.generation_config.pad_token_id = first
    setattr(model.generation_config, key, value)
    wanted = [plain(model, processor, request) for request in REQUESTS]
    assert generate(model, processor, REQUESTS, max_new_tokens=8) == wanted
    monkeypatch.setattr("vlm.generation.reads_the_prompt", lambda *given: False)
    assert generate(model, processor, REQUESTS, max_new_tokens=8)[0] != wanted[0], "padding would have one too"


def test_the_static_cache_is_honoured_as_an_option(made, model):
    _, processor = made
    wanted = generate(model, processor, REQUESTS, max_new_tokens=8)
    assert generate(model, processor, REQUESTS, max_new_tokens=8, cache_implementation="static") == wanted


VALUES = {"num_return_sequences": 2, "guidance_scale": 1.5, "token_healing": True, "penalty_alpha": 0.6}


@pytest.mark.parametrize("key", [*REFUSED, "cache_implementation"])
def test_what_cannot_be_honoured_is_named(made, model, key):
    _, processor = made
    value = "paged" if key == "cache_implementation" else VALUES.get(key, 2)
    with pytest.raises(UserError, match=f"{key}: .* not supported here"):
        generate(model, processor, REQUESTS[:1], **{key: value})
    setattr(model.generation_config, key, value)
    with pytest.raises(UserError, match=f"{key}: .* not supported here"):
        generate(model, processor, REQUESTS[:1])
    if key != "streamer":
        with pytest.raises(UserError, match=f"{key}: .* not supported here"):
            [*Session(model, processor).stream(REQUESTS[0])]


def test_an_answer_ends_at_a_stop_string(made, model):
    """For which `generate` gives the tokenizer to `forward`."""
    _, processor = made
    whole = generate(model, processor, REQUESTS[:1], max_new_tokens=8)[0]
    model.generation_config.stop_strings = [whole[1:3]]
    assert generate(model, processor, REQUESTS[:1], max_new_tokens=8) == [whole[:3]]
    assert "".join(Session(model, processor).stream(REQUESTS[0], max_new_tokens=8)).strip() == whole[:3]


def test_beams_are_refused_where_answers_are_streamed(made, model):
    _, processor = made
    model.generation_config.num_beams = 3
    with pytest.raises(UserError, match="num_beams: 3 is not supported here, since an answer that is shown"):
        [*Session(model, processor).stream(REQUESTS[0])]


@pytest.mark.skipif(find_spec("optimum") is not None, reason="the package is there")
def test_a_cache_whose_package_is_missing_is_named(made, model):
    _, processor = made
    model.generation_config.cache_implementation = "quantized"
    with pytest.raises(UserError, match="cache_implementation: 'quantized' cannot be used"):
        generate(model, processor, REQUESTS[:1], max_new_tokens=2)


# --- saving


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.9, "top_p": 0.6},
        {"top_k": 3, "min_p": 0.1, "typical_p": 0.5, "eta_cutoff": 0.1, "epsilon_cutoff": 0.1},
        {"length_penalty": 2.0, "early_stopping": True},
        {"output_scores": True},
        {"pad_token_id": -1},
        {"use_cache": False, "cache_implementation": "static"},
    ],
)
def test_what_transformers_refuses_to_save_is_removed(model, settings, tmp_path):
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match="Fix these issues"):
        model.generation_config.save_pretrained(tmp_path)
    said = make_savable(model)
    assert all(name in said or name == "use_cache" for name in settings)
    model.generation_config.save_pretrained(tmp_path)
    assert make_savable(model) is None
    again = GenerationConfig.from_pretrained(tmp_path)
    assert all(getattr(again, name) is None for name in settings if name != "use_cache")


def test_what_cannot_be_repaired_is_refused(model):
    model.generation_config.num_return_sequences = 2
    with pytest.raises(UserError, match=r"generation_config.json\) cannot be saved: Greedy methods"):
        make_savable(model)
