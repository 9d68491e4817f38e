"""A dual encoder of any two encoders: against transformers' own, poolings by hand, saved and loaded, in a bridge."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPModel,
    VisionTextDualEncoderModel,
)

from tests.dual_encoders import SAVE, save_clip, save_dual, text_sizes, tokenizer
from tests.encoders import ENCODERS
from tests.stock import stock
from tests.tiny import image, image_processor
from vlm.build import load_vision
from vlm.dual_encoder import DualEncoderConfig, build_dual_encoder, is_dual_encoder, pool_text
from vlm.embedding import load_embedder, unit

TEXTS = ["a cat", "a dog and a cat on the street", "2"]


def save_text(folder):
    torch.manual_seed(1)
    BertModel(BertConfig(**text_sizes())).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def halves(folder):
    """A tiny dual encoder of transformers, and its halves as folders."""
    save_dual(folder / "stock")
    stock = VisionTextDualEncoderModel.from_pretrained(folder / "stock").eval()
    stock.vision_model.save_pretrained(folder / "vision")
    image_processor().save_pretrained(folder / "vision")
    stock.text_model.save_pretrained(folder / "text")
    tokenizer().save_pretrained(folder / "text")
    return stock, str(folder / "vision"), str(folder / "text")


def test_it_is_transformers_dual_encoder_where_both_pool_by_themselves(tmp_path):
    stock, vision, text = halves(tmp_path)
    ours, processor = build_dual_encoder(vision, text, projection_dim=16, text_pooling="pooler")
    assert {name: p.shape for name, p in ours.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
    for name in ("vision_model", "text_model"):  # as they were, before anything is copied
        for mine, its in zip(getattr(ours, name).parameters(), getattr(stock, name).parameters(), strict=True):
            assert torch.equal(mine, its)
    ours.load_state_dict(stock.state_dict())
    inputs = processor(text=TEXTS, images=[image(n) for n in range(3)], return_tensors="pt", padding=True)
    mine, its = ours.eval()(**inputs, return_loss=True), stock(**inputs, return_loss=True)
    torch.testing.assert_close(mine.loss, its.loss)
    torch.testing.assert_close(mine.logits_per_image, its.logits_per_image)
    torch.testing.assert_close(mine.text_embeds, its.text_embeds)


def test_poolings_by_hand_padded_on_either_side():
    states = torch.arange(24.0).reshape(2, 4, 3)
    right, left = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])

    class Read:
        last_hidden_state = states
        pooler_output = None

    assert pool_text(Read, right, "mean").tolist() == [[4.5, 5.5, 6.5], [13.5, 14.5, 15.5]]
    assert pool_text(Read, left, "mean").tolist() == [[4.5, 5.5, 6.5], [19.5, 20.5, 21.5]]
    assert pool_text(Read, right, "cls")[1].tolist() == [12, 13, 14]
    assert pool_text(Read, left, "cls")[1].tolist() == [18, 19, 20]
    assert pool_text(Read, right, "last")[1].tolist() == [15, 16, 17]
    assert pool_text(Read, left, "last")[1].tolist() == [21, 22, 23]
    with pytest.raises(ValueError, match="choose text_pooling mean, cls or last"):
        pool_text(Read, right, "pooler")


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="text_pooling is one of mean, cls, last, pooler, not 'max'"):
        DualEncoderConfig(text_pooling="max")


@pytest.mark.parametrize("name", ["resnet", "timm_efficientnet_lite0", "swin", "dinov2"])
def test_any_vision_encoder_saved_and_loaded_is_the_same(tmp_path, name):
    side = ENCODERS[name].side
    AutoModel.from_config(ENCODERS[name].config).save_pretrained(tmp_path / "vision")
    crop = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessor(**crop).save_pretrained(tmp_path / "vision")
    text = save_text(tmp_path / "text")
    model, processor = build_dual_encoder(str(tmp_path / "vision"), text, projection_dim=8)
    model.save_pretrained(tmp_path / "run" / "model")
    processor.save_pretrained(tmp_path / "run" / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert type(loaded) is type(model)
    read = loaded.state_dict()
    assert all(torch.equal(tensor, read[name]) for name, tensor in model.state_dict().items())
    pixels = processor.image_processor(images=[image(0), image(1)], return_tensors="pt")["pixel_values"]
    expected = unit(model.eval().get_image_features(pixels).pooler_output.detach())
    embedder = load_embedder(str(tmp_path / "run"))
    torch.testing.assert_close(embedder.embed_pixels(pixels)[0], expected, rtol=1e-4, atol=1e-5)
    batch = embedder.embed_texts(TEXTS)
    alone = torch.cat([embedder.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-5)
    tower, _ = load_vision(str(tmp_path / "run"), pooled=True)
    assert type(tower) is type(model.vision_model)
    for mine, its in zip(tower.parameters(), model.vision_model.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_its_eye_is_a_vision_encoder(tmp_path, kind):
    stock, vision, text = halves(tmp_path)
    if kind == "ours":
        model, processor = build_dual_encoder(vision, text, projection_dim=16)
        model.save_pretrained(tmp_path / "run" / "model")
        processor.save_pretrained(tmp_path / "run" / "model")
    tower, _ = load_vision(str(tmp_path / ("run" if kind == "ours" else "stock")), pooled=True)
    assert type(tower) is type(stock.vision_model)
    for mine, its in zip(tower.parameters(), stock.vision_model.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_a_clip_begins_with_the_projection_that_it_comes_with(tmp_path):
    SAVE["clip"](tmp_path / "clip")
    stock = CLIPModel.from_pretrained(tmp_path / "clip")
    text = save_text(tmp_path / "text")
    model, _ = build_dual_encoder(str(tmp_path / "clip"), text)
    assert model.config.projection_dim == 16
    assert torch.equal(model.visual_projection.weight, stock.visual_projection.weight)
    pixels = torch.rand(2, 3, 32, 32)
    expected = stock.eval().get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(model.eval().get_image_features(pixels).pooler_output, expected)
    wider, _ = build_dual_encoder(str(tmp_path / "clip"), text, projection_dim=24)
    assert wider.visual_projection.weight.shape[0] == 24
    stock.vision_model.save_pretrained(tmp_path / "eye")  # a CLIP without its projection
    image_processor().save_pretrained(tmp_path / "eye")
    assert build_dual_encoder(str(tmp_path / "eye"), text)[0].config.projection_dim == 512


def test_arguments_are_used_or_refused(tmp_path):
    stock, vision, text = halves(tmp_path)
    ours, processor = build_dual_encoder(vision, text, projection_dim=16, text_pooling="pooler")
    ours.load_state_dict(stock.state_dict())
    inputs = dict(processor(text=TEXTS, images=[image(n) for n in range(3)], return_tensors="pt", padding=True))
    for name in ("position", "output_attentions", "pixel_value"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            ours(**inputs, **{name: None})
    with pytest.raises(TypeError, match="unexpected keyword argument 'a'"):
        ours.get_image_features(inputs["pixel_values"], a=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'a'"):
        ours.get_text_features(inputs["input_ids"], a=1)
    types = torch.arange(inputs["input_ids"].shape[1]).gt(2).long().expand_as(inputs["input_ids"])
    inputs["token_type_ids"] = types
    with torch.no_grad():
        mine, its = ours.eval()(**inputs), stock(**inputs)
        torch.testing.assert_close(mine.text_embeds, its.text_embeds)
        untyped = ours(**{**inputs, "token_type_ids": torch.zeros_like(types)}).text_embeds
        assert not torch.allclose(mine.text_embeds, untyped, atol=1e-4)
        loss, *rest = ours(**inputs, return_loss=True, return_dict=False)
    assert loss == ours(**inputs, return_loss=True).loss
    assert torch.equal(rest[0], mine.logits_per_image)


def test_a_saved_clip_is_a_dual_encoder_and_a_model_that_writes_is_none(tmp_path):
    """BLIP's configuration is also that of a model with vectors of images and texts."""
    save_clip(tmp_path / "clip")
    for family in ("blip", "blip-2", "llava"):
        stock(family)[0].save_pretrained(tmp_path / family)
    dual = {path.name for path in tmp_path.iterdir() if is_dual_encoder(AutoConfig.from_pretrained(path))}
    assert dual == {"clip"}
