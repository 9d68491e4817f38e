"""Any vision encoder, one output: patch embeddings, pooled vector, grid.

Shapes: B images, H x W pixels, h x w patches, P prefix tokens (class, registers), D encoder width.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass

from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from vlm.loading import load_quietly


@dataclass
class VisionFeatures:
    """What an encoder says of a batch of images.

    Attributes:
        patches: `[B, h * w, D]`, row by row from the top left.
        prefix: `[B, P, D]` class and register tokens; P is 0 for encoders that have none.
        pooled: `[B, D']` as the encoder defines it, or None.
        grid: `(h, w)`.
    """

    patches: Tensor
    prefix: Tensor
    pooled: Tensor | None
    grid: tuple[int, int]


def vision_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision half of a dual encoder's configuration (CLIP, SigLIP); any other configuration as it is."""
    return getattr(config, "vision_config", None) or config


def load_vision_tower(name: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The vision encoder `name`, a folder or a Hub name, without the text half if it has one."""
    config = vision_config_of(AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
    return load_quietly(AutoModel, name, config=config, dtype="float32", trust_remote_code=trust_remote_code)


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


def encode(vision_tower: PreTrainedModel, pixel_values: Tensor, feature_layer: int | None = None) -> VisionFeatures:
    """Run `pixel_values [B, 3, H, W]` through any transformers or timm encoder.

    `feature_layer` picks a hidden state as LLaVA does (before the final norm); None takes `last_hidden_state`.
    Token encoders lose nothing here: their class and register tokens are in `prefix` (except that timm gives none with
    a `feature_layer`). Feature maps of convolutional encoders are flattened row by row. Raises ValueError for a
    `feature_layer` that the encoder does not have.
    """
    kwargs: dict[str, bool] = {}
    parameters = inspect.signature(vision_tower.forward).parameters
    if feature_layer is not None:
        kwargs["output_hidden_states"] = True
    if "interpolate_pos_encoding" in parameters and _needs_interpolation(vision_tower.config, pixel_values):
        kwargs["interpolate_pos_encoding"] = True
    outputs = vision_tower(pixel_values=pixel_values, return_dict=True, **kwargs)
    hidden = outputs.last_hidden_state if feature_layer is None else _layer(outputs.hidden_states, feature_layer)
    pooled = getattr(outputs, "pooler_output", None)
    # timm's Swin and its kin keep channels last in their final output; every other feature map is [B, D, h, w].
    timm_model = getattr(vision_tower, "timm_model", None)
    if hidden.ndim == 4 and feature_layer is None and getattr(timm_model, "output_fmt", "NCHW") == "NHWC":
        hidden = hidden.permute(0, 3, 1, 2)
    tokens, grid = _flatten(vision_tower, hidden, pixel_values)
    num_patches = grid[0] * grid[1]
    return VisionFeatures(
        patches=tokens[:, -num_patches:],
        prefix=tokens[:, :-num_patches],
        pooled=pooled.flatten(1) if pooled is not None else None,
        grid=grid,
    )


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
    if hasattr(config, "depths"):  # hierarchical (Swin): no class token, a stride that doubles at each stage
        return hidden, _grid_of(num_tokens, height, width)
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    return hidden, (height // patch, width // patch)


def _grid_of(num_patches: int, height: int, width: int) -> tuple[int, int]:
    """The grid of `num_patches` with the image's own aspect. Raises ValueError if there is none."""
    h = round(math.sqrt(num_patches * height / width))
    if h == 0 or num_patches % h:
        raise ValueError(f"cannot lay out {num_patches} patch embeddings on a {height} x {width} image")
    return h, num_patches // h
