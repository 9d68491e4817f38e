"""The sizes of encoders against torchvision's models of the same name, and against weights that are there."""

import pytest
import timm
import torch
from rich.console import Console
from torchvision import models
from transformers import AutoConfig, AutoModel, TimmWrapperConfig

from tests.vlm.test_encoder import ENCODERS
from vlm import encoders
from vlm.encoder import encode
from vlm.encoders import TIMM, measure


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("resnet", "resnet50"),
        ("efficientnet", "efficientnet_b7"),
        ("mobilenet_v2", "mobilenet_v2"),
        ("convnext", "convnext_tiny"),
        ("swin", "swin_t"),
        ("timm/resnet50", "resnet50"),
        ("timm/efficientnet_b0", "efficientnet_b0"),
        ("timm/mobilenetv3_large_100", "mobilenet_v3_large"),
        ("timm/convnext_tiny", "convnext_tiny"),
        ("timm/vit_base_patch16_224", "vit_b_16"),
        ("timm/swin_tiny_patch4_window7_224", "swin_t"),
    ],
)
def test_parameters_are_those_of_torchvision(name, same):
    with torch.device("meta"):
        theirs = models.get_model(same)
    *_, head = (module for module in theirs.modules() if isinstance(module, torch.nn.Linear))
    count = sum(p.numel() for p in theirs.parameters()) - sum(p.numel() for p in head.parameters())
    library, _, architecture = name.rpartition("/")
    config = TimmWrapperConfig(architecture=architecture) if library else AutoConfig.for_model(name)
    assert measure(config).parameters == count


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "dinov2_registers", "resnet", "swin", "timm_resnet"])
def test_sizes_are_those_of_an_encoder_with_weights(name):
    config = ENCODERS[name].config
    found = measure(config)
    tower = AutoModel.from_config(config).eval()
    patches = encode(tower, torch.zeros(1, 3, found.image_size, found.image_size)).patches
    assert (found.tokens, found.hidden_size) == patches.shape[1:]
    assert found.parameters == tower.num_parameters()


@pytest.mark.parametrize("name", TIMM)
def test_timms_names_are_those_of_the_hub(name):
    assert timm.get_pretrained_cfg(name).hf_hub_id == f"timm/{name}"


def test_the_table_has_every_family(capsys, monkeypatch):
    monkeypatch.setattr(encoders, "TRANSFORMERS", ("resnet", "dinov2"))
    monkeypatch.setattr(encoders, "TIMM", ("vit_base_patch16_clip_224.openai", "vit_base_patch14_dinov2.lvd142m"))
    encoders.run(Console(width=80))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    # ViT-B/16: (224 / 16)², DINOv2: (518 / 14)² patches.
    assert ["timm/vit_base_patch16_clip_224.openai", "224", "196", "768", "85.8", "M"] in rows
    assert ["timm/vit_base_patch14_dinov2.lvd142m", "518", "1369", "768", "86.6", "M"] in rows
    assert ["resnet", "224", "49", "2048", "23.5", "M"] in rows
    assert ["dinov2", "224", "256", "768", "85.7", "M"] in rows
