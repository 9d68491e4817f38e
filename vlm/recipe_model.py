"""The `model` section of a recipe: a whole model, or two and the bridge between them."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from vlm.errors import nearest, shown
from vlm.presets import PRESETS, with_preset
from vlm.recipe_errors import FoundError
from vlm.recipe_source import KeyPath

LARGEST_SIDE = 16_384
"""Pixels; an image of that side takes 3 GB."""

ImageSize = int | dict[Literal["height", "width"], int]


class Section(BaseModel):
    """Keys are known, and values of the type that they say."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Adapter(Section):
    """The bridge between the two models."""

    projector: dict[str, Any] = {"type": "mlp"}
    """Its type, and the options of that type: `mlp`, or `{type: average_pool, num_image_tokens: 49}`."""
    fusion: Literal["prefix", "cross_attention", "prefix+cross_attention"] = "prefix"
    """Visual tokens stand in the sequence, decoder layers attend to them, or both."""
    image_attention: Literal["causal", "bidirectional", "prefix_lm"] = "causal"
    """With `prefix`: tokens of an image see what is before them, as words do, or their whole image too (Gemma 3); with
    `prefix_lm` all that is before the first answer sees all of that, in both directions (PaliGemma)."""
    cross_attention_every: int = Field(default=4, ge=1, le=1000)
    """With cross-attention: one block for every so many decoder layers."""
    cross_attention_block: Literal["flamingo", "idefics"] = "flamingo"
    """Whose block that is."""
    cross_attention_layers: list[int] | Literal["mllama"] | None = None
    """With cross-attention: layers as Llama 3.2 Vision's instead, at these positions among all layers, from 0; `mllama`
    is its own 3, 8, 13 ... to the end of the language model."""
    data_dependent_init: bool = True
    """Before training, fit the projector to the features of some training images and to the size of word embeddings."""

    @field_validator("projector", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"type": value}
        if isinstance(value, dict) and not isinstance(value.get("type"), str):
            raise FoundError([(("type",), "is missing; for example `type: mlp`")])
        return value

    @field_validator("projector")
    @classmethod
    def _known(cls, value: dict[str, Any]) -> dict[str, Any]:
        from vlm.adapters import PROJECTORS, check_options

        kind = value["type"]
        if kind not in PROJECTORS:
            raise ValueError(f"there is no projector '{kind}'; {nearest(kind, PROJECTORS)}")
        options = [*inspect.signature(PROJECTORS[kind]).parameters][2:]  # after the two hidden sizes
        unknown = [key for key in value if key not in ("type", *options)]
        if unknown:
            known = [
                f"{kind} has no such option; {nearest(key, options) if options else 'it has none'}" for key in unknown
            ]
            raise FoundError([((key,), why) for key, why in zip(unknown, known, strict=True)])
        if wrong := check_options(kind, {key: option for key, option in value.items() if key != "type"}):
            raise FoundError([((key,), why) for key, why in wrong.items()])
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> "Adapter":
        if self.cross_attention_layers is None:
            return self
        if self.fusion == "prefix":
            why = "does not go with `fusion: prefix`; choose cross_attention, or remove it"
        elif other := sorted({"cross_attention_every", "cross_attention_block"} - at_default(self)):
            why = f"does not go with `{other[-1]}`, which places blocks of another kind; remove one of them"
        else:
            return self
        raise FoundError([(("cross_attention_layers",), why)])


class Tiling(Section):
    """Images in more detail than the encoder's input has room for: cut into tiles, with a thumbnail of the whole."""

    type: Literal["tiles", "anyres", "idefics3", "internvl"] = "tiles"
    """`tiles` keeps tiles apart, a marker before each; `anyres` puts their tokens together to one grid again, without
    the padding (LLaVA-NeXT); `idefics3` and `internvl` do what Idefics3 and SmolVLM, and InternVL do, to the token."""
    max_tiles: int = Field(default=6, ge=2, le=1000)
    """The most tiles an image is cut into, beside the thumbnail. Each takes the tokens of an image without tiling."""
    grids: list[list[int]] | None = Field(default=None, min_length=1)
    """With `tiles` and `anyres`, the grids to choose from, each [rows, columns]; null: all of at most `max_tiles`
    tiles."""


class Quantization(Section):
    """The language model in 4 or 8 bits while it is trained, in the words of transformers.BitsAndBytesConfig."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = False
    """Quantize the scales too: 0.4 bits a weight less."""
    llm_int8_threshold: float = Field(default=6.0, ge=0)
    """In 8 bits: inputs larger than this are multiplied in half precision."""
    llm_int8_skip_modules: list[str] | None = None
    """Names of layers that stay as they are, such as `[down_proj]`."""

    @model_validator(mode="after")
    def _one_width(self) -> "Quantization":
        if self.load_in_4bit == self.load_in_8bit:
            raise FoundError([(("load_in_4bit",), "set either this or `load_in_8bit` to true")])
        return self

    def to_config(self) -> Any:
        """The transformers.BitsAndBytesConfig."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**self.model_dump())


class Model(Section):
    """Either `pretrained`, a vision-language model as it is, or `vision` and `language`, joined by `adapter`."""

    preset: str | None = None
    """A published model whose bridge is the default of the keys below: `llava`, `flamingo` ... (vlm/presets.py)."""
    pretrained: str | None = None
    """A whole vision-language model to fine-tune: Hub name or folder."""
    vision: str | list[str] | None = None
    """The vision encoder: Hub name (`timm/...` too) or folder. Several, such as `[facebook/dinov2-base,
    google/siglip2-base-patch16-224]`, see each image side by side, as in Prismatic (arXiv 2402.07865)."""
    language: str | None = None
    """The language model: Hub name or folder."""
    adapter: Adapter = Adapter()
    vision_feature_layer: int | list[int] | Literal["mllama"] | None = None
    """Which hidden state of the encoder is read, -2 in LLaVA; null is its output, after its final norm. Several,
    such as `[-2, -8]`, are concatenated on channels; `mllama` is those of Llama 3.2 Vision, which are 4, 8, 16, 24, 31
    and 32 of 32 layers, in the encoder's own depth."""
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    """`default` drops the class and register tokens, `full` keeps them (the names of LLaVA's config)."""
    image_size: ImageSize | list[ImageSize] | None = None
    """Side of the square given to the encoder, in pixels, or `{height: ..., width: ...}`; null is the encoder's own.
    For several encoders one for all, or a list with a side for each."""
    image_aspect_ratio: Literal["square", "pad"] = "square"
    """In LLaVA's words: `square` is the encoder's own way, mostly a resize and a crop; `pad` pads to a square with the
    mean colour, so that nothing is lost at the edges."""
    tiling: Tiling | None = None
    """Cut large images into tiles of that size; null gives the encoder each image as one."""
    chat_template: Literal["auto", "chatml", "paligemma", "blip2"] = "auto"
    """`auto` is the language model's own; `chatml` is plain ChatML turns without a system prompt, which is shorter;
    `paligemma` and `blip2` are the prompts of these models: images, a question, and the answer."""
    image_markers: list[str] | None = Field(default=None, min_length=2, max_length=2)
    """What is written before and after each image, such as `["<img>", "</img>"]`; what is in angle brackets becomes a
    token. Some architectures that a model can be exported to have markers of their own."""
    quantization_config: Quantization | None = None
    """Train through a language model in 4 or 8 bits, which takes less memory (QLoRA, arXiv 2305.14314)."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model from the Hub. Only for a model whose code you have read."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(name := raw.get("preset"), str) or raw.get("pretrained"):
            return raw
        if name not in PRESETS:
            raise FoundError([(("preset",), f"there is none called '{name}'; {nearest(name, PRESETS)}")])
        return with_preset(raw, name)

    @field_validator("vision", "vision_feature_layer", "image_size", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any, info: ValidationInfo) -> Any:
        """In one line, where pydantic would say of each form why it is not that."""
        fits, form = _FORMS[str(info.field_name)]
        if (info.field_name, value) == ("vision_feature_layer", "mllama"):
            return value
        if value is not None and not all(map(fits, value if isinstance(value, list) and value else [value])):
            raise ValueError(f"must be {form}, not {shown(value)}")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> "Model":
        joined = set(type(self).model_fields) - {"pretrained", "quantization_config", "trust_remote_code"}
        if self.pretrained:
            if beside := sorted(joined & self.model_fields_set - at_default(self)):
                why = "does not go with `pretrained`, which is a whole model already; remove one of them"
                raise FoundError([((key,), why) for key in beside])
        elif not (self.vision and self.language):
            gap = [key for key in ("vision", "language") if not getattr(self, key)]
            why = "is missing; a model needs `vision` and `language`, or `pretrained` alone"
            raise FoundError([((key,), why) for key in gap])
        encoders = len(self.encoders)
        found: list[tuple[KeyPath, str]] = []
        if isinstance(self.image_size, list) and len(self.image_size) != encoders:
            why = f"has {len(self.image_size)} sizes, and `vision` names {encoders}; give one for each, or one for all"
            found.append((("image_size",), why))
        if encoders > 1 and self.vision_feature_select_strategy == "full":
            why = "full is for one encoder: several have no class token in common"
            found.append((("vision_feature_select_strategy",), why))
        if self.tiling:
            found += self._beside_tiling(self.tiling)
        if found:
            raise FoundError(found)
        return self

    def _beside_tiling(self, tiling: Tiling) -> list[tuple[KeyPath, str]]:
        found: list[tuple[KeyPath, str]] = []
        if self.image_aspect_ratio == "pad":
            why = "pad does not go with `tiling`, whose tiles are square already; anyres pads the whole image itself"
            found.append((("image_aspect_ratio",), why))
        if tiling.type == "anyres" and self.adapter.fusion == "cross_attention":
            why = "anyres puts tokens in reading order, which `fusion: cross_attention` does not see; choose tiles"
            found.append((("tiling", "type"), why))
        if tiling.type == "idefics3" and tiling.max_tiles < 4:
            why = "idefics3 makes squares of up to `max_tiles`; 4 is the smallest of several tiles"
            found.append((("tiling", "max_tiles"), why))
        if tiling.grids is not None and tiling.type not in ("tiles", "anyres"):
            found.append((("tiling", "grids"), f"does not go with `type: {tiling.type}`, which has a rule of its own"))
        for grid in tiling.grids or ():
            if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] > tiling.max_tiles:
                why = f"each is [rows, columns], of at most `max_tiles` tiles ({tiling.max_tiles}); not {grid}"
                found.append((("tiling", "grids"), why))
        if tiling.type == "anyres" and self.vision_feature_select_strategy == "full":
            why = "full keeps class tokens, which have no place on the grid of `tiling` anyres; choose default"
            found.append((("vision_feature_select_strategy",), why))
        return found

    @property
    def encoders(self) -> list[str]:
        """The names under `vision`."""
        return [self.vision] if isinstance(self.vision, str) else self.vision or []


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_layer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() == {"height", "width"} and all(map(_is_size, value.values()))
    return _is_layer(value) and 0 < value <= LARGEST_SIDE


_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "vision": (_is_name, "a Hub name or a folder, or a list of them"),
    "vision_feature_layer": (_is_layer, "a whole number such as -2, a list of them, or mllama"),
    "image_size": (_is_size, "a side in pixels, {height: ..., width: ...}, or a list with one for each encoder"),
}


def at_default(model: BaseModel) -> set[str]:
    return {key for key, field in type(model).model_fields.items() if getattr(model, key) == field.default}
