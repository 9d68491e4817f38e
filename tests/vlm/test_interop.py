"""Stock models of transformers taken into ours compute what they did, and so does what is made of them again."""

import pytest
import torch

from tests.counterparts import COUNTERPARTS, EXPRESSIBLE, IDEFICS3_MARKERS, counterpart, for_ours, siglip
from tests.stock import stock
from tests.tiny import continuation, encode, image, image_processor, logits, small_projector, tiny, user
from vlm.errors import UserError
from vlm.interop import FAMILIES, from_stock, to_stock

BATCHES = {
    "one image": [(image(0), "what is it")],
    "two images": [(image(0), "and", image(1), "the dog")],
    "padded batch": [(image(0), "a cat"), (image(1), "what is in the image ?")],
}

CALLED = {"llava": "LLaVA", "idefics3": "Idefics3", "smolvlm": "SmolVLM", "internvl": "InternVL", "gemma3": "Gemma 3"}


@pytest.fixture(scope="module", params=COUNTERPARTS)
def pair(request):
    model, processor = counterpart(request.param)
    return model, from_stock(model), processor


TILES = {"type": "tiles", "max_tiles": 4}


def batch(processor, *conversations):
    return encode(processor, [[user(*parts)] for parts in conversations])


def test_every_family_is_tested():
    assert COUNTERPARTS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", BATCHES)
def test_ours_computes_what_the_stock_model_does(pair, name, parity):
    theirs, ours, processor = pair
    conversations = BATCHES[name]
    inputs = batch(processor, *conversations)
    wanted = logits(theirs, **inputs)
    seen = inputs["attention_mask"].bool()
    difference = (wanted - logits(ours, **for_ours(inputs))).abs()
    assert wanted.std() > 0.1
    parity(CALLED[theirs.config.model_type], "logits of ours with its weights", difference[seen].max())
    assert difference[seen].max() < 1e-4
    other = inputs | {"pixel_values": -inputs["pixel_values"]}  # else a model blind to images would pass
    assert (logits(theirs, **other) - wanted).abs().max() > 1e-2


def test_ours_goes_on_as_the_stock_model_does(pair):
    theirs, ours, processor = pair
    inputs = batch(processor, *BATCHES["padded batch"])
    assert continuation(ours, for_ours(inputs)) == continuation(theirs, inputs)


def test_there_and_back_is_the_same_bit_for_bit(pair):
    theirs, ours, _ = pair
    weights, state = theirs.state_dict(), ours.state_dict()
    back = {}
    for name, stock_name, renamed in FAMILIES[theirs.config.model_type].names(ours):
        back[stock_name] = renamed.to_stock(state[name]) if renamed else state[name]
    assert back.keys() >= weights.keys() - set(theirs.all_tied_weights_keys)
    assert all(torch.equal(weights[name], tensor) for name, tensor in back.items())


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
        ("idefics3", {"image_markers": IDEFICS3_MARKERS, "tiling": TILES}, "cut into tiles"),
        ("gemma3", {"projector": "average_pool"}, "image_attention is causal"),
        ("internvl", {"projector": "pixel_shuffle_mlp"}, "has InternViT and no other"),
    ],
)
def test_a_model_that_another_architecture_cannot_be_is_refused(target, changes, message):
    projector = small_projector(changes.pop("projector", "pixel_shuffle"))
    with pytest.raises(UserError, match=message):
        to_stock(*siglip(projector, **changes), target)


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
