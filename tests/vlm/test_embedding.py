"""Vectors of images and texts against the dual encoders of transformers, called directly."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.dual_encoders import LENGTH, SAVE
from tests.tiny import clip_config, image, image_processor
from vlm.embedding import load_embedder, unit
from vlm.errors import UserError

TEXTS = ["a red apple", "two dogs on a hill, one of them asleep in the sun", "a"]


@pytest.fixture(scope="module")
def dual_encoders(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("dual")
    for name, save in SAVE.items():
        save(root / name)
    return root


@torch.no_grad()
@pytest.mark.parametrize("name", SAVE)
def test_vectors_are_the_models_own_one_by_one(dual_encoders, tmp_path, name):
    folder = str(dual_encoders / name)
    embedder = load_embedder(folder)
    model = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    paths = []
    for n in range(3):
        paths.append(str(tmp_path / f"{n}.png"))
        image(n).save(paths[-1])
    (batch,) = embedder.embed_images({path: path for path in paths}, broken={})
    expected = [
        model.get_image_features(
            processor.image_processor(Image.open(path), return_tensors="pt")["pixel_values"]
        ).pooler_output
        for path in paths
    ]
    assert batch.images == paths
    torch.testing.assert_close(batch.features, F.normalize(torch.cat(expected)), atol=1e-5, rtol=0)

    padding = {"padding": "max_length"} if name == "siglip" else {}
    one_by_one = []
    for text in TEXTS:
        tokens = processor.tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH, **padding)
        one_by_one.append(model.get_text_features(**tokens).pooler_output)
    torch.testing.assert_close(embedder.embed_texts(TEXTS), F.normalize(torch.cat(one_by_one)), atol=1e-5, rtol=0)
    assert embedder.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    assert embedder.logit_bias == (-3.0 if name == "siglip" else None)


def test_control_tokens_in_a_text_are_letters(dual_encoders):
    embedder = load_embedder(str(dual_encoders / "clip"))
    cut, whole = embedder.embed_texts(["a<|endoftext|> dog", "a"])  # the first end token is where CLIP looks
    assert (cut - whole).abs().max() > 1e-3


def test_an_image_that_does_not_open_is_named_and_left_out(dual_encoders, tmp_path):
    (tmp_path / "0.png").write_bytes(b"not an image")
    image(0).save(tmp_path / "1.png")
    broken = {}
    images = {name: str(tmp_path / name) for name in ("0.png", "1.png")}
    (batch,) = load_embedder(str(dual_encoders / "clip")).embed_images(images, broken=broken)
    assert batch.images == ["1.png"]
    assert list(broken) == ["0.png"]


def test_an_encoder_alone_has_vectors_of_images_and_refuses_words(tmp_path):
    torch.manual_seed(0)
    model = AutoModel.from_config(clip_config())
    model.save_pretrained(tmp_path / "clip")
    image_processor().save_pretrained(tmp_path / "clip")
    embedder = load_embedder(str(tmp_path / "clip"))
    (batch,) = embedder.embed_images({"a": image(0)}, broken={})
    pixels = image_processor()(image(0), return_tensors="pt")["pixel_values"]
    expected = model.eval()(pixels).pooler_output
    torch.testing.assert_close(batch.features, F.normalize(expected), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="reads no text"):
        embedder.embed_texts(["a cat"])


@pytest.mark.parametrize("size", [1e-20, 1e-30, 1.0, 1e20])
def test_vectors_of_any_size_become_unit_vectors(size):
    """1e-20 is what an untrained convolutional encoder may give; its square is no float32."""
    vectors = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit(vectors * size), vectors / vectors.norm(dim=-1, keepdim=True))
    assert not unit(torch.zeros(1, 8)).any()


def test_what_is_no_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot load .* as an encoder"):
        load_embedder(str(tmp_path))
