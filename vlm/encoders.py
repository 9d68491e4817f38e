"""`vlm encoders`: families of encoders, and what their default configurations come to. Nothing is downloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModel, PreTrainedConfig, TimmWrapperConfig

from vlm.encoder import encode

TRANSFORMERS = {
    "ResNet": "resnet",
    "EfficientNet": "efficientnet",
    "MobileNetV2": "mobilenet_v2",
    "ConvNeXt": "convnext",
    "ViT": "vit",
    "DeiT": "deit",
    "BEiT": "beit",
    "Swin": "swin",
    "Swin V2": "swinv2",
    "CLIP": "clip_vision_model",
    "SigLIP, SigLIP 2": "siglip_vision_model",
    "SigLIP 2 NaFlex": "siglip2_vision_model",
    "DINOv2": "dinov2",
    "DINOv2 with registers": "dinov2_with_registers",
    "DINOv3": "dinov3_vit",
    "DINOv3 ConvNeXt": "dinov3_convnext",
}
"""Family to the model type of transformers, whose default configuration is taken."""

TIMM = {
    "ResNet": "resnet50",
    "EfficientNet": "efficientnet_b0",
    "MobileNetV3": "mobilenetv3_large_100",
    "ConvNeXt": "convnext_tiny",
    "ViT": "vit_base_patch16_224",
    "DeiT": "deit_base_patch16_224",
    "BEiT": "beit_base_patch16_224",
    "Swin": "swin_tiny_patch4_window7_224",
    "Swin V2": "swinv2_tiny_window8_256",
    "CLIP": "vit_base_patch16_clip_224",
    "SigLIP, SigLIP 2": "vit_base_patch16_siglip_224",
    "DINOv2": "vit_base_patch14_dinov2",
    "DINOv2 with registers": "vit_base_patch14_reg4_dinov2",
    "DINOv3": "vit_base_patch16_dinov3",
    "EVA-02": "eva02_base_patch14_224",
}
"""Family to one of timm's architectures."""


@dataclass(frozen=True)
class Encoder:
    """What a configuration comes to: `tokens` patch embeddings an image, `hidden_size` wide, and `parameters`."""

    family: str
    name: str
    image_size: int
    tokens: int
    hidden_size: int
    parameters: int


@torch.no_grad()
def measure(family: str, config: PreTrainedConfig) -> Encoder:
    """Build the encoder of `config` and run it, both without weights (on PyTorch's meta device)."""
    with torch.device("meta"):
        tower = AutoModel.from_config(config).eval()
        side = _image_size(tower)
        features = encode(tower, torch.zeros(1, 3, side, side))
    return Encoder(
        family=family,
        name=getattr(config, "architecture", config.model_type),
        image_size=side,
        tokens=features.patches.shape[1],
        hidden_size=features.patches.shape[2],
        parameters=sum(parameter.numel() for parameter in tower.parameters()),
    )


def _image_size(tower: torch.nn.Module) -> int:
    if (timm_model := getattr(tower, "timm_model", None)) is not None:
        return int(timm_model.pretrained_cfg["input_size"][-1])
    if patches := getattr(tower.config, "num_patches", None):  # NaFlex: as many patches, in a square
        return math.isqrt(patches) * int(tower.config.patch_size)  # type: ignore[union-attr, arg-type]
    return int(getattr(tower.config, "image_size", 224))


def run(console: Console) -> None:
    """Print a table of all families."""
    configs = [(family, AutoConfig.for_model(kind)) for family, kind in TRANSFORMERS.items()]
    configs += [(family, TimmWrapperConfig(architecture=name)) for family, name in TIMM.items()]
    table = Table(box=None, header_style="bold")
    table.add_column("family")
    table.add_column("model type, or timm's architecture")
    for column in ("pixels", "tokens", "width", "parameters"):
        table.add_column(column, justify="right")
    for family, config in configs:
        found = measure(family, config)
        table.add_row(
            family,
            found.name,
            str(found.image_size),
            str(found.tokens),
            str(found.hidden_size),
            f"{found.parameters / 1e6:.1f} M",
        )
    console.print(table)
    console.print(
        "Checkpoints of a family come in other sizes too. Any other encoder of timm, and any of transformers that gives "
        "image features, can be tried in the same way.",
        highlight=False,
    )
