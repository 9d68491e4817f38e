"""Stock models of transformers taken into ours compute what they did, and so does what is made of them again."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.counterparts import (
    ANYRES,
    COUNTERPARTS,
    EXPRESSIBLE,
    IDEFICS3_MARKERS,
    IN_TILES,
    counterpart,
    for_ours,
    siglip,
)
from tests.stock import stock
from tests.tiny import clip_config, encode, image, image_processor, logits, small_projector, tiny, user
from vlm.errors import UserError
from vlm.interop import FAMILIES, from_stock, to_stock

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
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "internvl": "InternVL",
    "gemma3": "Gemma 3",
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
            theirs = batch(self.processor, *BATCHES[name])
            return theirs, for_ours(theirs)
        theirs, ours = (batch(each, *TILED_BATCHES[name]) for each in (self.processor, self.own_processor))
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


TILES = {"type": "tiles", "max_tiles": 4}
IDEFICS3_TILES = {"type": "idefics3", "max_tiles": 4}


def batch(processor, *conversations):
    return encode(processor, [[user(*parts)] for parts in conversations])


def test_every_family_is_tested():
    assert {name.partition(",")[0] for name in (*COUNTERPARTS, *IN_TILES)} == FAMILIES.keys()


@pytest.mark.parametrize("name", BATCHES)
def test_ours_computes_what_the_stock_model_does(pair, name, parity):
    inputs, own = pair.inputs(name)
    assert torch.equal(inputs["input_ids"], own["input_ids"])
    wanted = logits(pair.theirs, **inputs)
    seen = inputs["attention_mask"].bool()
    difference = (wanted - logits(pair.ours, **own)).abs()
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
    parity(*pair.compared("cached generation"), (theirs - ours).abs().max())
    assert (theirs - ours).abs().max() < 1e-4


def test_there_and_back_is_the_same_bit_for_bit(pair):
    theirs, ours = pair.theirs, pair.ours
    weights, state = theirs.state_dict(), ours.state_dict()
    back = {}
    for name, stock_name, renamed in FAMILIES[theirs.config.model_type].names(ours):
        back[stock_name] = renamed.to_stock(state[name]) if renamed else state[name]
    assert back.keys() >= weights.keys() - set(theirs.all_tied_weights_keys)
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
    inputs = batch(stock_processor, *BATCHES["padded batch"])
    wanted = logits(model, **inputs)
    seen = inputs["attention_mask"].bool()
    for other in (stock_model, from_stock(stock_model)):
        assert (logits(other, **inputs) - wanted)[seen].abs().max() < 1e-4
    tied = stock_model.get_output_embeddings().weight is stock_model.get_input_embeddings().weight
    assert tied == tie_word_embeddings


# --- what cannot be expressed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": "linear", "vision_feature_layer": -2}, "the projector is linear"),
        ({"fusion": "cross_attention", "vision_feature_layer": -2}, "fusion is cross_attention"),
        ({"decoder": "granite", "vision_feature_layer": -2}, "computes something else"),
        ({"decoder": "gemma2", "vision_feature_layer": -2}, "computes something else"),  # it caps its logits
        ({"decoder": "gpt2", "vision_feature_layer": -2, "tie_word_embeddings": True}, "embed_tokens alone"),
    ],
)
def test_a_model_that_llava_cannot_be_is_refused(changes, message):
    model, processor = tiny(**changes)
    if changes.get("decoder") == "granite":
        model.language_model.config.logits_scaling = 3.0
        model.language_model.logits_scaling = 3.0
    with pytest.raises(UserError, match=message):
        to_stock(model, processor, "llava")


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("idefics3", {}, r"only a model trained so .* image_markers: \["),
        (
            "idefics3",
            {"image_markers": IDEFICS3_MARKERS, "vision_feature_layer": -2},
            "patches of its encoder's output",
        ),
        ("idefics3", {"image_markers": IDEFICS3_MARKERS, "pictures": image_processor()}, "makes other pixels"),
        ("idefics3", {"tiling": TILES}, "tiling is tiles; Idefics3.* has none or idefics3 and no other"),
        ("idefics3", {"tiling": IDEFICS3_TILES, "pictures": image_processor(16)}, "interpolates no position"),
        ("gemma3", {"projector": "average_pool", "tiling": TILES}, "tiling is tiles; .* has none and no other"),
        ("gemma3", {"projector": "average_pool"}, "image_attention is causal"),
        ("internvl", {"projector": "pixel_shuffle_mlp"}, "has InternViT and no other"),
    ],
)
def test_a_model_that_another_architecture_cannot_be_is_refused(target, changes, message):
    projector = small_projector(changes.pop("projector", "pixel_shuffle"))
    with pytest.raises(UserError, match=message):
        to_stock(*siglip(projector, **changes), target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "tiling is none; LlavaNext.* has anyres and no other"),
        ({"tiling": {"type": "anyres", "max_tiles": 4}}, "shows small ones whole; .* `preset: llava_next`"),
        ({"tiling": ANYRES, "vision_config": clip_config(image_size=48)}, "tiles of the size .*, 48 x 48 pixels"),
    ],
)
def test_a_model_that_llava_next_cannot_be_is_refused(changes, message):
    model, processor = tiny(vision_feature_layer=-2, **changes)
    with pytest.raises(UserError, match=message):
        to_stock(model, processor, "llava_next")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llava_next", lambda model, _: model.config.image_grid_pinpoints.append([32, 32]), "of several tiles"),
        ("llava_next", lambda model, _: model.config.image_grid_pinpoints.append([48, 32]), "only multiples of"),
        ("idefics3", lambda _, p: setattr(p.image_processor, "size", {"longest_edge": 50}), "have to divide it"),
        ("internvl", lambda _, p: setattr(p.image_processor, "min_patches", 2), "min_patches is 2"),
        ("internvl", lambda _, p: setattr(p, "chat_template", "hello"), "writes no <IMG_CONTEXT> for images"),
        ("internvl", lambda _, p: setattr(p, "image_seq_length", 5), "in other tokens"),
    ],
)
def test_a_stock_model_on_tiles_that_ours_cannot_be_is_refused(name, change, message):
    model, processor = stock(name)
    change(model, processor)
    with pytest.raises(UserError, match=message):
        from_stock(model, processor)


def test_statistics_that_fit_nowhere_are_refused():
    model, processor = EXPRESSIBLE["internvl"]()
    fit(model)
    with pytest.raises(UserError, match="data_dependent_init: false"):
        to_stock(model, processor, "internvl")


def test_a_stock_model_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"no counterpart of qwen2_vl among ours: .* \(M-RoPE\)"):
        from_stock(stock("qwen2_vl")[0])
    with pytest.raises(UserError, match=r"no counterpart of paligemma among ours: .* both ways"):
        from_stock(stock("paligemma")[0])
    with pytest.raises(UserError, match="no counterpart of 'blip' among ours; "):
        from_stock(stock("blip")[0])


def test_an_activation_that_ours_does_not_have_is_refused():
    model, _ = stock("llava")
    model.config.projector_hidden_act = "relu"
    with pytest.raises(UserError, match="projector_hidden_act is 'relu'"):
        from_stock(model)


def fit(model, seed=1):
    """Give a model's projector statistics that matter."""
    generator = torch.Generator().manual_seed(seed)
    standardize = model.multi_modal_projector.standardize
    standardize.mean.normal_(generator=generator)
    standardize.std.uniform_(0.5, 2, generator=generator)


def test_statistics_of_class_tokens_are_refused():
    model, processor = tiny(vision_feature_layer=-2, vision_feature_select_strategy="full")
    to_stock(model, processor, "llava")
    fit(model)
    with pytest.raises(UserError, match="class tokens and patches"):
        to_stock(model, processor, "llava")
