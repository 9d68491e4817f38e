"""The benchmark of probes: the mean over splits, and an untrained network whose statistics are measured."""

import pytest
import torch
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperModel

from benchmarks.probe import KS, score, table, untrained
from tests.tiny import image_processor
from vlm.embedding import load_embedder, unit
from vlm.eval.top_k import Share
from vlm.recognition.probes import probe
from vlm.recognition.splits import split


def test_an_accuracy_is_the_mean_over_splits():
    torch.manual_seed(0)
    labels = {str(n): "ab"[n % 2] for n in range(40)}
    features = unit(torch.randn(40, 4) + torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).repeat(20, 1))
    splits = [split(labels, 0.3, seed) for seed in (0, 1)]
    found = score(features, {name: int(name) for name in labels}, splits)
    alone = []
    for seed, parts in enumerate(splits):
        train, test = ([int(name) for name in part] for part in (parts.train, parts.test))
        targets, answers = ([n % 2 for n in part] for part in (train, test))
        probed = probe(features[train], torch.tensor(targets), features[test], torch.tensor(answers), 2, KS, seed=seed)
        alone.append([each.top[1].value for each in probed])
    assert [share.value for share in found.values()] == pytest.approx(
        [sum(pair) / 2 for pair in zip(*alone, strict=True)]
    )
    assert all(share.low < share.value < share.high for share in found.values() if share.value < 1)
    row = table({"tiny": {"linear": Share(0.5, 0.25, 0.75)}}).splitlines()[-1]
    assert row == "| tiny | 0.50 (0.25 to 0.75) |"


def test_untrained_weights_are_new_and_their_statistics_those_of_the_images(tmp_path):
    torch.manual_seed(1)
    config = TimmWrapperConfig(architecture="resnet18", model_args={"channels": [8, 8, 16, 24]})
    trained = TimmWrapperModel(config)
    trained.save_pretrained(tmp_path / "trained")
    image_processor(64).save_pretrained(tmp_path / "trained")
    images = torch.randn(32, 3, 64, 64)
    plain, measured = (
        load_embedder(untrained(tmp_path / "trained", tmp_path / name, pixels)).model.timm_model
        for name, pixels in (("plain", None), ("measured", images))
    )
    assert not torch.equal(plain.conv1.weight, trained.timm_model.conv1.weight)
    assert torch.equal(plain.conv1.weight, measured.conv1.weight)
    assert torch.equal(plain.bn1.running_var, torch.ones(64))
    first = nn.functional.conv2d(images, measured.conv1.weight, stride=2, padding=3)
    torch.testing.assert_close(measured.bn1.running_mean, first.mean(dim=(0, 2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(measured.bn1.running_var, first.var(dim=(0, 2, 3)), atol=1e-4, rtol=1e-4)
