"""Tiny configurations of every family of vision encoder."""

from dataclasses import dataclass
from typing import Any

from transformers import (
    BeitConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    EfficientNetConfig,
    MobileNetV2Config,
    ResNetConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SwinConfig,
    Swinv2Config,
    TimmWrapperConfig,
    ViTConfig,
)

DINO = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
VIT = DINO | {"intermediate_size": 48}
NAFLEX = {key: value for key, value in VIT.items() if key != "image_size"} | {"num_patches": 16}
STAGES = {"hidden_sizes": [8, 16, 24], "depths": [1, 1, 1]}
SWIN = {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
TIMM_SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
TIMM_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}


@dataclass
class Case:
    """A configuration, a side in pixels that it takes, its stride, and its class, distillation and register tokens."""

    config: Any
    side: int
    stride: int
    num_prefix: int = 0


def timm(architecture, side, stride, num_prefix=0, **model_args):
    return Case(TimmWrapperConfig(architecture=architecture, model_args=model_args), side, stride, num_prefix)


ENCODERS = {
    "vit": Case(ViTConfig(**VIT), 32, 8, 1),
    "deit": Case(DeiTConfig(**VIT), 32, 8, 2),
    "beit": Case(BeitConfig(**VIT, use_relative_position_bias=True), 32, 8, 1),
    "clip": Case(CLIPVisionConfig(**VIT), 32, 8, 1),
    "blip2": Case(Blip2VisionConfig(**VIT, initializer_range=0.02), 32, 8, 1),
    "siglip": Case(SiglipVisionConfig(**VIT), 32, 8),
    "siglip2_naflex": Case(Siglip2VisionConfig(**NAFLEX), 32, 8),
    "dinov2": Case(Dinov2Config(**DINO), 32, 8, 1),
    "dinov2_registers": Case(Dinov2WithRegistersConfig(**DINO, num_register_tokens=4), 32, 8, 5),
    "dinov3": Case(DINOv3ViTConfig(**VIT, num_register_tokens=4), 32, 8, 5),
    "dinov3_convnext": Case(DINOv3ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1]), 64, 32, 1),
    "swin": Case(SwinConfig(**SWIN), 64, 8),
    "swinv2": Case(Swinv2Config(**SWIN), 64, 8),
    "resnet": Case(ResNetConfig(embedding_size=8, layer_type="basic", **STAGES), 64, 16),
    "efficientnet": Case(
        EfficientNetConfig(
            width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320, image_size=64, initializer_range=0.3
        ),
        64,
        32,
    ),
    "convnext": Case(ConvNextConfig(num_stages=3, image_size=64, **STAGES), 64, 16),
    "mobilenet_v2": Case(MobileNetV2Config(depth_multiplier=0.25, image_size=64), 64, 32),
    "timm_vit": timm("vit_tiny_patch16_224", 32, 8, 1, **TIMM_VIT),
    "timm_deit": timm("deit_tiny_distilled_patch16_224", 32, 8, 2, **TIMM_VIT),
    "timm_beit": timm("beit_base_patch16_224", 32, 8, 1, **TIMM_VIT),
    "timm_clip": timm("vit_base_patch16_clip_224", 32, 8, 1, **TIMM_VIT),
    "timm_siglip": timm("vit_base_patch16_siglip_224", 32, 8, 0, **TIMM_VIT),
    "timm_dinov2": timm("vit_small_patch14_dinov2", 32, 8, 1, **TIMM_VIT),
    "timm_dinov2_registers": timm("vit_small_patch14_reg4_dinov2", 32, 8, 5, **TIMM_VIT),
    "timm_dinov3": timm("vit_small_patch16_dinov3", 32, 8, 5, **TIMM_VIT),
    "timm_eva": timm("eva02_tiny_patch14_224", 32, 8, 1, **TIMM_VIT),
    "timm_swin": timm("swin_tiny_patch4_window7_224", 64, 8, **TIMM_SWIN),
    "timm_swinv2": timm("swinv2_tiny_window8_256", 64, 8, **TIMM_SWIN),
    "timm_resnet": timm("resnet18", 64, 32, channels=[8, 8, 16, 24]),
    "timm_convnext": timm("convnext_tiny", 64, 32, **TIMM_CONVNEXT),
    "timm_efficientnet_lite0": timm("tf_efficientnet_lite0", 64, 32),
    "timm_mobilenet": timm("mobilenetv3_small_050", 64, 32),
}
CALLED = {
    "vit": "ViT",
    "deit": "DeiT",
    "beit": "BEiT",
    "clip": "CLIP-ViT",
    "blip2": "BLIP-2",
    "siglip": "SigLIP",
    "siglip2_naflex": "SigLIP 2 NaFlex",
    "dinov2": "DINOv2",
    "dinov2_registers": "DINOv2 with registers",
    "dinov3": "DINOv3",
    "dinov3_convnext": "DINOv3 ConvNeXt",
    "swin": "Swin",
    "swinv2": "Swin V2",
    "resnet": "ResNet",
    "efficientnet": "EfficientNet",
    "efficientnet_lite0": "EfficientNet",
    "convnext": "ConvNeXt",
    "mobilenet_v2": "MobileNetV2",
    "mobilenet": "MobileNetV3",
    "eva": "EVA-02",
}
"""What papers call them, with no regard to the library."""
