"""A feature file as safetensors reads it: whole, or not there."""

import json

import pytest
import torch
from safetensors import safe_open

from vlm.data import feature_file
from vlm.data.feature_file import FeatureFile
from vlm.errors import UserError

NAMES = [f"photos/{n} ü.png" for n in range(12)]
ABOUT = {"encoder": "eyes"}


def read(path):
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("features"), file.metadata()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (1,)])
def test_safetensors_reads_what_was_written(tmp_path, dtype, shape):
    features = torch.randn(12, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    path = tmp_path / "new" / "f.safetensors"
    with FeatureFile(path, NAMES) as file:
        for start in (0, 5, 10):
            file.write(NAMES[start : start + 5], features[start : start + 5], ABOUT)
        assert not path.exists(), "only when it is whole"
    found, metadata = read(path)
    assert torch.equal(found, features)
    assert found.dtype == dtype
    assert file.shape == features.shape
    assert metadata == {"format": "pt", "encoder": "eyes", "images": json.dumps(NAMES)}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kept", [[11], [0, 3], list(range(1, 12))])
def test_images_may_be_left_out(tmp_path, kept):
    """As names of any length are left out, the header is of any length."""
    features = torch.arange(12.0)[kept, None]
    with FeatureFile(tmp_path / "f", NAMES) as file:
        file.write([NAMES[n] for n in kept], features, ABOUT)
    found, metadata = read(tmp_path / "f")
    assert found[:, 0].tolist() == kept
    assert json.loads(metadata["images"]) == [NAMES[n] for n in kept]
    size = (tmp_path / "f").read_bytes()[:8]
    assert int.from_bytes(size, "little") % 8 == 0, "aligned, as the format asks"


def test_a_view_of_features_is_written_as_it_looks(tmp_path):
    features = torch.randn(4, 6, 5).transpose(1, 2)[:, 1:]
    with FeatureFile(tmp_path / "f", NAMES) as file:
        file.write(NAMES[:4], features, ABOUT)
    assert torch.equal(read(tmp_path / "f")[0], features)


def test_stopped_it_leaves_nothing(tmp_path):
    def stopped():
        with FeatureFile(tmp_path / "f", NAMES) as file:
            file.write(NAMES[:2], torch.zeros(2, 3), ABOUT)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with FeatureFile(tmp_path / "f", NAMES) as file:
        pass
    assert file.shape == ()
    assert not list(tmp_path.iterdir())


def test_names_that_do_not_fit_into_a_header_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_file, "MAX_HEADER", 200)
    with (
        pytest.raises(UserError, match="the names of 12 images do not fit"),
        FeatureFile(tmp_path / "f", NAMES) as file,
    ):
        file.write(NAMES[:2], torch.zeros(2, 3), ABOUT)
    assert not list(tmp_path.iterdir())
