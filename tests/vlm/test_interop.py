"""Stock models of transformers taken into ours compute what they did, and so does what is made of them again."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.counterparts import (
    COUNTERPARTS,
    IN_TILES,
    PROMPTED,
    asked,
    counterpart,
    fit,
    for_ours,
    own_blip2,
)
from tests.stock import stock
from tests.tiny import causal_lm, image, logits, text_config, tiny
from vlm.data.prompts import ONE_IMAGE
from vlm.fusion import FlamingoBlock
from vlm.interop import FAMILIES, family_of, from_stock, to_stock

BATCHES = {
    "one image": [(image(0), "what is it")],
    "two images": [(image(0), "and", image(1), "the dog")],
    "padded batch": [(image(0), "a cat"), (image(1), "what is in the image ?")],
}
TILED_BATCHES = {
    "one image": [(image(0, (70, 64)), "what is it")],
    "two images": [(image(0, (70, 30)), "and", image(1, (40, 100)), "the dog")],
    "padded batch": [(image(0, (70, 30)), "a cat"), (image(1, (64, 90)), "what is in the image ?")],
}

CALLED = {
    "llava": "LLaVA",
    "llava_next": "LLaVA-NeXT",
    "idefics": "Idefics",
    "idefics2": "Idefics2",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "internvl": "InternVL",
    "gemma3": "Gemma 3",
    "mllama": "Llama 3.2 Vision",
    "paligemma": "PaliGemma",
    "blip-2": "BLIP-2",
    "instructblip": "InstructBLIP",
}


@dataclass
class Pair:
    """A stock model and ours with its weights."""

    theirs: Any
    ours: Any
    processor: Any
    own_processor: Any = None
    """Ours, where images are cut into tiles."""

    def inputs(self, name):
        """What a batch is to theirs and to ours."""
        if self.own_processor is None:
            theirs = asked(self.processor, *BATCHES[name])
            return theirs, for_ours(theirs)
        theirs, ours = (asked(each, *TILED_BATCHES[name]) for each in (self.processor, self.own_processor))
        assert len(ours["pixel_values"]) >= 3 * len(ours["image_sizes"]), "each is a thumbnail and several tiles"
        return theirs, ours

    def compared(self, what):
        """The row of docs/parity.md."""
        called = CALLED[self.theirs.config.model_type]
        return called, f"{what} of ours with its weights" + (", tiles" if self.own_processor else "")


@pytest.fixture(scope="module", params=[*COUNTERPARTS, *IN_TILES])
def pair(request):
    model, processor = counterpart(request.param)
    if request.param in COUNTERPARTS:
        return Pair(model, from_stock(model), processor)
    ours, own_processor = from_stock(model, processor)
    return Pair(model, ours, processor, own_processor)


def test_every_family_is_tested():
    assert {name.partition(",")[0] for name in (*COUNTERPARTS, *IN_TILES)} == FAMILIES.keys()


@pytest.mark.parametrize("name", BATCHES)
def test_ours_computes_what_the_stock_model_does(pair, name, parity):
    if name == "two images" and type(pair.processor).__name__ in ONE_IMAGE:
        pytest.skip("its prompt has one image")
    inputs, own = pair.inputs(name)
    assert torch.equal(inputs["input_ids"], own["input_ids"])
    wanted = logits(pair.theirs, **inputs)
    seen = inputs["attention_mask"].bool()
    difference = (wanted - logits(pair.ours, **own)[..., : wanted.shape[-1]]).abs()
    assert wanted.std() > 0.1
    parity(*pair.compared("logits"), difference[seen].max())
    assert difference[seen].max() < 1e-4
    other = inputs | {"pixel_values": -inputs["pixel_values"]}  # else a model blind to images would pass
    assert (logits(pair.theirs, **other) - wanted).abs().max() > 1e-2


def test_ours_goes_on_as_the_stock_model_does(pair, parity):
    steps = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    answers = [
        model.generate(**inputs, **steps)
        for model, inputs in zip((pair.theirs, pair.ours), pair.inputs("padded batch"), strict=True)
    ]
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    theirs, ours = (torch.stack(answer.logits) for answer in answers)
    difference = (theirs - ours[..., : theirs.shape[-1]]).abs().max()
    parity(*pair.compared("cached generation"), difference)
    assert difference < 1e-4


def test_ours_is_the_same_when_loaded(pair, tmp_path):
    _, inputs = pair.inputs("padded batch")
    pair.ours.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, **inputs), logits(pair.ours, **inputs))


def test_there_and_back_is_the_same_bit_for_bit(pair):
    theirs, ours = pair.theirs, pair.ours
    family = family_of(theirs.config.model_type)
    weights, state = family.whole(theirs.state_dict(), theirs.config), ours.state_dict()
    back = {}
    for name, stock_name, renamed in family.names(ours):
        back[stock_name] = renamed.to_stock(state[name]) if renamed else state[name]
    assert back.keys() >= weights.keys() - set(theirs.all_tied_weights_keys) - family.idle(ours).keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in back.items())


@pytest.mark.parametrize("name", ["llava", "gemma3", "internvl", *IN_TILES])
def test_a_stock_pair_becomes_ours_and_a_stock_pair_again(name):
    """Both ways compare the two pairs; here, what the processors are told."""
    model, processor = counterpart(name)
    _, again = to_stock(*from_stock(model, processor), model.config.model_type)
    first, last = (
        {key: value for key, value in each.image_processor.to_dict().items() if key != "crop_to_patches"}
        for each in (processor, again)
    )
    assert type(again) is type(processor)
    assert last == first


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("decoder", ["llama", "qwen3", "mistral", "gemma3"])
def test_any_decoder_becomes_that_of_llava_and_comes_back(decoder, tie_word_embeddings):
    model, processor = tiny(decoder, vision_feature_layer=-2, tie_word_embeddings=tie_word_embeddings)
    fit(model)
    stock_model, stock_processor = to_stock(model, processor, "llava")
    inputs = asked(stock_processor, *BATCHES["padded batch"])
    wanted = logits(model, **inputs)
    seen = inputs["attention_mask"].bool()
    for other in (stock_model, from_stock(stock_model)):
        assert (logits(other, **inputs) - wanted)[seen].abs().max() < 1e-4
    tied = stock_model.get_output_embeddings().weight is stock_model.get_input_embeddings().weight
    assert tied == tie_word_embeddings


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("decoder", ["llama", "gpt2", "granite"])
def test_any_decoder_becomes_that_of_blip_2_and_comes_back(decoder, tie_word_embeddings):
    model, processor = own_blip2(text_config(decoder, tie_word_embeddings=tie_word_embeddings))
    stock_model, stock_processor = to_stock(model, processor, "blip2")
    inputs = asked(stock_processor, *BATCHES["padded batch"])
    wanted, seen = logits(model, **inputs), inputs["attention_mask"].bool()
    again = from_stock(stock_model)
    for other in (stock_model, again):
        assert (logits(other, **inputs) - wanted)[seen].abs().max() < 1e-4
    assert again.config.text_config.tie_word_embeddings == tie_word_embeddings


@pytest.mark.parametrize("name", sorted(PROMPTED))
def test_a_processor_without_a_chat_template_becomes_ours_and_comes_back(name):
    model, processor = counterpart(name)
    ours, own_processor = from_stock(model, processor)
    again, its_processor = to_stock(ours, own_processor, name)
    questions = [asked(each, *BATCHES["one image"]) for each in (processor, own_processor, its_processor)]
    wanted, *others = (logits(each, **inputs) for each, inputs in zip((model, ours, again), questions, strict=True))
    assert all((other - wanted).abs().max() < 1e-4 for other in others)


def test_a_stock_model_in_half_precision():
    """BLIP-2 keeps its Q-Former in float32 then, and ours has one format in the projector."""
    model, processor = counterpart("blip2")
    inputs = asked(processor, *BATCHES["one image"])
    wanted = logits(model, **inputs)
    half = model.to(torch.bfloat16)
    half.qformer.float()
    half.query_tokens.data = half.query_tokens.data.float()
    ours = from_stock(half)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert (logits(ours, **inputs) - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_a_decoder_that_was_paligemmas_is_causal_by_itself():
    ours = from_stock(counterpart("paligemma")[0])
    ids = torch.arange(8)[None]
    other = ids.clone()
    other[0, -1] = 99
    found, changed = (causal_lm(ours)(each).logits[0, :-1] for each in (ids, other))
    assert torch.equal(found, changed)
    assert all(layer.self_attn.is_causal for layer in ours.model.language_model.layers)


# --- what is written out


@torch.no_grad()
def test_a_model_with_flamingos_blocks_is_idefics_where_those_are_alike(parity):
    """transformers has no Flamingo. Ours is given here what Idefics has otherwise: norms on queries and keys, a
    feed-forward with a gate and for every token, visual tokens that come normalised and as wide as the encoder's
    features. The blocks stand where Idefics has them, each at the beginning of so many layers and not near the end."""
    theirs, processor = counterpart("idefics")
    ours = from_stock(theirs)
    for layer in ours.model.language_model.layers:
        if hasattr(layer, "cross_attention"):
            idefics, size = layer.cross_attention, ours.config.text_config.hidden_size
            block = FlamingoBlock(size, theirs.config.num_attention_heads, idefics.index, theirs.config.rms_norm_eps)
            for part in ("k_proj", "v_proj", "q_norm", "k_norm", "states_norm", "feed_forward"):
                setattr(block, part, getattr(idefics, part))
            block.feeds_every_token = True
            left = {name: tensor for name, tensor in idefics.state_dict().items() if not name.endswith("gate")}
            block.load_state_dict(left, strict=False)
            block.attention_gate.copy_(idefics.attention_gate[0])
            block.feed_forward_gate.copy_(idefics.feed_forward_gate[0])
            layer.cross_attention = block.eval()
    assert sum(isinstance(module, FlamingoBlock) for module in ours.modules()) == 2
    for conversations in BATCHES.values():
        inputs = asked(processor, *conversations)
        difference = (logits(ours, **for_ours(inputs)) - logits(theirs, **inputs)).abs()
        difference = difference[inputs["attention_mask"].bool()].max()
        parity("Flamingo", "logits of a model with its blocks, those of Idefics", difference)
        assert difference < 1e-4


def test_a_token_of_mllama_that_sees_no_image(parity):
    """In transformers it attends to all there are, padding too. In Meta's code and in ours it attends to none; so here
    the stock model is told, as in Meta's code, to forget what such a token attended to."""
    theirs, processor = counterpart("mllama")
    ours = from_stock(theirs)
    processor.chat_template = stock("mllama")[1].chat_template
    inputs = asked(processor, ("what", image(0), "is it", image(1), "?"), (image(2), "a dog"))
    assert not inputs["cross_attention_mask"].any(dim=(2, 3))[0, 1]
    seen = inputs["attention_mask"].bool()
    found = logits(ours, **for_ours(inputs))
    wanted = logits(theirs, **inputs)
    assert (found[..., : wanted.shape[-1]] - wanted)[seen].abs().max() > 1e-2
    sees_any = inputs["cross_attention_mask"].any(dim=(2, 3))[..., None]
    for layer in theirs.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            layer.cross_attn.register_forward_hook(lambda _, __, out: (out[0] * sees_any, out[1]))
    wanted = logits(theirs, **inputs)
    difference = (found[..., : wanted.shape[-1]] - wanted)[seen].abs().max()
    parity("Llama 3.2 Vision", "the same where words come first, after Meta's code", difference)
    assert difference < 1e-4


def test_tokens_that_mllama_only_reads_are_hardly_written():
    theirs, processor = counterpart("mllama")
    found = logits(from_stock(theirs), **for_ours(asked(processor, *BATCHES["one image"])))
    words = theirs.config.text_config.vocab_size
    assert found.shape[-1] == words + 8
    probable = found.softmax(dim=-1)
    assert (probable[..., words:] < probable[..., :words].mean(dim=-1, keepdim=True)).all()


@torch.no_grad()
def test_idefics2_takes_any_size_that_all_images_of_a_batch_have():
    theirs, processor = counterpart("idefics2")
    processor.image_processor.size = {"longest_edge": 32, "shortest_edge": 16}
    inputs = asked(processor, (image(0, (64, 32)), "a cat"), (image(1, (60, 30)), "a dog"))
    assert inputs["pixel_values"].shape[-2:] == (16, 32)
    difference = (logits(from_stock(theirs), **for_ours(inputs)) - logits(theirs, **inputs)).abs()
    assert difference[inputs["attention_mask"].bool()].max() < 1e-4
