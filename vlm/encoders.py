"""`vlm encoders`: families of encoders, and what their default configurations come to. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # heavy
    from transformers import PreTrainedConfig

# SigLIP 2's NaFlex variant (siglip2_vision_model) has as many tokens as `image_size` gives it, and is not among them.
TRANSFORMERS = (
    "resnet", "efficientnet", "mobilenet_v2", "convnext",
    "vit", "deit", "beit", "swin", "swinv2",
    "clip_vision_model", "siglip_vision_model",
    "dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext",
)  # fmt: skip
"""Model types of transformers. SigLIP 2's checkpoints of one size are `siglip_vision_model` too."""

TIMM = (
    "resnet50.a1_in1k",
    "efficientnet_b0.ra_in1k",
    "mobilenetv3_large_100.ra_in1k",
    "convnext_tiny.fb_in1k",
    "vit_base_patch16_224.augreg_in21k",
    "deit_base_patch16_224.fb_in1k",
    "beit_base_patch16_224.in22k_ft_in22k",
    "swin_tiny_patch4_window7_224.ms_in1k",
    "swinv2_tiny_window8_256.ms_in1k",
    "eva02_base_patch14_224.mim_in22k",
    "vit_base_patch16_clip_224.openai",
    "vit_base_patch16_siglip_224.v2_webli",
    "vit_base_patch14_dinov2.lvd142m",
    "vit_base_patch14_reg4_dinov2.lvd142m",
    "vit_base_patch16_dinov3.lvd1689m",
)
"""timm's pretrained models, each on the Hub as `timm/NAME`."""


@dataclass(frozen=True)
class Size:
    """What a configuration comes to: `tokens` patch embeddings of an image, `hidden_size` wide."""

    image_size: int
    tokens: int
    hidden_size: int
    parameters: int


def measure(config: PreTrainedConfig) -> Size:
    """Build the encoder of `config` and run it, both without memory for weights (on PyTorch's meta device), at its own
    image size, or 224 if it has none."""
    import torch
    from transformers import AutoModel

    from vlm.encoder import encode

    with torch.device("meta"), torch.no_grad():
        tower = AutoModel.from_config(config).eval()
        timm_model = getattr(tower, "timm_model", None)
        own = timm_model.pretrained_cfg["input_size"][-1] if timm_model else getattr(config, "image_size", 224)
        patches = encode(tower, torch.zeros(1, 3, own, own)).patches
    tokens, hidden_size = patches.shape[1:]
    return Size(own, tokens, hidden_size, tower.num_parameters())


def _architecture(name: str) -> str:
    """timm's `resnet50.a1_in1k` is the architecture `resnet50` with the weights `a1_in1k`."""
    return name.partition(".")[0]


def run(console: Console) -> None:
    """Print a table of all families."""
    with console.status("building encoders without weights"):
        from transformers import AutoConfig, TimmWrapperConfig

        of_transformers = {name: measure(AutoConfig.for_model(name)) for name in TRANSFORMERS}
        of_timm = {f"timm/{name}": measure(TimmWrapperConfig(architecture=_architecture(name))) for name in TIMM}
    table = Table(box=None, pad_edge=False)
    table.add_column("transformers' model type, or Hub name", no_wrap=True)
    for column in ("pixels", "tokens", "width", "parameters"):
        table.add_column(column, justify="right", no_wrap=True)
    for sizes in (of_transformers, of_timm):
        for name, size in sizes.items():
            numbers = (size.image_size, size.tokens, size.hidden_size)
            table.add_row(name, *map(str, numbers), f"{size.parameters / 1e6:.1f} M")
        table.add_row()
    console.print(table, highlight=False)
    console.print(
        "A model type stands for all checkpoints of that type, which come in other sizes than this, its default one. "
        "More encoders of transformers and of timm work in the same way.",
        highlight=False,
        soft_wrap=True,
    )
