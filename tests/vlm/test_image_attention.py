"""Image tokens that see each other, wherever a row is read: at once, in trees, from a cache, with a shared beginning.

`tests/vlm/test_interop.py` has them against Gemma 3 of transformers.
"""

import pytest
import torch

from tests.data.test_trees import assert_close
from tests.tiny import continuation, encode, image, logits, tiny, user
from tests.training.test_exactness import RATES, one_at_a_time, trained_loss
from tests.vlm.test_generate_text import request
from tests.vlm.test_session import Reads, assistant, both, unending
from tests.vlm.test_session import user as asked
from vlm import generation
from vlm.configuration import VLMConfig
from vlm.session import Session

DECODERS = ["llama", "qwen2", "gpt2", "gemma3"]


def seeing(decoder="llama", **options):
    return unending(*tiny(decoder, image_attention="bidirectional", **options))


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


@pytest.mark.parametrize("decoder", DECODERS)
def test_trees_are_one_conversation_at_a_time(tmp_path, decoder):
    model, processor = seeing(decoder)
    assert_close(trained_loss(tmp_path, model, processor, RATES), one_at_a_time(model, processor))


@pytest.mark.parametrize("decoder", DECODERS)
def test_padding_caches_and_static_caches_change_nothing(decoder):
    model, processor = seeing(decoder)
    rows = [(image(0), "a cat"), ("what", image(1), "and", image(2), "?")]
    inputs = encode(processor, [[user(*parts)] for parts in rows])
    together = continuation(model, inputs)
    assert together == continuation(model, inputs, use_cache=False)
    assert together == continuation(model, inputs, cache_implementation="static", disable_compile=True)
    assert together == [continuation(model, encode(processor, [[user(*parts)]]))[0] for parts in rows]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_conversation_and_questions_that_share_an_image(decoder):
    model, processor = seeing(decoder)
    session, reads = Session(model, processor), Reads(model)
    first = [image(0)], [asked("what is it", 1)]
    said, *_ = both(model, processor, session, first, reads)
    second = [image(0), image(1)], [*first[1], assistant(said), asked("and this, a dog ?", 1)]
    both(model, processor, session, second, reads)
    shared = image(0)
    requests = [request(question, shared) for question in ("what", "is it a cat ?", "where")]
    together = generation.generate(model, processor, requests, max_new_tokens=6)
    assert together == [generation.generate(model, processor, [r], max_new_tokens=6)[0] for r in requests]


def test_it_is_saved_and_mistakes_are_told(tmp_path):
    model, processor = seeing()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = generation.load(str(tmp_path), device="cpu")
    assert loaded.config.image_attention == again.image_attention == "bidirectional"
    with pytest.raises(ValueError, match="Did you mean 'bidirectional'"):
        VLMConfig(image_attention="bidirektional")
    model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash attention does not take"):
        model(**encode(processor, [[user(image(0), "what")]]))
