"""A model from folders: what is loaded stays as it was, and nothing is said that a user need not know."""

import copy
import logging

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionModelWithProjection,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    TimmWrapperConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from tests.stock import stock
from tests.tiny import (
    byte_level_tokenizer,
    clip_config,
    continuation,
    encode,
    image,
    image_processor,
    language_weights,
    logits,
    metaspace_tokenizer,
    text_config,
    tiny,
    user,
)
from vlm import encoder
from vlm.build import assemble, build
from vlm.encoder import load_vision_tower
from vlm.generation import generate
from vlm.image_processors import image_size_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A CLIP, its vision half with a projection, an image classifier without a pooler, and language models."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("parts")
    size = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 48}
    text = CLIPTextConfig(vocab_size=99, num_hidden_layers=1, **size)
    clip = CLIPConfig(text_config=text.to_dict(), vision_config=clip_config().to_dict())
    CLIPModel(clip).save_pretrained(root / "clip")
    CLIPVisionModelWithProjection(clip_config()).save_pretrained(root / "clip_vision")
    vit = ViTConfig(num_hidden_layers=2, image_size=32, patch_size=8, **size)
    ViTForImageClassification(vit).save_pretrained(root / "vit")
    for name in ("clip", "clip_vision"):
        image_processor().save_pretrained(root / name)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "vit")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}
    data = {"input_size": (3, 32, 32), "crop_pct": 0.9, "interpolation": "bicubic"}
    timm = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=arguments, pretrained_cfg=data)
    AutoModel.from_config(timm).save_pretrained(root / "timm")
    naflex = Siglip2VisionConfig(num_hidden_layers=2, patch_size=8, num_patches=16, **size)
    AutoModel.from_config(naflex).save_pretrained(root / "naflex")
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(root / "naflex")
    for name, tokenizer in (("byte_level", byte_level_tokenizer()), ("metaspace", metaspace_tokenizer())):
        # As many embeddings as tokens, so that the image token needs one more.
        config = text_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def warnings(caplog):
    """What transformers says at the level that users see."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("language", ["byte_level", "metaspace"])
@pytest.mark.parametrize("vision", ["clip", "clip_vision", "vit"])
def test_build_says_nothing_and_answers(folders, vision, language, warnings, capfd):
    model, processor = build(str(folders / vision), str(folders / language), fusion="prefix+cross_attention")
    assert warnings() == []
    assert "UNEXPECTED" not in capfd.readouterr().err
    assert model.config.image_seq_length == 16
    answers = generate(
        model,
        processor,
        [([image(0)], [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}])],
        max_new_tokens=3,
    )
    assert isinstance(answers[0], str)


@torch.no_grad()
def test_the_vision_half_of_a_dual_encoder_says_what_the_whole_does(folders, parity):
    clip = CLIPModel.from_pretrained(folders / "clip").eval()
    model, processor = build(str(folders / "clip"), str(folders / "metaspace"))
    pixels = processor.image_processor(image(), return_tensors="pt")["pixel_values"]
    expected = clip.vision_model(pixels)
    features = encoder.encode(model.model.vision_tower.eval(), pixels)
    difference = (features.patches - expected.last_hidden_state[:, 1:]).abs().max()
    parity("CLIP", "patch embeddings of its vision half", difference)
    assert difference < 1e-6
    assert (features.pooled - expected.pooler_output).abs().max() < 1e-6


def test_the_encoder_of_blip_2_is_found_in_the_whole_and_kept(folders, tmp_path):
    whole, its_processor = stock("blip-2")
    whole.save_pretrained(tmp_path / "whole")
    its_processor.save_pretrained(tmp_path / "whole")
    model, processor = build(str(tmp_path / "whole"), str(folders / "metaspace"))
    for name, value in whole.vision_model.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], value), name
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")
    inputs = encode(processor, [[user(image(), "what")]])
    assert torch.equal(logits(again, **inputs), logits(model.eval(), **inputs))


def test_weights_are_those_of_the_checkpoints(folders):
    model, processor = build(str(folders / "clip"), str(folders / "metaspace"), fusion="cross_attention")
    clip = CLIPModel.from_pretrained(folders / "clip").vision_model
    tower = model.model.vision_tower.state_dict()
    for name, value in clip.state_dict().items():
        assert torch.equal(tower[name if name in tower else f"vision_model.{name}"], value), name
    language = AutoModelForCausalLM.from_pretrained(folders / "metaspace")
    tokens = language.config.vocab_size
    ours = language_weights(model)
    for name, value in language.state_dict().items():
        assert torch.equal(ours[name][: len(value)], value), name
    embeddings = model.get_input_embeddings().weight
    assert len(embeddings) >= len(processor.tokenizer) == tokens + 1
    assert len(model.get_output_embeddings().weight) == len(embeddings) == model.config.text_config.vocab_size
    # The new embedding is about as large as the others, so that it is neither likely nor impossible.
    assert embeddings[tokens].norm() < 2 * embeddings[:tokens].norm(dim=1).max()


def test_assembling_changes_no_weight():
    torch.manual_seed(0)
    tower, language = AutoModel.from_config(clip_config()), AutoModelForCausalLM.from_config(text_config())
    tower.train()
    weights = [copy.deepcopy(part.state_dict()) for part in (tower, language)]
    model, _ = assemble(tower, language, image_processor(), byte_level_tokenizer())
    for found, before in zip((model.model.vision_tower.state_dict(), language_weights(model)), weights, strict=True):
        assert found.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in found.items())
    assert tower.training, "running the encoder once must not change its mode"


def test_batch_norm_statistics_are_not_touched():
    tower = AutoModel.from_config(TimmWrapperConfig(architecture="resnet18", model_args={"channels": [8, 8, 16, 24]}))
    before = copy.deepcopy(tower.train().state_dict())
    assemble(tower, AutoModelForCausalLM.from_config(text_config()), image_processor(), byte_level_tokenizer())
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_special_tokens_stay_special(folders):
    _, processor = build(str(folders / "clip"), str(folders / "byte_level"))
    ids = processor.tokenizer("<|im_start|>a<image>b<|im_end|>")["input_ids"]
    assert processor.decode(ids, skip_special_tokens=True) == "ab"


@pytest.mark.parametrize(("language", "end"), [("byte_level", "<|im_end|>"), ("metaspace", "</s>")])
def test_answers_end_with_the_turn(folders, language, end):
    """The token that ends an assistant's turn in the chat template stops generation."""
    model, processor = build(str(folders / "clip"), str(folders / language))
    messages = [user("a"), {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]
    assert processor.apply_chat_template(messages).strip().endswith(end)
    assert processor.tokenizer.convert_tokens_to_ids(end) in model.generation_config.eos_token_id
    inputs = encode(processor, [[user(image(0), "a")]])
    assert len(continuation(model, inputs)[0]) == 6


def test_missing_weights_are_an_error(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folders / "clip_vision" / "model.safetensors")
    lost = next(name for name in weights if "layer_norm1.weight" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folders / "clip_vision" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"lacks weights of CLIPVisionModel: .*layer_norm1\.weight"):
        load_vision_tower(str(tmp_path))


def test_image_size(folders):
    model, processor = build(str(folders / "clip"), str(folders / "byte_level"), image_size=64)
    assert image_size_of(processor.image_processor) == (64, 64)
    assert model.config.image_seq_length == 64
    inputs = encode(processor, [[user(image(0), "what is it")]])
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    assert len(continuation(model, inputs)[0]) == 6


@pytest.mark.parametrize(
    ("image_size", "grid"), [(None, (4, 4)), (48, (6, 6)), ({"height": 32, "width": 64}, (4, 8))], ids=str
)
@pytest.mark.parametrize("vision", ["timm", "naflex"])
def test_encoders_whose_image_processor_is_of_another_kind(folders, vision, image_size, grid, tmp_path):
    """timm's cannot be saved, NaFlex' makes patches; a model with one of them is the same when loaded."""
    model, processor = build(str(folders / vision), str(folders / "byte_level"), image_size=image_size)
    inputs = encode(processor, [[user(image(0), "what is it")]])
    assert model.get_vision_features(inputs["pixel_values"])[1] == grid
    assert model.config.image_seq_length == grid[0] * grid[1]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    loaded = encode(AutoProcessor.from_pretrained(tmp_path), [[user(image(0), "what is it")]])
    assert all(torch.equal(value, inputs[name]) for name, value in loaded.items())
    with torch.no_grad():
        assert torch.equal(again(**loaded).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector": "mpl"}, r"unknown projector 'mpl'\. Did you mean 'mlp'"),
        ({"projector": {"type": "average_pool", "num_tokens": 4}}, "Did you mean 'num_image_tokens'"),
        ({"projector": {"type": "pixel_shuffle", "scale_factor": 3}}, "scale_factor 3 .* is 4 x 4"),
        ({"projector": "pixel_shuffle", "vision_feature_select_strategy": "full"}, "no place for class tokens"),
        ({"projector": {"type": "average_pool", "num_image_tokens": 25}}, "grid is 4 x 4"),
        ({"vision_feature_layer": -7}, "vision_feature_layer is -7; this encoder gives 4"),
        (
            {"fusion": "cross_attention", "cross_attention_every": 0},
            "cross_attention_every must be a whole number from 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(folders, options, message):
    with pytest.raises(ValueError, match=message):
        build(str(folders / "clip"), str(folders / "byte_level"), **options)


def test_an_unknown_option_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"unknown option 'feature_layer'\. Did you mean 'vision_feature_layer'"):
        build("/nowhere", "/nowhere", feature_layer=-2)


def test_a_projector_is_its_name_or_its_options(folders):
    named, _ = build(str(folders / "clip"), str(folders / "byte_level"), projector="linear")
    assert named.config.projector == {"type": "linear"}


def test_markers_around_images_are_tokens_of_their_own():
    model, processor = tiny(image_markers=["see <img>", "</img>\n"])
    inputs = encode(processor, [[user("what", image(0), "is it")]])
    ids, tokenizer = inputs["input_ids"][0].tolist(), processor.tokenizer
    first = ids.index(model.config.image_token_id)
    start, end = tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
    assert ids[first - 1] == start
    assert ids[first + 16] == end
    text = "<|im_start|>user\nwhatsee <img>" + "<image>" * 16 + "</img>\nis it<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == text
    assert max(start, end) < model.get_input_embeddings().num_embeddings
