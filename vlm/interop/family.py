"""What transformers' own architectures call the parts that we call otherwise: one description each, read both ways.

LLaVA's                      ours
model.vision_tower           model.vision_tower
model.multi_modal_projector  model.multi_modal_projector
model.language_model         model.language_model
lm_head                      lm_head                      (what the language model calls its output layer)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, SiglipImageProcessor

from vlm.chat_templates import TemplateName, chat_template_for, without_marks
from vlm.encoder import encode
from vlm.errors import UserError
from vlm.image_processors import image_size_of
from vlm.modeling import VLMForConditionalGeneration

# Vision towers whose tensors older files, and those who read them, have under one more name.
OLDER_TOWERS = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class Renamed:
    """A tensor that a stock model calls `name` and holds in another form."""

    name: str
    to_stock: Callable[[Tensor], Tensor]
    from_stock: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Image:
    """What an image becomes in a model of ours.

    Attributes:
        size: `(height, width)` in pixels.
        grid: `(h, w)` patches.
        num_prefix: class and register tokens of the encoder, kept or not.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    num_prefix: int


@torch.no_grad()
def image_of(model: VLMForConditionalGeneration, processor: Any) -> Image:
    """Found by running the encoder on a blank image."""
    size = image_size_of(processor.image_processor)
    tower = model.model.vision_tower
    blank = torch.zeros(1, 3, *size, device=tower.device, dtype=tower.dtype)
    features = encode(tower, blank, model.config.vision_feature_layer)
    return Image(size, features.grid, features.prefix.shape[1])


class Family:
    """One architecture of transformers. The attributes describe it; both directions read them.

    Attributes:
        architecture: name of the class.
        projector: type of the projector of ours that its connector is.
        vision, connector, language: names of the parts in it.
        towers, tower: types of encoder that it has, and what they are called; empty if it takes any.
        tensors: of the projector, our names to its.
        fields: keys of `VLMConfig` to keys of its configuration that mean the same.
        fixed: keys of its configuration that have to be so, since ours computes nothing else.
        image_attention: as in `VLMConfig`.
        image_markers: what its processor writes before and after the tokens of an image.
        prompt: the chat template of ours that writes what its processor writes without one.
        tilings: types of `tiling` that do what its processor does; None is an image that is not cut.
        others: tensors that belong to no part, our names to its.
        into_ours_only: no model of ours becomes one.
        older: how names begin in memory, and in the files that other programs read; transformers reads those too.
    """

    architecture: str
    projector: str
    towers: tuple[str, ...] = ()
    tower = ""
    vision = "model.vision_tower"
    connector = "model.multi_modal_projector"
    language = "model.language_model"
    tensors: Mapping[str, str | Renamed]
    fields: Mapping[str, str] = {"image_token_id": "image_token_id"}
    fixed: Mapping[str, Any] = {}
    image_attention = "causal"
    image_markers: tuple[str, str] = ("", "")
    tilings: tuple[str | None, ...] = (None,)
    prompt: TemplateName | None = None
    others: Mapping[str, str] = {}
    into_ours_only = False
    older: Mapping[str, str] = {
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }

    # --- what the families differ in

    def bridge(self, config: Any) -> dict[str, Any]:
        """The keys of `VLMConfig` that are not among `fields`, from a stock configuration: at least `projector` and
        `image_seq_length`. Raises UserError for one that ours cannot express."""
        raise NotImplementedError

    def own_vision_config(self, config: Any) -> PreTrainedConfig:
        """The configuration of the encoder in a stock one, as an Auto class takes it."""
        return copy.deepcopy(config.vision_config)

    def own_text_config(self, config: Any) -> PreTrainedConfig:
        """The configuration of the language model in a stock one, as it is by itself."""
        text_config = copy.deepcopy(config.text_config)
        text_config.tie_word_embeddings = config.tie_word_embeddings  # where the architecture looks it up
        return text_config

    def whole(self, weights: Mapping[str, Tensor], config: Any) -> Mapping[str, Tensor]:
        """The stock weights with those that ours has as one made one: each of ours is then one of these."""
        return weights

    def settings(self, model: VLMForConditionalGeneration, image: Image) -> dict[str, Any]:
        """The keys of the stock configuration that are not among `fields`. Raises UserError for a model of ours that
        the architecture cannot express."""
        raise NotImplementedError

    def idle(self, model: VLMForConditionalGeneration) -> dict[str, Tensor]:
        """Weights of the stock model that nothing it computes depends on, and that ours lacks."""
        return {}

    def stock_processor(self, config: Any, processor: Any, image: Image) -> Any:
        """The processor of transformers that does what ours does. Raises UserError if there is none."""
        raise NotImplementedError

    def markers(self, tiling: Any) -> tuple[str, str]:
        """`image_markers` of a model with `tiling`."""
        return self.image_markers

    def tiling(self, stock_processor: Any) -> dict[str, Any] | None:
        """The `tiling` of `VLMConfig` that does what a stock processor does, where `bridge` does not say. Raises
        UserError if there is none."""
        return None

    def image_processor(self, stock_processor: Any) -> Any:
        """What makes pixels of an image that is not cut, or of a tile, as a stock processor does."""
        return copy.deepcopy(stock_processor.image_processor)

    def placeholder(self, stock_processor: Any) -> str:
        """What the chat template of a stock processor writes for an image."""
        return stock_processor.image_token

    def vision_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of the vision tower as the architecture wants it."""
        return copy.deepcopy(config)

    def text_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of the language model as the architecture wants it."""
        return copy.deepcopy(config)

    # --- what they share

    def check_output_is_read(self, config: Any) -> None:
        """Raises UserError unless a model of ours reads patches of its encoder's output, after the final norm."""
        if config.vision_feature_layer is not None or config.vision_feature_select_strategy != "default":
            raise UserError(
                f"{self.architecture} reads the patches of its encoder's output: it can be made of a model trained "
                "without vision_feature_layer and with vision_feature_select_strategy: default"
            )

    def check_own_size(self, config: Any, image: Image) -> None:
        """Raises UserError unless images of a model of ours have the size that its encoder was made for."""
        side = config.vision_config.image_size
        if image.size != (side, side):
            raise UserError(
                f"{self.architecture} interpolates no position embeddings: images have to be {side} x {side} pixels, "
                f"as its encoder was made for, and this model's are {image.size[0]} x {image.size[1]}"
            )

    def pixels_of(self, image_processor: Any) -> dict[str, Any]:
        """How an image processor makes numbers of pixels."""
        keys = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_convert_rgb")
        return {key: value for key in keys if (value := getattr(image_processor, key, None)) is not None}

    def resizing(self, image_processor: Any, height: int, width: int) -> SiglipImageProcessor:
        """An image processor that stretches images to a size, with the pixels of another."""
        return SiglipImageProcessor(size={"height": height, "width": width}, **self.pixels_of(image_processor))

    def with_named_tokens(self, tokenizer: Any, named: Mapping[str, str]) -> Any:
        """A copy of a tokenizer that knows tokens by the names that a processor asks for, and keeps them as it is
        saved."""
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer._set_model_specific_special_tokens(dict(named))
        return tokenizer

    def chat_template(self, processor: Any, placeholder: str) -> str:
        """The chat template of a processor of ours, for one that writes `image_markers` around images by itself.

        Raises UserError if ours does not write them.
        """
        markers = self.markers(processor.tiling)
        written = in_template(processor.image_token.join(markers))
        if written not in processor.chat_template:
            raise UserError(
                f"the processor of {self.architecture} writes {markers[0]!r} before an image and {markers[1]!r} after "
                "it; only a model trained so can become one, with "
                f"image_markers: {json.dumps(markers)} under model in its recipe"
            )
        return processor.chat_template.replace(written, in_template(placeholder))

    def check_prompt(self, processor: Any) -> None:
        """Raises UserError unless a processor of ours writes the `prompt`."""
        prompt = self.prompt and chat_template_for(processor.tokenizer, self.prompt)
        if prompt and without_marks(processor.chat_template) != without_marks(prompt):
            raise UserError(
                f"the processor of {self.architecture} writes a prompt of its own and no turns; only a model trained "
                f"with it can become one, with chat_template: {self.prompt} under model in its recipe"
            )

    def check_stock(self, config: Any) -> None:
        """Raises UserError for a stock configuration that ours cannot express."""
        for key, wanted in self.fixed.items():
            if (found := getattr(config, key, wanted)) != wanted:
                raise UserError(f"{key} is {found!r} in this checkpoint; only {wanted!r} can be taken over")

    def check_ours(self, model: VLMForConditionalGeneration) -> None:
        """Raises UserError for a model of ours whose bridge the architecture does not have."""
        config = model.config
        encoder = config.vision_config.model_type
        if encoder == "vision_towers":
            raise UserError(f"this model has several encoders side by side; {self.architecture} has one")
        if self.towers and encoder not in self.towers:
            raise UserError(f"the encoder is {encoder}; {self.architecture} has {self.tower} and no other")
        if config.fusion != "prefix":
            raise UserError(f"fusion is {config.fusion}; {self.architecture} has only prefix")
        if config.projector["type"] != self.projector:
            raise UserError(
                f"the projector is {config.projector['type']}; {self.architecture} has {self.projector} and no other"
            )
        tiling = config.tiling["type"] if config.tiling else None
        if tiling not in self.tilings:
            known = " or ".join(name or "none" for name in self.tilings)
            raise UserError(f"tiling is {tiling or 'none'}; {self.architecture} has {known} and no other")
        if config.image_attention != self.image_attention:
            raise UserError(
                f"image_attention is {config.image_attention}; {self.architecture} has {self.image_attention} and no "
                "other"
            )
        self.check_language_model(model)

    def check_language_model(self, model: VLMForConditionalGeneration) -> None:
        """Raises UserError for a language model whose output layer the architecture has in no such form."""
        if model.config.tie_word_embeddings and not hasattr(model.model.language_model, "embed_tokens"):
            raise UserError(
                f"{self.architecture} can tie its output layer to embed_tokens alone, and "
                f"{type(model.model.language_model).__name__}, whose output layer is tied, has none"
            )
        head: Any = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise UserError(
                f"the output layer of this language model has a bias; {self.architecture} has no place for it"
            )

    def names(self, ours: VLMForConditionalGeneration) -> Iterator[tuple[str, str, Renamed | None]]:
        """Each tensor of ours: its name, its name in the stock model, and how its form changes if it does."""
        base, projector, tower = "model.language_model.", "model.multi_modal_projector.", "model.vision_tower."
        head = ours.get_output_embeddings()
        [head_name] = [name for name, module in ours.named_modules() if module is head]
        for name in ours.state_dict():
            if name.startswith(projector):
                inner = name.removeprefix(projector)
                if not inner.startswith("standardize."):
                    found = self.connector_name(inner)
                    renamed = found if isinstance(found, Renamed) else None
                    yield name, f"{self.connector}.{renamed.name if renamed else found}", renamed
            elif name.startswith(tower):
                yield name, f"{self.vision}.{name.removeprefix(tower)}", None
            elif name.startswith(base):
                yield name, f"{self.language}.{self.decoder_name(name.removeprefix(base), ours.config)}", None
            elif name.startswith(f"{head_name}."):
                yield name, f"lm_head.{name.removeprefix(f'{head_name}.')}", None
            elif name in self.others:
                yield name, self.others[name], None
            else:
                raise UserError(f"{self.architecture} has no place for {name}")

    def connector_name(self, name: str) -> str | Renamed:
        """What a tensor of our projector is called in the connector."""
        return self.tensors[name]

    def decoder_name(self, name: str, config: Any) -> str:
        """What a tensor of the decoder of ours is called in its own."""
        return name

    def file_name(self, name: str, config: Any) -> str:
        """The name that a tensor of the stock model has in a file."""
        for new, old in self.older.items():
            if name.startswith(new):
                between = "vision_model." if new == f"{self.vision}." and self._older_tower(config) else ""
                return old + between + name.removeprefix(new)
        return name

    def _older_tower(self, config: Any) -> bool:
        return config.vision_config.model_type in OLDER_TOWERS

    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.architecture)


def in_template(text: str) -> str:
    """A text as it stands between quotes in a chat template."""
    return repr(text)[1:-1]


def rename(name: str, beginnings: Mapping[str, str]) -> str:
    """`name` with its beginning, one of `beginnings`, replaced; as it is if it begins otherwise."""
    for ours, theirs in beginnings.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def as_config(config_class: type[PreTrainedConfig], config: PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """A configuration of another class that says what `config` does under the keys that both have, and `changes`."""
    known = config_class().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    values = {key: value for key, value in config.to_dict().items() if key in known}
    return config_class(**values | changes)
