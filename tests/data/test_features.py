"""The feature cache: what was written is read, and nothing else; never another encoder's; whole or not there."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, ResNetConfig

from tests.tiny import clip_config, image_processor
from vlm.data.features import FeatureCache, FeaturesTooLarge, cache_key, stored_bytes

FEATURES = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
NAMES = ["a" * 64, "b" * 64, "c" * 64]


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_what_is_written_is_read(tmp_path):
    cache = FeatureCache(tmp_path / "key")
    assert NAMES[0] not in cache
    cache.write(NAMES, FEATURES, (2, 2))
    for reader in (cache, FeatureCache(tmp_path / "key"), pickle.loads(pickle.dumps(cache))):
        assert reader.grid == (2, 2)
        assert all(torch.equal(reader[name], wanted) for name, wanted in zip(NAMES, FEATURES, strict=True))
        with pytest.raises(KeyError):
            reader["d" * 64]


def test_others_may_read_it_as_far_as_they_may_read_what_is_made_here(tmp_path):
    (tmp_path / "plain").write_text("")
    shard = FeatureCache(tmp_path).write(NAMES, FEATURES, (2, 2))
    assert shard.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_cache_is_sent_to_a_worker_without_its_features(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.write(NAMES, FEATURES.repeat(1, 100, 100), (20, 20))
    assert len(pickle.dumps(cache)) < 1000


@pytest.mark.parametrize(
    ("given", "kept", "size"),
    [(torch.float32, torch.float32, 80), (torch.bfloat16, torch.float16, 40), (torch.float16, torch.float16, 40)],
)
def test_half_a_number_takes_half_the_bytes(tmp_path, given, kept, size):
    features = FEATURES.to(given)
    FeatureCache(tmp_path).write(NAMES, features, (2, 2))
    read = FeatureCache(tmp_path)[NAMES[1]]
    assert read.dtype == kept
    assert torch.equal(read, features[1].to(kept))
    assert read.nbytes == stored_bytes(features) == size


def test_features_too_large_for_half_precision_are_refused(tmp_path):
    with pytest.raises(FeaturesTooLarge, match="do not fit into float16"):
        FeatureCache(tmp_path).write(["a"], torch.full((1, 1, 1), 1e6).bfloat16(), (1, 1))
    assert not list(tmp_path.iterdir())


def test_a_write_that_did_not_come_to_its_end_is_not_there(tmp_path, monkeypatch):
    def killed(self, target):
        raise KeyboardInterrupt

    cache = FeatureCache(tmp_path)
    cache.write(NAMES[:1], FEATURES[:1], (2, 2))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.write(NAMES[1:], FEATURES[1:], (2, 2))
    assert len(list(tmp_path.iterdir())) == 1, "what was written is removed"
    after = FeatureCache(tmp_path)
    assert [name in after for name in NAMES] == [True, False, False]
    after.write(NAMES[1:], FEATURES[1:], (2, 2))
    assert all(name in FeatureCache(tmp_path) for name in NAMES)


@pytest.mark.parametrize("left", [0, 5, 60, -1])
def test_a_file_that_is_cut_off_is_counted_and_not_read(tmp_path, left):
    cache = FeatureCache(tmp_path)
    cut = cache.write(NAMES[:1], FEATURES[:1], (2, 2))
    cache.write(NAMES[1:2], FEATURES[1:2], (2, 2))
    cut.write_bytes(cut.read_bytes()[:left])
    after = FeatureCache(tmp_path)
    after.refresh()
    assert after.damaged == {cut}
    assert NAMES[0] not in after
    assert torch.equal(after[NAMES[1]], FEATURES[1])
    after.write(NAMES[:1], FEATURES[:1], (2, 2))
    assert torch.equal(FeatureCache(tmp_path)[NAMES[0]], FEATURES[0])


def change(path: Path, place: int) -> None:
    """Change one bit of a byte of the features."""
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + place] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("place", [0, 7, 79])
def test_a_changed_bit_is_found(tmp_path, place):
    cache = FeatureCache(tmp_path)
    bad = cache.write(NAMES[:1], FEATURES[:1], (2, 2))
    good = cache.write(NAMES[1:], FEATURES[1:], (2, 2))
    cache.verify(NAMES)
    assert not cache.damaged
    change(bad, place)
    after = FeatureCache(tmp_path)
    after.verify(NAMES)
    after.verify([*NAMES, "unknown"])
    assert after.damaged == {bad}
    assert [name in after for name in NAMES] == [False, True, True]
    after.remove_unusable()
    assert shards(tmp_path) == [good]
    assert torch.equal(after[NAMES[1]], FEATURES[1])


def test_another_grid_is_another_checksum(tmp_path):
    path = FeatureCache(tmp_path).write(NAMES, FEATURES, (1, 4))
    path.write_bytes(path.read_bytes().replace(b"[1, 4]", b"[4, 1]"))
    cache = FeatureCache(tmp_path)
    cache.verify(NAMES)
    assert cache.damaged == {path}


def test_only_what_is_used_is_read(tmp_path):
    cache = FeatureCache(tmp_path)
    bad = cache.write(NAMES[:1], FEATURES[:1], (2, 2))
    cache.write(NAMES[1:], FEATURES[1:], (2, 2))
    change(bad, 0)
    cache = FeatureCache(tmp_path)
    cache.verify(NAMES[1:])
    assert not cache.damaged


def test_a_file_without_a_checksum_is_of_an_earlier_version(tmp_path):
    old = tmp_path / "0.safetensors"
    save_file({"features": FEATURES}, old, metadata={"grid": "[2, 2]", "images": json.dumps(NAMES)})
    cache = FeatureCache(tmp_path)
    assert cache.outdated == {old}
    assert NAMES[0] not in cache
    cache.remove_unusable()
    assert shards(tmp_path) == []


def test_what_is_open_stays_readable_when_the_folder_is_cleared(tmp_path):
    FeatureCache(tmp_path).write(NAMES, FEATURES, (2, 2))
    cache = FeatureCache(tmp_path)
    shards(tmp_path)[0].unlink()
    assert torch.equal(cache[NAMES[2]], FEATURES[2])


WRITER = """
import sys
from pathlib import Path
import torch
from vlm.data.features import FeatureCache
cache = FeatureCache(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(10):
    cache.write(["a", "b"], torch.arange(400000.0).reshape(2, 200, 1000), (10, 20))
"""


@pytest.mark.slow
def test_two_processes_write_the_same_images_while_a_third_one_reads(tmp_path):
    wanted = torch.arange(400000.0).reshape(2, 200, 1000)
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) for _ in range(2)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        seen = FeatureCache(tmp_path)
        assert not seen.damaged, "a file was there before it was whole"
        assert "a" not in seen or torch.equal(seen["a"], wanted[0])
    assert [writer.wait() for writer in writers] == [0, 0]
    for writer in writers:
        writer.stdin.close()
        writer.stdout.close()
    assert len(shards(tmp_path)) == 20
    assert torch.equal(FeatureCache(tmp_path)["b"], wanted[1])
    assert not list(tmp_path.glob("*writing*"))


def tower(**changes):
    torch.manual_seed(0)
    return AutoModel.from_config(clip_config(**changes)).eval()


def test_the_key_changes_with_everything_that_changes_features():
    encoder, processor = tower(), image_processor()
    key = cache_key(encoder, processor, None, "default", "float32")
    assert key == cache_key(tower(), image_processor(), None, "default", "float32")
    assert key != cache_key(encoder, image_processor(48), None, "default", "float32"), "preprocessing"
    assert key != cache_key(encoder, processor, -2, "default", "float32"), "layer"
    assert key != cache_key(encoder, processor, None, "full", "float32"), "tokens kept"
    assert key != cache_key(encoder, processor, None, "default", "bfloat16"), "precision"
    other = tower(hidden_act="gelu")
    other.load_state_dict(encoder.state_dict())
    assert key != cache_key(other, processor, None, "default", "float32"), "equal weights, another activation"
    with torch.no_grad():
        next(encoder.parameters()).flatten()[0] += 1e-3
    assert key != cache_key(encoder, processor, None, "default", "float32"), "weights"


def test_the_key_is_that_of_the_saved_encoder(tmp_path):
    encoder, processor = tower(), image_processor()
    encoder.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert cache_key(encoder, processor) == cache_key(AutoModel.from_pretrained(tmp_path), loaded)


def test_a_batch_norm_encoder_has_a_key_that_its_statistics_change():
    encoder = AutoModel.from_config(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    )
    key = cache_key(encoder, image_processor())
    assert key == cache_key(encoder, image_processor())
    encoder.train()(torch.randn(2, 3, 32, 32))
    assert key != cache_key(encoder, image_processor())


def test_bfloat16_weights_have_a_key():
    assert cache_key(torch.nn.Linear(2, 2).bfloat16(), image_processor())
