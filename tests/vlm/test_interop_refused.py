"""What one of our models, or a stock one, has that the other cannot express is refused, with the reason."""

import pytest

from tests.counterparts import (
    ANYRES,
    EXPRESSIBLE,
    IDEFICS3_MARKERS,
    WITHOUT_STATISTICS,
    counterpart,
    fit,
    own_blip2,
    siglip,
)
from tests.stock import stock
from tests.tiny import clip_config, image_processor, small_projector, tiny
from vlm.errors import UserError
from vlm.interop import from_stock, to_stock

TILES = {"type": "tiles", "max_tiles": 4}
IDEFICS3_TILES = {"type": "idefics3", "max_tiles": 4}
GEMMA = {"projector": "linear", "image_attention": "prefix_lm", "decoder": "gemma2"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": "linear", "vision_feature_layer": -2}, "the projector is linear"),
        ({"fusion": "cross_attention", "vision_feature_layer": -2}, "fusion is cross_attention"),
        ({"decoder": "granite", "vision_feature_layer": -2}, "computes something else"),
        ({"decoder": "gemma2", "vision_feature_layer": -2}, "computes something else"),  # it caps its logits
        ({"decoder": "gpt2", "vision_feature_layer": -2, "tie_word_embeddings": True}, "embed_tokens alone"),
        (
            {"vision_config": clip_config(image_size=64), "vision_feature_layer": -2},
            "does not take what this model takes",
        ),
    ],
)
def test_a_model_that_llava_cannot_be_is_refused(changes, message):
    model, processor = tiny(**changes)
    if changes.get("decoder") == "granite":
        model.model.language_model.config.logits_scaling = 3.0
        model.language_head.causal_lm.logits_scaling = 3.0
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
        ("paligemma", {"projector": "linear"}, "image_attention is causal"),
        ("paligemma", {"projector": "linear", "image_attention": "prefix_lm"}, "the language model is llama"),
        ("paligemma", GEMMA, "with chat_template: paligemma under model"),
        ("paligemma", GEMMA | {"chat_template": "paligemma"}, "token that begins a text, and this tokenizer has none"),
        ("blip2", {"projector": "qformer"}, "has a ViT of its own and no other"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": "auto"}, "with chat_template: blip2 under model"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy: full"),
        ({"pictures": image_processor(64)}, "images have to be 32 x 32 pixels"),
    ],
)
def test_a_model_that_blip_2_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        to_stock(*own_blip2(**changes), "blip2")


@pytest.mark.parametrize(
    ("name", "part", "key", "value"),
    [
        ("blip2", "qformer_config", "intermediate_size", 48),
        ("blip2", "qformer_config", "use_qformer_text_input", True),
        ("blip2", None, "image_token_index", None),
        ("blip2", None, "use_decoder_only_language_model", False),
        ("paligemma", None, "image_token_index", 99999),
    ],
)
def test_a_stock_setting_that_ours_does_not_have_is_refused(name, part, key, value):
    model, _ = counterpart(name)
    setattr(getattr(model.config, part) if part else model.config, key, value)
    with pytest.raises(UserError, match=r"this checkpoint|reads the prompt"):
        from_stock(model)


@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
def test_statistics_that_fit_nowhere_are_refused(name):
    model, processor = EXPRESSIBLE[name]()
    fit(model)
    with pytest.raises(UserError, match="data_dependent_init: false"):
        to_stock(model, processor, name.partition(",")[0])


def test_a_stock_model_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"no counterpart of qwen2_vl among ours: .* \(M-RoPE\)"):
        from_stock(stock("qwen2_vl")[0])
    with pytest.raises(UserError, match="no counterpart of 'blip' among ours; "):
        from_stock(stock("blip")[0])


@pytest.mark.parametrize(
    ("name", "part", "changes", "message"),
    [
        ("idefics", "", {"qk_layer_norms": False}, "qk_layer_norms is False in this checkpoint"),
        ("idefics", "", {"use_resampler": False}, "use_resampler is False in this checkpoint"),
        ("idefics", "", {"additional_vocab_size": 0}, "additional_vocab_size is 0"),
        ("idefics", "perceiver_config", {"qk_layer_norms_perceiver": False}, "qk_layer_norms_perceiver is False"),
        ("idefics2", "perceiver_config", {"hidden_act": "gelu"}, "hidden_act of perceiver_config is 'gelu'"),
        (
            "mllama",
            "text_config",
            {"cross_attention_layers": [1, 2]},
            r"cross_attention_layers is \[1, 2\] of 3 layers",
        ),
        ("mllama", "vision_config", {"supported_aspect_ratios": [[1, 2]]}, "no image as one tile"),
    ],
)
def test_a_setting_that_ours_does_not_have_is_refused(name, part, changes, message):
    model, _ = counterpart(name)
    for key, value in changes.items():
        setattr(getattr(model.config, part) if part else model.config, key, value)
    with pytest.raises(UserError, match=message):
        from_stock(model)


@pytest.mark.parametrize("target", ["idefics", "idefics2", "mllama"])
def test_what_ours_do_not_become_is_refused(target):
    with pytest.raises(UserError, match="Processor has no counterpart among ours: from_stock"):
        from_stock(*counterpart(target))
    with pytest.raises(UserError, match=r"can be imported but not exported\. Export targets: llava, "):
        to_stock(*tiny(), target)


def test_an_activation_that_ours_does_not_have_is_refused():
    model, _ = stock("llava")
    model.config.projector_hidden_act = "relu"
    with pytest.raises(UserError, match="projector_hidden_act is 'relu'"):
        from_stock(model)


def test_statistics_of_class_tokens_are_refused():
    model, processor = tiny(vision_feature_layer=-2, vision_feature_select_strategy="full")
    to_stock(model, processor, "llava")
    fit(model)
    with pytest.raises(UserError, match="class tokens and patches"):
        to_stock(model, processor, "llava")
