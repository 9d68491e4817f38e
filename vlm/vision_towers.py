"""Several encoders side by side as one vision tower, as in Prismatic (arXiv 2402.07865: DINOv2 and SigLIP).

pixel_values [images, 3 * encoders, H, W]   each encoder's own pixels, as its own image processor makes them
    -> vision_towers                        [images, h * w, D_i] each, on one grid
    -> concatenated on channels             [images, h * w, D_1 + D_2 + ...]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BatchFeature, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from vlm.encoder import VisionFeatures, encode, unsplittable
from vlm.image_processors import image_size_of

_OF_THE_FILE = ("image_processor_type", "processor_class")
_CHANGES_AS_IT_IS_SAVED = ("_name_or_path", "architectures", "dtype", "transformers_version")


class VisionTowersConfig(PreTrainedConfig):
    """Configuration of [`VisionTowers`].

    Args:
        vision_configs: the encoders' configurations as dictionaries, each with its `model_type`.
        image_sizes: `[height, width]` of each encoder's pixels.
    """

    model_type = "vision_towers"

    vision_configs: Any = None
    image_sizes: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_configs = [dict(config) for config in self.vision_configs or ()]
        self.image_sizes = [list(size) for size in self.image_sizes or ()]
        super().__post_init__(**kwargs)


class VisionTowers(PreTrainedModel):
    """Encoders whose patch embeddings are concatenated on channels. Class and register tokens are left out: encoders
    have different numbers of them."""

    config_class = VisionTowersConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]  # as every model of transformers has it
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VisionTowersConfig, vision_towers: Sequence[PreTrainedModel] | None = None) -> None:
        attention = config._attn_implementation  # None if nobody chose it
        super().__init__(config)
        configs = [AutoConfig.for_model(**spec) for spec in config.vision_configs]
        towers = vision_towers or [AutoModel.from_config(config) for config in configs]
        for tower in towers:
            if attention in ("eager", "sdpa") or (attention and tower._supports_flash_attn):
                tower.set_attn_implementation(attention)
        self.vision_towers = nn.ModuleList(towers)
        self._no_split_modules = unsplittable(*towers)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, feature_layer: int | Sequence[int] | None = None, **options: Any
    ) -> VisionFeatures:
        """`pixel_values [B, 3 * encoders, H, W]`, smaller images in the top left corner; `feature_layer` and `options`
        as in [`vlm.encoder.encode`], of each encoder. Hidden states and attentions are those of the first encoder, then
        those of the next.

        Raises ValueError for other pixel values, and if the grids differ.
        """
        for name in ("output_hidden_states", "output_attentions"):
            options.setdefault(name, getattr(self.config, name))
        towers: list[Any] = list(self.vision_towers)
        sizes = self.config.image_sizes
        if pixel_values.shape[1] != 3 * len(towers):
            raise ValueError(
                f"{len(towers)} encoders take {3 * len(towers)} channels, not {pixel_values.shape[1]}: let the model's "
                "own processor prepare the images"
            )
        seen = [
            encode(tower, pixels[..., :height, :width], feature_layer, **options)
            for tower, pixels, (height, width) in zip(towers, pixel_values.split(3, dim=1), sizes, strict=True)
        ]
        if len({features.grid for features in seen}) > 1:
            raise ValueError(_different_grids(towers, [features.grid for features in seen], sizes))
        device = seen[0].patches.device  # encoders may be on several
        patches = torch.cat([features.patches.to(device) for features in seen], dim=-1)
        pooled = [features.pooled.to(device) for features in seen if features.pooled is not None]
        return VisionFeatures(
            patches=patches,
            prefix=patches[:, :0],
            pooled=torch.cat(pooled, dim=-1) if len(pooled) == len(towers) else None,
            grid=seen[0].grid,
            hidden_states=_joined(features.hidden_states for features in seen),
            attentions=_joined(features.attentions for features in seen),
        )


def _joined(layers: Iterable[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
    given = [of_encoder for of_encoder in layers if of_encoder is not None]
    return tuple(chain.from_iterable(given)) if given else None


def _different_grids(towers: Sequence[Any], grids: Sequence[tuple[int, int]], sizes: Sequence[Sequence[int]]) -> str:
    said = ", ".join(
        f"{h} x {w} ({type(tower).__name__}, {height} x {width} pixels)"
        for tower, (h, w), (height, width) in zip(towers, grids, sizes, strict=True)
    )
    # Square images on the grid of the first: a patch has as many pixels as now.
    sides = [grids[0][0] * round(height / h) for (h, _), (height, _) in zip(grids, sizes, strict=True)]
    return (
        f"the encoders' grids differ: {said}. Set image_size for each encoder so that they are equal, "
        f"for example image_size: {sides}"
    )


class VisionTowersImageProcessor(BaseImageProcessor):
    """Several image processors, each for its encoder: `pixel_values [images, 3 * encoders, H, W]`, as large as the
    largest; smaller images stand in the top left corner."""

    model_input_names = ["pixel_values"]  # noqa: RUF012 - as in transformers

    def __init__(self, image_processors: Sequence[Any] = (), **kwargs: Any) -> None:
        """Other arguments are options of image processors, set for each that has them."""
        super().__init__(**kwargs)
        self.image_processors = [_image_processor(given) for given in image_processors]
        for name, value in kwargs.items():
            for each in self.image_processors:
                if hasattr(each, name) and name not in _OF_THE_FILE:
                    setattr(each, name, value)

    def preprocess(self, images: Any, *, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """As every image processor; other options go to each of them."""
        made = [p(images, return_tensors="pt", **kwargs)["pixel_values"] for p in self.image_processors]
        height, width = (max(pixels.shape[axis] for pixels in made) for axis in (-2, -1))
        padded = [F.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2])) for pixels in made]
        return BatchFeature({"pixel_values": torch.cat(padded, dim=1)}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"image_processors": [each.to_dict() for each in self.image_processors]}


def _image_processor(given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    image_processor: Any = get_image_processor_class_from_name(given["image_processor_type"])
    return image_processor.from_dict(given)


def side_by_side(
    vision_towers: Sequence[PreTrainedModel], image_processors: Sequence[Any]
) -> tuple[VisionTowers, VisionTowersImageProcessor]:
    """One vision tower and one image processor of several."""
    configs = [tower.config.to_dict() for tower in vision_towers]
    for config in configs:
        for key in _CHANGES_AS_IT_IS_SAVED:
            config.pop(key, None)
    sizes = [image_size_of(image_processor) for image_processor in image_processors]
    both = VisionTowersConfig(vision_configs=configs, image_sizes=sizes)
    return VisionTowers(both, vision_towers), VisionTowersImageProcessor(image_processors)


def register() -> None:
    """Make AutoConfig, AutoModel and AutoImageProcessor know several encoders as one."""
    AutoConfig.register(VisionTowersConfig.model_type, VisionTowersConfig, exist_ok=True)
    AutoModel.register(VisionTowersConfig, VisionTowers, exist_ok=True)
    backends: dict[str, type] = dict.fromkeys(("torchvision", "pil"), VisionTowersImageProcessor)
    AutoImageProcessor.register(VisionTowersConfig, image_processor_classes=backends, exist_ok=True)
