"""The model against the bare language model and against stock LLaVA."""

import copy

import pytest
import torch
from transformers import (
    BloomConfig,
    FalconConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import vlm  # noqa: F401 - registers the Auto classes
from tests.tiny import (
    ALL_FUSIONS,
    DECODERS,
    causal_lm,
    clip_config,
    encode,
    image,
    logits,
    open_gates,
    small_projector,
    text_config,
    tiny,
    user,
)
from vlm.adapters import GatedCrossAttention
from vlm.configuration import VLMConfig
from vlm.encoder import vision_config_of
from vlm.image_places import latest_image
from vlm.modeling import VLMForConditionalGeneration


def batch(processor, *conversations):
    return encode(processor, [[user(*parts)] for parts in conversations])


# --- against stock LLaVA


@pytest.fixture(scope="module", params=[-2, [-2, -3]], ids=str)
def llava_and_ours(request):
    """Stock LLaVA, and ours with its weights."""
    ours, processor = tiny(vision_feature_layer=request.param)
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config=ours.config.text_config,
        image_token_id=ours.config.image_token_id,
        vision_feature_layer=request.param,
        image_seq_length=16,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    missing, unexpected = ours.load_state_dict(llava.state_dict(), strict=False)
    assert not unexpected
    # What LLaVA does not have; until it is fitted it does nothing.
    assert set(missing) == {f"model.multi_modal_projector.standardize.{name}" for name in ("mean", "std")}
    return llava, ours, processor


@pytest.mark.parametrize(
    "conversations",
    [
        [(image(0), "what is it")],
        [(image(0), "and", image(1), image(2), "the dog")],
        [(image(0), "a cat"), ("no image",), (image(1), image(2), "what is in the image ?")],
    ],
    ids=["one image", "several images", "padded batch"],
)
def test_equals_stock_llava(llava_and_ours, conversations):
    llava, ours, processor = llava_and_ours
    inputs = batch(processor, *conversations)
    difference = (logits(llava, **inputs) - logits(ours, **inputs)).abs()
    assert logits(ours, **inputs).std() > 0.1
    assert difference[inputs["attention_mask"].bool()].max() < 1e-4


def test_loss_equals_stock_llava(llava_and_ours):
    llava, ours, processor = llava_and_ours
    inputs = batch(processor, (image(0), "a cat"), (image(1), "what is in the image ?"))
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        assert torch.allclose(llava(**inputs, labels=labels).loss, ours(**inputs, labels=labels).loss, atol=1e-5)


# --- arguments


def test_arguments_have_the_names_of_transformers(llava_and_ours):
    """Old programs pass `past_key_values` and `cache_position`; logits against stock LLaVA, given the same."""
    llava, ours, processor = llava_and_ours
    inputs = batch(processor, (image(0), "a cat"))
    more, found = torch.tensor([[5, 6]]), []
    for model in (llava, ours):
        read = model(**inputs, use_cache=True)
        with pytest.warns(FutureWarning, match="past_key_values"):
            found.append(logits(model, input_ids=more, past_key_values=read.cache, cache_position=torch.arange(2)))
    assert torch.allclose(*found, atol=1e-4)


@pytest.mark.parametrize("name", ["image_features", "pixel_attention_mask", "image_grid_thw", "pixel_value", "caches"])
def test_an_argument_that_nothing_reads_is_refused(name):
    model, processor = tiny()
    with pytest.raises(TypeError, match=name):
        model(**batch(processor, ("a cat",)), **{name: torch.zeros(1)})


# --- what a bridge does before it is trained


@pytest.mark.parametrize("fusion", ["cross_attention", "cross_attention_layers"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_closed_gates_leave_the_language_model_as_it_was_bit_for_bit(decoder, fusion):
    model, processor = tiny(decoder, fusion, gates=False)
    inputs = batch(processor, (image(0), "what is it"), ("a cat", image(1), image(2), "and a dog"))
    bare = causal_lm(model)
    text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    assert torch.equal(logits(model, **inputs), logits(bare, **text))
    open_gates(model)
    assert (logits(model, **inputs) - logits(bare, **text)).abs().max() > 0.1


def test_closed_gates_leave_the_prefix_as_it_was_bit_for_bit():
    both, processor = tiny(fusion="prefix+cross_attention", gates=False)
    prefix, _ = tiny(fusion="prefix", gates=False)
    weights = {key.replace(".layer.", "."): value for key, value in both.state_dict().items()}
    prefix.load_state_dict({key: value for key, value in weights.items() if ".cross_attention." not in key})
    inputs = batch(processor, (image(0), "what is it"), (image(1), image(2), "a dog"))
    assert torch.equal(logits(both, **inputs), logits(prefix, **inputs))


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_images_change_what_follows_them_and_nothing_before(decoder, fusion):
    model, processor = tiny(decoder, fusion)
    inputs = batch(processor, ("a cat and", image(0), "a dog"))
    other = batch(processor, ("a cat and", image(1), "a dog"))
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    difference = (logits(model, **inputs) - logits(model, **other)).abs().amax(dim=-1)[0]
    assert torch.equal(difference[:first], torch.zeros(first))
    assert difference[-1] > 1e-3


# --- gradients


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
def test_gradients_reach_every_part(fusion):
    model, processor = tiny(fusion=fusion)
    inputs = batch(processor, (image(0), "what is it"), (image(1), image(2), "a dog"))
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        unread = "post_layernorm" in name  # CLIP's, for its class token
        assert unread or (parameter.grad is not None and parameter.grad.abs().sum() > 0), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fusion", ALL_FUSIONS)
def test_gradient_checkpointing_gives_the_same_gradients(fusion, reentrant):
    model, processor = tiny(fusion=fusion)
    inputs = batch(processor, (image(0), "what is it"), (image(1), image(2), "a dog"))

    def gradients():
        model.zero_grad()
        model.train()(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    recomputed = []
    for module in model.modules():
        if isinstance(module, GatedCrossAttention):
            module.q_proj.register_forward_pre_hook(lambda *_: recomputed.append(1))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed = gradients()
    assert len(recomputed) == (2 * 2 if "cross" in fusion else 0), "two blocks, forward and once more for the gradients"
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert torch.allclose(plain[name], checkpointed[name], rtol=1e-4, atol=1e-6), name


# --- what a token of a cross-attention model sees


def test_the_image_index_is_the_latest_image_of_the_row():
    model, _ = tiny(fusion="cross_attention")
    token = model.config.image_token_id
    ids = torch.tensor([[1, token, 2, token, 3], [4, 5, 6, 7, 8], [9, 9, token, 1, 1]])
    index = latest_image(ids == token, [1] * 3, None)
    assert index.tolist() == [[-1, 0, 0, 1, 1], [-1] * 5, [-1, -1, 2, 2, 2]]


def test_the_image_index_follows_a_tree_mask():
    """Two trees in a row, each an image and two branches: a branch sees the image of its own trunk."""
    model, _ = tiny(fusion="cross_attention")
    token = model.config.image_token_id
    #       tree 0: trunk [I a], branches [b] [c]   tree 1: trunk [d I], branch [e]   tree 2: no image
    ids = torch.tensor([[token, 11, 12, 13, 14, token, 15, 16]])
    sees = torch.zeros(8, 8, dtype=torch.bool)
    for query, keys in enumerate([[0], [0, 1], [0, 1, 2], [0, 1, 3], [4], [4, 5], [4, 5, 6], [7]]):
        sees[query, keys] = True
    expected = [[0, 0, 0, 0, -1, 1, 1, -1]]
    assert latest_image(ids == token, [1] * 2, sees[None, None]).tolist() == expected
    additive = torch.zeros(8, 8).masked_fill(~sees, torch.finfo(torch.float32).min)
    assert latest_image(ids == token, [1] * 2, additive[None, None]).tolist() == expected


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
def test_a_packed_row_equals_its_conversations_alone(fusion):
    """With a 4D mask and position ids of its own, a conversation beside another one gives the logits it gives alone."""
    model, processor = tiny(fusion=fusion)
    one, two = batch(processor, (image(0), "what is it")), batch(processor, ("a dog", image(1), "and a cat"))
    lengths = [x["input_ids"].shape[1] for x in (one, two)]
    row = torch.arange(2).repeat_interleave(torch.tensor(lengths))
    mask = (row[:, None] == row[None, :]).tril()
    packed = logits(
        model,
        input_ids=torch.cat([one["input_ids"], two["input_ids"]], dim=1),
        pixel_values=torch.cat([one["pixel_values"], two["pixel_values"]]),
        attention_mask=mask[None, None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
    )
    alone = torch.cat([logits(model, **one), logits(model, **two)], dim=1)
    assert torch.allclose(packed, alone, atol=1e-4)


# --- features in place of pixels


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_features_kept_from_an_earlier_run_are_as_good_as_pixels(strategy):
    model, processor = tiny(vision_feature_select_strategy=strategy)
    inputs = dict(batch(processor, (image(0), image(1), "what is it")))
    with torch.no_grad():
        features, grid = model.get_vision_features(inputs["pixel_values"])
    assert features.shape == (2, 16 + (strategy == "full"), 24)
    expected = logits(model, **inputs)
    del inputs["pixel_values"]
    assert torch.equal(logits(model, **inputs, vision_features=features, vision_grid=grid), expected)
    with pytest.raises(ValueError, match="vision_features together with vision_grid"):
        model(**inputs, vision_features=features)


@pytest.mark.parametrize("projector", ["average_pool", "c_abstractor", "resampler", "qformer"])
@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_projectors_with_a_fixed_number_of_tokens_take_images_of_any_size(projector, fusion):
    model, processor = tiny(fusion=fusion, projector=small_projector(projector))
    inputs = dict(batch(processor, (image(0), "what", image(1))))
    pixels = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model.get_vision_features(pixels)[1] == (6, 8)
        tokens = model.get_image_features(pixels).pooler_output
        alone = [model.get_image_features(one[None]).pooler_output[0] for one in pixels]
    assert torch.allclose(torch.stack(tokens), torch.stack(alone), atol=1e-5)
    wide = logits(model, **{**inputs, "pixel_values": pixels})
    assert (wide - logits(model, **inputs))[0, -1].abs().max() > 1e-3
    cropped = logits(model, **{**inputs, "pixel_values": pixels[..., :48, :48]})
    assert (wide - cropped)[0, -1].abs().max() > 1e-3, "the right edge is not looked at"


# --- errors


def test_labels_may_come_shifted():
    model, processor = tiny()
    inputs = batch(processor, (image(0), "what is it"), (image(1), "a dog ?"))
    labels = inputs["input_ids"]
    shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss
        assert model(**inputs, labels=torch.zeros_like(labels), shift_labels=shifted).loss == expected


@pytest.mark.parametrize("layer", [None, -2])
def test_hidden_states_and_attentions_are_those_of_the_encoder(layer):
    model, processor = tiny(vision_feature_layer=layer)
    model.set_attn_implementation("eager")
    inputs = batch(processor, (image(0), "what is it"), (image(1), "a dog ?"))
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = model.model.vision_tower(inputs["pixel_values"], **asked)
        found = model(**inputs, **asked).image_outputs
        unasked = model(**inputs).image_outputs
    for name, layers in (("hidden_states", 4), ("attentions", 3)):
        assert len(found[name]) == layers
        assert all(map(torch.equal, found[name], expected[name]))
        assert name not in unasked
    assert torch.equal(torch.stack(found.pooler_output), torch.stack(unasked.pooler_output))


def test_wrong_numbers_of_image_tokens_are_refused():
    model, processor = tiny()
    inputs = dict(batch(processor, (image(0), "what is it"), (image(1), "a dog")))
    with pytest.raises(ValueError, match="32 image tokens; 1 images of 16 tokens need 16"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
    ids = inputs["input_ids"].clone()
    ids[0, (ids[0] == model.config.image_token_id).nonzero()[0]] = 5
    ids[1, -1] = model.config.image_token_id
    with pytest.raises(ValueError, match="row 0 of the inputs holds 15 image tokens, and an image takes 16"):
        model(**{**inputs, "input_ids": ids})
    with pytest.raises(ValueError, match="row 0 of the inputs"):
        model.generate(**{**inputs, "input_ids": ids}, num_beams=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="grid of 8 x 8 become 64 tokens; this model's take 16"):
        model(**{**inputs, "pixel_values": torch.randn(2, 3, 64, 64)})
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="32 image tokens; 0 images"):
        model(**inputs)
    with pytest.raises(ValueError, match="inputs hold 0 image tokens; 1 images of 16 tokens need 16"):
        model(inputs_embeds=torch.randn(1, 20, 32), pixel_values=torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
        FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    ],
    ids=["bloom", "falcon"],
)
def test_decoders_that_drop_keyword_arguments_are_refused_for_cross_attention(config):
    options = {"vision_config": clip_config(), "text_config": config}
    with pytest.raises(ValueError, match=r"(Bloom|Falcon)Model does not pass .* Use fusion: prefix"):
        VLMForConditionalGeneration(VLMConfig(**options, fusion="cross_attention", cross_attention_every=1))
    model = VLMForConditionalGeneration(VLMConfig(**options, image_token_id=98, image_seq_length=16)).eval()
    ids = torch.tensor([[1] + [98] * 16 + [2]])
    different = [logits(model, input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32)) for _ in range(2)]
    assert not torch.equal(*different)


def test_a_configuration_is_checked():
    with pytest.raises(ValueError, match=r"unknown projector 'mlpp'\. Did you mean 'mlp'"):
        VLMConfig(projector={"type": "mlpp"})
    with pytest.raises(ValueError, match=r"unknown fusion 'cross_atention'\. Did you mean 'cross_attention'"):
        VLMConfig(fusion="cross_atention")
    with pytest.raises(ValueError, match="cross_attention_every is 9; this language model has 4 layers"):
        VLMForConditionalGeneration(
            VLMConfig(
                vision_config=clip_config(),
                text_config=text_config(),
                fusion="cross_attention",
                cross_attention_every=9,
            )
        )
    assert vision_config_of(VLMConfig(vision_config=clip_config())).hidden_size == 24


@pytest.mark.parametrize(
    ("positions", "before"),
    [
        ([3, 8], None),  # of 6 layers
        ([1, 2], None),  # neighbours
        ([1, 1], None),
        ([-1], None),
        ([], None),
        ([3, 5], None),  # nothing follows
        ([4, 1], [1, 3]),
        ([0, 2, 4, 6], [0, 1, 2, 3]),
    ],
)
def test_cross_attention_layers_are_positions_among_all_layers(positions, before):
    config = {
        "vision_config": clip_config(),
        "text_config": text_config(),
        "fusion": "cross_attention",
        "cross_attention_layers": positions,
    }
    if before is None:
        with pytest.raises(ValueError, match=r"cross_attention_layers is .* has 4 layers of its own"):
            VLMForConditionalGeneration(VLMConfig(**config))
        return
    layers = VLMForConditionalGeneration(VLMConfig(**config)).model.language_model.layers
    assert [number for number, layer in enumerate(layers) if hasattr(layer, "cross_attention")] == before


# --- in the hands of transformers


def test_hidden_states_tuples_and_no_split_modules():
    model, processor = tiny(fusion="prefix+cross_attention")
    inputs = batch(processor, (image(0), "what is it"))
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        assert len(outputs.hidden_states) == 5
        assert torch.equal(model(**inputs, return_dict=False)[0], outputs.logits)
    assert {"FusedDecoderLayer", "LlamaDecoderLayer"} <= set(model._no_split_modules)
    assert torch.equal(logits(copy.deepcopy(model), **inputs), outputs.logits)


def test_evaluation_in_a_trainer_gathers_logits_and_nothing_else(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, processor = tiny(fusion="cross_attention")
    inputs = dict(batch(processor, (image(0), "what is it")))
    inputs["labels"] = inputs["input_ids"]
    rows = [{key: value[0] for key, value in inputs.items()}] * 2
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], disable_tqdm=True)
    result = Trainer(model, arguments).predict(torch.utils.data.ConcatDataset([rows]))
    assert result.predictions.shape == (2, *logits(model, **inputs).shape[1:])
