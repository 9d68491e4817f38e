"""The feature cache: equal to not having one, never another encoder's, and nothing lost or done twice."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, ResNetConfig

from tests.tiny import clip_config, image, image_processor
from vlm.data.features import FeatureCache, cache_key
from vlm.data.images import ImageError, open_image


class Encoder:
    """A small real encoder that counts what it is given. Half a number is kept in half the bytes."""

    def __init__(self, half=False):
        torch.manual_seed(0)
        self.model = AutoModel.from_config(clip_config()).eval()
        self.processor = image_processor()
        self.half = half
        self.seen = 0

    @torch.no_grad()
    def __call__(self, images):
        self.seen += len(images)
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        features = self.model(pixels).last_hidden_state[:, 1:]
        return (features.half() if self.half else features), (4, 4)


def straight(steps, total):
    return steps


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):  # more than a batch
        image(number, (30 + number, 40)).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(20)]


def uncached(encoder, source):
    return encoder([open_image(source)])[0][0]


@pytest.mark.parametrize("half", [False, True])
def test_cached_equals_uncached(tmp_path, photos, half):
    encoder = Encoder(half)
    cache = FeatureCache(tmp_path / "cache", encoder)
    found = cache.add(photos, straight)
    assert cache.grid == (4, 4)
    for position, source in enumerate(photos):
        kept, wanted = cache[found[position]], uncached(encoder, source)
        assert kept.dtype == wanted.dtype == (torch.float16 if half else torch.float32)
        # The encoder itself differs in the last digit between a batch and a single image.
        assert torch.allclose(kept.float(), wanted.float(), rtol=0, atol=2e-3 if half else 1e-6)
    again, grid = encoder([open_image(source) for source in photos[:16]])
    assert grid == cache.grid
    assert all(torch.equal(cache[found[i]], again[i]) for i in range(16)), "exactly what the encoder said"


def test_a_second_run_encodes_nothing(tmp_path, photos):
    FeatureCache(tmp_path / "cache", first := Encoder()).add(photos, straight)
    again = FeatureCache(tmp_path / "cache", second := Encoder())
    found = again.add([*photos[:3], image(99)], straight)
    assert (first.seen, second.seen) == (20, 1)
    assert again.grid == (4, 4)
    assert all(found[i] in again for i in range(4))


def test_duplicates_are_encoded_once(tmp_path, photos):
    cache = FeatureCache(tmp_path / "cache", encoder := Encoder())
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(photos[0]).read_bytes())
    found = cache.add([photos[0], str(copy), photos[0], Path(photos[0]).read_bytes(), photos[1]], straight)
    assert encoder.seen == 2
    assert len({found[i] for i in range(4)}) == 1


def test_a_broken_image_is_reported_and_the_others_are_kept(tmp_path, photos):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    cache = FeatureCache(tmp_path / "cache", encoder := Encoder())
    found = cache.add([photos[0], str(bad), str(tmp_path / "gone.png"), photos[1], str(bad)], straight)
    assert encoder.seen == 2
    assert [type(found[i]) for i in range(5)] == [str, ImageError, ImageError, str, ImageError]
    assert "bad.png" in str(found[1])
    assert "does not exist" in str(found[2])
    only_broken = FeatureCache(tmp_path / "other", Encoder())
    assert isinstance(only_broken.add([str(bad)], straight)[0], ImageError)
    assert not list((tmp_path / "other").iterdir())


def test_a_crash_half_way_is_harmless(tmp_path, photos, monkeypatch):
    """Killed after each of the files it writes; what is left must neither be believed nor be in the way."""
    folder = tmp_path / "cache"
    cache = FeatureCache(folder, Encoder())
    cache.add(photos[:2], straight)
    whole = {path.name for path in folder.iterdir()}

    rename = Path.rename
    for deadly in (1, 2):
        calls = []

        def killed(self, target, calls=calls, deadly=deadly):
            calls.append(target)
            if len(calls) == deadly:
                raise KeyboardInterrupt
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            with pytest.raises(KeyboardInterrupt):
                FeatureCache(folder, Encoder()).add(photos[2:4], straight)
        (folder / "cut.writing-1").write_bytes(b"\x93NUMPY half")
        after = FeatureCache(folder, encoder := Encoder())
        assert {p.name for p in folder.iterdir()} > whole
        found = after.add(photos[:2], straight)
        assert encoder.seen == 0
        assert all(torch.isfinite(after[found[i]]).all() for i in range(2))
    last = FeatureCache(folder, encoder := Encoder())
    found = last.add(photos[:4], straight)
    assert encoder.seen == 2, "the lost shard is made anew"
    assert torch.allclose(last[found[3]], uncached(encoder, photos[3]), atol=1e-6)


def test_shards_are_written_as_they_fill(tmp_path, photos, monkeypatch):
    monkeypatch.setattr("vlm.data.features.SHARD_IMAGES", 16)
    folder = tmp_path / "cache"
    cache = FeatureCache(folder, Encoder())
    found = cache.add(photos, straight)
    shards = sorted(len(json.loads(path.read_text())["images"]) for path in folder.glob("*.json"))
    assert shards == [4, 16]
    again = FeatureCache(folder, encoder := Encoder())
    assert all(torch.equal(again[found[i]], cache[found[i]]) for i in range(20))
    assert encoder.seen == 0


def test_features_too_large_for_half_precision_are_refused(tmp_path, photos):
    cache = FeatureCache(tmp_path / "cache", lambda images: (torch.full((len(images), 1, 1), 1e6).bfloat16(), (1, 1)))
    with pytest.raises(ValueError, match="do not fit into float16"):
        cache.add(photos[:1], straight)


def test_the_key_changes_with_everything_that_changes_features():
    encoder = Encoder()
    tower, processor = encoder.model, encoder.processor
    key = cache_key(tower, processor, None, "default", False)
    assert key == cache_key(Encoder().model, image_processor(), None, "default", False)
    assert key != cache_key(tower, image_processor(48), None, "default", False), "preprocessing"
    assert key != cache_key(tower, processor, -2, "default", False), "layer"
    assert key != cache_key(tower, processor, None, "full", False), "tokens kept"
    assert key != cache_key(tower, processor, None, "default", True), "precision"
    with torch.no_grad():
        next(tower.parameters()).flatten()[0] += 1e-3
    assert key != cache_key(tower, processor, None, "default", False), "weights"


def test_a_batch_norm_encoder_has_a_key_that_its_statistics_change():
    tower = AutoModel.from_config(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    )
    key = cache_key(tower, image_processor())
    assert key == cache_key(tower, image_processor())
    tower.train()(torch.randn(2, 3, 32, 32))
    assert key != cache_key(tower, image_processor())


def test_bfloat16_weights_have_a_key():
    assert cache_key(torch.nn.Linear(2, 2).bfloat16(), image_processor())


def test_another_image_is_never_a_hit(tmp_path, photos):
    cache = FeatureCache(tmp_path / "cache", Encoder())
    found = cache.add(photos, straight)
    assert len({found[i] for i in range(20)}) == 20
    with pytest.raises(KeyError):
        cache["0" * 64]
