"""Any vision encoder, one output: patch embeddings, pooled vector, grid.

Shapes: B images, H x W pixels, h x w patches, P prefix tokens (class, registers), D encoder width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.blip_2.configuration_blip_2 import Blip2VisionConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from vlm.loading import load_quietly

# Models of their own that Auto lacks.
AutoModel.register(MllamaVisionConfig, MllamaVisionModel, exist_ok=True)
AutoModel.register(Blip2VisionConfig, Blip2VisionModel, exist_ok=True)

HALVES = {
    name: {r"^vision_model\.": ""} for name in ("blip_2_vision_model", "vlm_dual_encoder", "vision-text-dual-encoder")
}
"""Encoders, or whole models, whose vision half transformers does not find: how its weights are called there."""


@dataclass
class VisionFeatures:
    """What an encoder says of a batch of images.

    Attributes:
        patches: `[B, h * w, D]`, row by row from the top left.
        prefix: `[B, P, D]` class and register tokens; P is 0 for encoders that have none.
        pooled: `[B, D']` as the encoder defines it, or None.
        grid: `(h, w)`.
        hidden_states, attentions: those of all layers, where they are asked for.
    """

    patches: Tensor
    prefix: Tensor
    pooled: Tensor | None
    grid: tuple[int, int]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def vision_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision half of a dual encoder's configuration (CLIP, SigLIP); any other configuration as it is."""
    return getattr(config, "vision_config", None) or config


def load_vision_tower(name: str, *, pooled: bool = False, trust_remote_code: bool = False) -> PreTrainedModel:
    """The vision encoder `name`, a folder or a Hub name, without the text half if it has one.

    Raises ValueError if weights are missing; those of its pooling layer only if it is to be `pooled`.
    """
    whole = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    config = vision_config_of(whole)
    return load_quietly(
        AutoModel,
        name,
        pooled=pooled,
        config=config,
        dtype="float32",
        trust_remote_code=trust_remote_code,
        key_mapping=HALVES.get(whole.model_type) or HALVES.get(config.model_type),
    )


def vision_hidden_size(vision_tower: PreTrainedModel) -> int:
    """The width of an encoder's last features, by what it says of itself.

    Raises ValueError if it does not say; then only running it tells ([`encode`]).
    """
    config = vision_tower.config
    if sizes := getattr(config, "hidden_sizes", None):
        return int(sizes[-1])
    timm_model = getattr(vision_tower, "timm_model", None)
    for owner, name in ((config, "hidden_size"), (config, "hidden_dim"), (timm_model, "num_features")):
        if isinstance(size := getattr(owner, name, None), int):
            return size
    raise ValueError(f"{type(vision_tower).__name__} does not say how wide its features are: set vision_hidden_size")


def unsplittable(*parts: PreTrainedModel) -> list[str]:
    """The classes of those `parts` that do not say which of their modules have to be on one device (timm's encoders):
    all of such a part has to."""
    return [type(part).__name__ for part in parts if not part._no_split_modules]


def encode(
    vision_tower: PreTrainedModel,
    pixel_values: Tensor,
    feature_layer: int | Sequence[int] | None = None,
    **options: Any,
) -> VisionFeatures:
    """Run `pixel_values [B, 3, H, W]` through any transformers or timm encoder.

    `feature_layer` picks a hidden state as LLaVA does (before the final norm), several of them concatenated on channels
    if it is a list; None takes `last_hidden_state`. Token encoders lose nothing here: their class and register tokens
    are in `prefix` (except that timm gives none with a `feature_layer`). Feature maps of convolutional encoders are
    flattened row by row. `options` are `output_hidden_states` and `output_attentions`, as in transformers. Raises
    ValueError for a `feature_layer` that the encoder does not have, for several whose grids differ, and for a size that
    the encoder does not take.
    """
    parameters = inspect.signature(vision_tower.forward).parameters
    if "feature_layer" in parameters:  # several encoders side by side, see `vlm.vision_towers`
        features: VisionFeatures = vision_tower(pixel_values, feature_layer=feature_layer, **options)
        return features
    inputs: dict[str, Any] = {"pixel_values": pixel_values}
    wants_states = options.get("output_hidden_states", getattr(vision_tower.config, "output_hidden_states", False))
    if "spatial_shapes" in parameters:
        inputs = _as_patches(pixel_values, vision_tower.config.patch_size)
    elif "aspect_ratio_ids" in parameters:
        inputs = _as_one_tile(pixel_values, vision_tower.config)
    elif "interpolate_pos_encoding" in parameters and _needs_interpolation(vision_tower.config, pixel_values):
        inputs["interpolate_pos_encoding"] = True
    if feature_layer is not None:
        options["output_hidden_states"] = True
    try:
        outputs = vision_tower(**inputs, **options, return_dict=True)
    except AssertionError as error:  # timm's
        raise ValueError(f"{type(vision_tower).__name__} takes images of one size: {error}") from error
    if "aspect_ratio_ids" in inputs:
        outputs.last_hidden_state = outputs.last_hidden_state[:, 0, 0]
    if feature_layer is None:
        states = [_channels_first(vision_tower, outputs.last_hidden_state)]
    else:
        layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
        states = [_layer(outputs.hidden_states, layer) for layer in layers]
    flat = [_flatten(vision_tower, state, pixel_values) for state in states]
    grids = [grid for _, grid in flat]
    if len(set(grids)) > 1:
        sizes = ", ".join(f"{h} x {w}" for h, w in grids)
        raise ValueError(f"vision_feature_layer {feature_layer}: the grids of these layers differ ({sizes})")
    device = flat[-1][0].device  # layers may be on several
    tokens = torch.cat([tokens.to(device) for tokens, _ in flat], dim=-1)
    num_patches = grids[0][0] * grids[0][1]
    pooled = getattr(outputs, "pooler_output", None)
    return VisionFeatures(
        patches=tokens[:, -num_patches:],
        prefix=tokens[:, :-num_patches],
        pooled=pooled.flatten(1) if pooled is not None else None,
        grid=grids[0],
        hidden_states=getattr(outputs, "hidden_states", None) if wants_states else None,
        attentions=getattr(outputs, "attentions", None),
    )


def mllama_feature_layers(vision_tower: PreTrainedModel) -> list[int]:
    """The `feature_layer` of Llama 3.2 Vision for an encoder of any depth: 4, 8, 16, 24, 31 and 32 of 32 layers.

    Raises ValueError for an encoder that does not say how many layers it has.
    """
    depth = getattr(vision_tower.config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise ValueError(
            f"{type(vision_tower).__name__} does not say how many layers it has, and vision_feature_layer mllama is a "
            "share of them: give a list of numbers, or null for its output"
        )
    return sorted({*(max(1, depth * eighths // 8) for eighths in (1, 2, 4, 6)), max(1, depth - 1), depth})


def resize_positions(vision_tower: PreTrainedModel, height: int, width: int) -> None:
    """Let a timm encoder that is made for one size take images of `height` x `width`: timm interpolates its position
    embeddings, and the configuration remembers. Encoders that take any size, and transformers', which interpolate as
    they run, are left as they are."""
    timm_model: Any = getattr(vision_tower, "timm_model", None)
    if not hasattr(timm_model, "set_input_size") or tuple(timm_model.patch_embed.img_size) == (height, width):
        return
    timm_model.set_input_size(img_size=(height, width))
    made_with = {"img_size": (height, width)}
    if windows := getattr(timm_model, "_model_args", {}).get("window_size"):  # Swin's follow the size
        made_with["window_size"] = windows
    vision_tower.config.model_args = {**(vision_tower.config.model_args or {}), **made_with}


def _as_patches(pixel_values: Tensor, patch: int) -> dict[str, Any]:
    """`[B, 3, H, W]` as SigLIP 2's NaFlex variant takes images: patches `[B, h * w, patch * patch * 3]`, none of them
    padding."""
    batch, channels, height, width = pixel_values.shape
    h, w = height // patch, width // patch
    pixels = pixel_values[:, :, : h * patch, : w * patch].reshape(batch, channels, h, patch, w, patch)
    device = pixel_values.device
    return {
        "pixel_values": pixels.permute(0, 2, 4, 3, 5, 1).reshape(batch, h * w, patch * patch * channels),
        "pixel_attention_mask": torch.ones(batch, h * w, dtype=torch.long, device=device),
        "spatial_shapes": torch.tensor([[h, w]] * batch, device=device),
    }


def _as_one_tile(pixel_values: Tensor, config: Any) -> dict[str, Any]:
    """`[B, 3, H, W]` as Llama 3.2 Vision's encoder takes images: each the first of `max_num_tiles` tiles, of which the
    others are padding. Left out they would be missed: the encoder masks them for each other, not for the first.

    Raises ValueError for images of another size than the encoder's.
    """
    if tuple(pixel_values.shape[-2:]) != (config.image_size, config.image_size):
        raise ValueError(f"this encoder takes images of one size, {config.image_size} x {config.image_size} pixels")
    batch, device = len(pixel_values), pixel_values.device
    ratio = 1 + config.supported_aspect_ratios.index([1, 1])
    return {
        "pixel_values": F.pad(pixel_values[:, None, None], (0, 0) * 3 + (0, config.max_num_tiles - 1)),
        "aspect_ratio_ids": torch.full((batch, 1), ratio, device=device),
        "aspect_ratio_mask": F.pad(
            torch.ones(batch, 1, 1, dtype=torch.long, device=device), (0, config.max_num_tiles - 1)
        ),
    }


def _channels_first(vision_tower: PreTrainedModel, hidden: Tensor) -> Tensor:
    """timm's Swin and its kin keep channels last in their final output; every other feature map is `[B, D, h, w]`."""
    channels_last = getattr(getattr(vision_tower, "timm_model", None), "output_fmt", "NCHW") == "NHWC"
    return hidden.permute(0, 3, 1, 2) if hidden.ndim == 4 and channels_last else hidden


def _layer(hidden_states: tuple[Tensor, ...], feature_layer: int) -> Tensor:
    count = len(hidden_states)
    if not -count <= feature_layer < count:
        raise ValueError(f"vision_feature_layer is {feature_layer}; this encoder gives {count} hidden states")
    return hidden_states[feature_layer]


def _needs_interpolation(config: PreTrainedConfig, pixel_values: Tensor) -> bool:
    size = getattr(config, "image_size", None)
    if size is None:
        return False
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return tuple(pixel_values.shape[-2:]) != (height, width)


def _flatten(vision_tower: PreTrainedModel, hidden: Tensor, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Any encoder's hidden state as tokens `[B, P + h * w, D]`, and the grid `(h, w)`."""
    height, width = pixel_values.shape[-2:]
    if hidden.ndim == 4:
        return hidden.flatten(2).transpose(1, 2), (hidden.shape[2], hidden.shape[3])
    num_tokens, config = hidden.shape[1], vision_tower.config
    if (timm_model := getattr(vision_tower, "timm_model", None)) is not None:
        return hidden, _grid_of(num_tokens - getattr(timm_model, "num_prefix_tokens", 0), height, width)
    if hasattr(config, "depths"):  # hierarchical: a stride that doubles at each stage, and no class token,
        num_prefix = 1 if config.model_type == "dinov3_convnext" else 0  # but for the mean that it puts in front
        return hidden, _grid_of(num_tokens - num_prefix, height, width)
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    return hidden, (height // patch, width // patch)


def _grid_of(num_patches: int, height: int, width: int) -> tuple[int, int]:
    """The grid of `num_patches` with the image's own aspect. Raises ValueError if there is none."""
    h = round(math.sqrt(num_patches * height / width))
    if h == 0 or num_patches % h:
        raise ValueError(f"cannot lay out {num_patches} patch embeddings on a {height} x {width} image")
    return h, num_patches // h
