"""Images into the feature cache: what the model itself would say, each image once, the broken ones named."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.tiny import image, tiny
from vlm.data import encoding
from vlm.data.encoding import encode_images, hash_images, keep
from vlm.data.features import FeatureCache
from vlm.data.images import ImageError, image_sha256, open_image


@pytest.fixture(scope="module")
def vlm():
    return tiny()


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):  # more than a batch
        image(number, (30 + number, 40)).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(20)]


def fill(cache, vlm, sources, num_workers=0):
    """Encode what `cache` lacks. Gives what `hash_images` found, the broken images, and how many were encoded."""
    model, processor = vlm
    broken, seen = {}, []

    @torch.no_grad()
    def encode(pixel_values):
        seen.extend(pixel_values)
        return model.get_vision_features(pixel_values)

    found = hash_images(sources)
    missing = {
        sha: source
        for sha, source in zip(found, sources, strict=True)
        if not isinstance(sha, ImageError) and sha not in cache
    }
    batches = encode_images(missing, processor, encode, broken=broken, num_workers=num_workers, hashed=True)
    keep(cache, batches)
    return found, broken, len(seen)


@torch.no_grad()
def direct(vlm, sources):
    model, processor = vlm
    pixels = processor.image_processor([open_image(source) for source in sources], return_tensors="pt")["pixel_values"]
    return model.get_vision_features(pixels)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_kept_features_are_the_models_own(vlm, tmp_path, photos, num_workers):
    found, broken, _ = fill(FeatureCache(tmp_path / "cache"), vlm, photos, num_workers)
    cache = FeatureCache(tmp_path / "cache")
    wanted, grid = direct(vlm, photos[:16])
    assert cache.grid == grid == (4, 4)
    assert not broken
    # Exactly, in the same batch; the encoder differs in the last digit between batches of other sizes.
    assert all(torch.equal(cache[found[i]], wanted[i]) for i in range(16))
    assert all(torch.allclose(cache[found[i]], direct(vlm, [photos[i]])[0][0], atol=1e-5) for i in range(16, 20))
    assert len({found[i] for i in range(20)}) == 20


def test_a_second_run_encodes_nothing(vlm, tmp_path, photos):
    fill(FeatureCache(tmp_path / "cache"), vlm, photos)
    cache = FeatureCache(tmp_path / "cache")
    found, _, count = fill(cache, vlm, [*photos[:3], image(99)])
    assert count == 1
    assert all(sha in cache for sha in found)


def test_a_changed_file_is_another_image(vlm, tmp_path, photos):
    cache = FeatureCache(tmp_path / "cache")
    before, _, _ = fill(cache, vlm, photos[:1])
    image(99).save(photos[0])
    after, _, count = fill(cache, vlm, photos[:1])
    assert count == 1
    assert torch.equal(cache[after[0]], direct(vlm, photos[:1])[0][0])
    assert not torch.equal(cache[after[0]], cache[before[0]])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_changes_before_it_is_encoded_is_not_kept_as_what_it_was(vlm, tmp_path, photos, num_workers):
    """Its features would be found by the bytes that it had, in every later run."""
    model, processor = vlm
    shas = hash_images(photos[:2])
    image(99).save(photos[1])
    broken = {}
    batches = encode_images(
        dict(zip(shas, photos, strict=False)), processor, model.get_vision_features, broken=broken,
        num_workers=num_workers, hashed=True,
    )  # fmt: skip
    with torch.no_grad():
        assert [batch.images for batch in batches] == [shas[:1]]
    assert list(broken) == shas[1:]
    assert str(broken[shas[1]]).startswith(f"{photos[1]}: the image has changed since it was first read; ")


def test_an_image_is_read_decoded_and_encoded_once(vlm, tmp_path, photos, monkeypatch):
    opened, hashed = [], []
    monkeypatch.setattr(
        encoding, "open_image", lambda source, **kw: [opened.append(source), open_image(source, **kw)][1]
    )
    monkeypatch.setattr(encoding, "image_sha256", lambda source: [hashed.append(source), image_sha256(source)][1])
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(photos[0]).read_bytes())
    cache = FeatureCache(tmp_path / "cache")
    found, _, count = fill(cache, vlm, [photos[0], str(copy), photos[0], Path(photos[0]).read_bytes(), photos[1]])
    assert count == len(opened) == 2
    assert len(hashed) == 4
    assert len(set(found[:4])) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_reported_and_the_others_are_kept(vlm, tmp_path, photos, num_workers):
    bad, gone = tmp_path / "bad.png", tmp_path / "gone.png"
    bad.write_bytes(b"not an image")
    cache = FeatureCache(tmp_path / "cache")
    found, broken, count = fill(cache, vlm, [photos[0], str(bad), str(gone), photos[1], str(bad)], num_workers)
    assert count == 2
    assert [type(sha) for sha in found] == [str, str, ImageError, str, str]
    assert "does not exist" in str(found[2])
    assert found[1] == found[4]
    assert list(broken) == [found[1]]
    assert "bad.png: not an image" in str(broken[found[1]])
    assert [sha in cache for sha in (found[0], found[1], found[3])] == [True, False, True]
    assert fill(FeatureCache(tmp_path / "other"), vlm, [str(bad)], num_workers)[2] == 0
    assert not (tmp_path / "other").exists()


def test_shards_are_written_as_they_fill(vlm, tmp_path, photos, monkeypatch):
    monkeypatch.setattr(encoding, "SHARD_IMAGES", 16)
    fill(FeatureCache(tmp_path / "cache"), vlm, photos)
    sizes = []
    for path in (tmp_path / "cache").glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            sizes.append(shard.get_slice("features").get_shape()[0])
    assert sorted(sizes) == [4, 16]


def test_random_numbers_are_as_before(vlm, tmp_path, photos):
    state = torch.get_rng_state()
    fill(FeatureCache(tmp_path / "cache"), vlm, photos, num_workers=1)
    assert torch.equal(torch.get_rng_state(), state)
