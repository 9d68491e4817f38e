"""Random changes to the images of training, by torchvision's transforms v2 under their own names."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

if TYPE_CHECKING:  # heavy
    from PIL import Image
    from torchvision.transforms.v2 import Transform


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class RandomResizedCrop(_Section):
    """A part of the image, brought to the size of the whole."""

    scale: list[float] = [0.5, 1.0]
    """The least and the largest share of the image's area."""
    ratio: list[float] = [3 / 4, 4 / 3]
    """How much the part is narrower or wider than the image, by which it is stretched."""

    @field_validator("scale", "ratio", mode="before")
    @classmethod
    def _range(cls, value: Any, info: ValidationInfo) -> Any:
        most, limit = (1, " of at most 1") if info.field_name == "scale" else (float("inf"), "")
        two = isinstance(value, list) and len(value) == 2 and all(isinstance(number, int | float) for number in value)
        if not two or not 0 < value[0] <= value[1] <= most:
            raise ValueError(f"must be the least and the largest number{limit}, such as [0.75, 1.0], not {value!r}")
        return value


class ColorJitter(_Section):
    """Colours are changed by factors from 1 - x to 1 + x, and hues by up to `hue` of the colour circle."""

    brightness: float = Field(default=0, ge=0)
    contrast: float = Field(default=0, ge=0)
    saturation: float = Field(default=0, ge=0)
    hue: float = Field(default=0, ge=0, le=0.5)


class Augmentation(_Section):
    """Random changes to the images of training, others in each epoch. What is not named is not done."""

    random_resized_crop: RandomResizedCrop | None = None
    """A part of the image in place of the whole: `{scale: [0.5, 1.0]}`, at least half of it."""
    color_jitter: ColorJitter | None = None
    """Other colours: `{brightness: 0.2, contrast: 0.2, saturation: 0.2, hue: 0.02}`."""
    random_horizontal_flip: float = Field(default=0, ge=0, le=1)
    """The share of images that are mirrored. That turns left into right, and letters around."""

    @model_validator(mode="after")
    def _some(self) -> Augmentation:
        if self == Augmentation.model_construct():
            raise ValueError(f"changes nothing; name one of {', '.join(type(self).model_fields)}, or remove it")
        return self

    def __call__(self, image: Image.Image, seed: str) -> Image.Image:
        """The image changed as `seed` has it, in its own size. No random numbers are drawn from anyone else's."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(random.Random(seed).getrandbits(63))
            for transform in self._transforms(*image.size):
                image = transform(image)
        return image

    def _transforms(self, width: int, height: int) -> list[Transform]:
        from torchvision.transforms import InterpolationMode, v2

        transforms: list[Transform] = []
        if crop := self.random_resized_crop:
            ratio = [limit * width / height for limit in crop.ratio]  # torchvision's is that of width to height
            transforms.append(v2.RandomResizedCrop((height, width), crop.scale, ratio, InterpolationMode.BICUBIC))
        if jitter := self.color_jitter:
            transforms.append(v2.ColorJitter(**jitter.model_dump()))
        if self.random_horizontal_flip:
            transforms.append(v2.RandomHorizontalFlip(self.random_horizontal_flip))
        return transforms
