"""A new model from a vision encoder, a language model and the description of a bridge."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from vlm.adapters import build_projector
from vlm.configuration import VLMConfig
from vlm.encoder import encode, load_vision_tower, resize_positions
from vlm.image_processors import ImageAspectRatio, ImageSize, image_size_of, load_image_processor
from vlm.loading import load_quietly
from vlm.modeling import VLMForConditionalGeneration
from vlm.processing import CHATML, IMAGE_TOKEN, PLAIN_TURNS, VLMProcessor, chat_template_for, tokens_of
from vlm.vision_towers import VisionTowers, side_by_side


def build(
    vision: str | Sequence[str],
    language: str,
    *,
    projector: dict[str, Any] | str = "mlp",
    fusion: Literal["prefix", "cross_attention", "prefix+cross_attention"] = "prefix",
    cross_attention_every: int = 4,
    cross_attention_layers: list[int] | None = None,
    vision_feature_layer: int | list[int] | None = None,
    vision_feature_select_strategy: Literal["default", "full"] = "default",
    image_size: ImageSize | Sequence[ImageSize] | None = None,
    image_aspect_ratio: ImageAspectRatio = "square",
    chat_template: Literal["auto", "chatml"] = "auto",
    image_markers: Sequence[str] | None = None,
    image_attention: Literal["causal", "bidirectional"] = "causal",
    trust_remote_code: bool = False,
) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """Join the encoder `vision` and the decoder `language`, each a folder or a Hub name; several encoders of a list see
    an image side by side ([`vlm.vision_towers`]).

    `image_size` and `image_aspect_ratio` are those of [`load_vision`]. `chat_template` is `auto`, the language model's
    own, or `chatml`, plain ChatML turns without a system prompt. `image_markers` are written before and after each
    image; what is in angle brackets in them becomes a token. `image_attention` is that of [`VLMConfig`]. Weights are
    float32.

    Raises ValueError for an unknown projector or option, a decoder that has no place for cross-attention, a tokenizer
    without the tokens of the chat template, an image processor whose images differ in size, and encoders whose grids
    differ.
    """
    vision_tower, image_processor = load_vision(
        vision, image_size=image_size, image_aspect_ratio=image_aspect_ratio, trust_remote_code=trust_remote_code
    )
    language_model = load_quietly(AutoModelForCausalLM, language, dtype="float32", trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(language, trust_remote_code=trust_remote_code)
    return assemble(
        vision_tower,
        language_model,
        image_processor,
        tokenizer,
        projector=projector,
        fusion=fusion,
        cross_attention_every=cross_attention_every,
        cross_attention_layers=cross_attention_layers,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        chat_template=chat_template,
        image_markers=image_markers,
        image_attention=image_attention,
    )


def load_vision(
    names: str | Sequence[str],
    *,
    image_size: ImageSize | Sequence[ImageSize] | None = None,
    image_aspect_ratio: ImageAspectRatio = "square",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A vision encoder and its image processor, or several as one.

    `image_size` is the side in pixels that images are brought to, `{"height": ..., "width": ...}`, or a list with one
    for each encoder; None is the encoder's own. `image_aspect_ratio` is `square`, the encoder's own resize and crop, or
    `pad`, which pads to a square with the mean colour. Raises ValueError as [`load_image_processor`].
    """
    names = [names] if isinstance(names, str) else names
    sizes = image_size if isinstance(image_size, list | tuple) else [image_size] * len(names)
    if len(sizes) != len(names):
        raise ValueError(f"image_size has {len(sizes)} sizes for {len(names)} encoders; give each one, or one for all")
    towers = [load_vision_tower(name, trust_remote_code=trust_remote_code) for name in names]
    image_processors = [
        load_image_processor(
            name, image_size=size, image_aspect_ratio=image_aspect_ratio, trust_remote_code=trust_remote_code
        )
        for name, size in zip(names, sizes, strict=True)
    ]
    for tower, image_processor in zip(towers, image_processors, strict=True):
        resize_positions(tower, *image_size_of(image_processor))
    return (towers[0], image_processors[0]) if len(names) == 1 else side_by_side(towers, image_processors)


def assemble(
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    image_processor: Any,
    tokenizer: Any,
    *,
    projector: dict[str, Any] | str = "mlp",
    fusion: Literal["prefix", "cross_attention", "prefix+cross_attention"] = "prefix",
    cross_attention_every: int = 4,
    cross_attention_layers: list[int] | None = None,
    vision_feature_layer: int | list[int] | None = None,
    vision_feature_select_strategy: Literal["default", "full"] = "default",
    chat_template: Literal["auto", "chatml"] = "auto",
    image_markers: Sequence[str] | None = None,
    image_attention: Literal["causal", "bidirectional"] = "causal",
) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """As [`build`], from loaded parts. The image token is added to the tokenizer and to the embeddings if need be."""
    spec = {"type": projector} if isinstance(projector, str) else dict(projector)
    if vision_feature_select_strategy == "full" and isinstance(vision_tower, VisionTowers):
        raise ValueError(
            "vision_feature_select_strategy full is for one encoder: several have no class token in common"
        )
    template = chat_template_for(tokenizer, chatml=chat_template == "chatml", image_markers=image_markers or ("", ""))
    add_image_token(tokenizer, language_model, tokens_of(image_markers or ()))
    num_tokens, width = probe_encoder(
        vision_tower,
        image_processor,
        spec,
        vision_feature_layer=vision_feature_layer,
        keep_prefix=vision_feature_select_strategy == "full",
    )
    attention = [part.config._attn_implementation for part in (vision_tower, language_model)]
    vlm_config = VLMConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        projector=spec,
        fusion=fusion,
        cross_attention_every=cross_attention_every,
        cross_attention_layers=cross_attention_layers,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        vision_hidden_size=width,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=num_tokens if "prefix" in fusion else 1,
        image_attention=image_attention,
    )
    # A nesting configuration resets the attention implementation that each part was loaded with.
    for part, implementation in zip((vision_tower, language_model), attention, strict=True):
        part.config._attn_implementation = implementation
    model = VLMForConditionalGeneration(vlm_config, vision_tower, language_model)
    model.generation_config = generation_config_for(language_model, tokenizer, template)
    processor = VLMProcessor(
        image_processor, tokenizer, template, vlm_config.image_seq_length, image_attention=image_attention
    )
    return model, processor


def add_image_token(tokenizer: Any, language_model: PreTrainedModel, others: Sequence[str] = ()) -> None:
    """Give the tokenizer the image token, `others` and a padding token, and the language model an embedding for each.

    The embeddings that are there stay as they are; new ones are drawn around their mean, so that a token nobody has
    trained is neither likely nor impossible. Raises ValueError if the tokenizer has no token to pad with.
    """
    # Replaced, the tokenizer's other special tokens (`<|im_start|>` ...) would be special no more.
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN, *others]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a padding token nor an end-of-sequence token; set one of them")
        tokenizer.pad_token = tokenizer.eos_token
    embeddings: Any = language_model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # a notice on how new embeddings are drawn, which is as intended
        try:
            language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
        finally:
            logging.set_verbosity(verbosity)


def generation_config_for(language_model: PreTrainedModel, tokenizer: Any, template: str) -> GenerationConfig:
    """The language model's own, made to stop at the end of a turn and never to write the image token."""
    config = copy.deepcopy(language_model.generation_config) or GenerationConfig()
    config.pad_token_id = tokenizer.pad_token_id
    config.suppress_tokens = [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)]
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = [stop for stop in stops if stop is not None] or [tokenizer.eos_token_id]
    if template.endswith(CHATML):
        stops.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    elif template.endswith(PLAIN_TURNS):
        stops.append(tokenizer.eos_token_id)
    config.eos_token_id = list(dict.fromkeys(stops))
    return config


@torch.no_grad()
def probe_encoder(
    vision_tower: PreTrainedModel,
    image_processor: Any,
    projector: dict[str, Any],
    *,
    vision_feature_layer: int | list[int] | None,
    keep_prefix: bool,
) -> tuple[int, int]:
    """How many visual tokens an image becomes, and how wide the encoder's features are.

    Found by running the encoder on a blank image: no configuration says it for every encoder.
    """
    image_size_of(image_processor)  # one for all images, or an error
    blank = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    training = vision_tower.training
    features = encode(vision_tower.eval(), blank.to(vision_tower.device, vision_tower.dtype), vision_feature_layer)
    vision_tower.train(training)
    width = features.patches.shape[-1]
    num_prefix = features.prefix.shape[1] if keep_prefix else 0
    with torch.device("meta"):
        num_tokens: int = build_projector(projector, width, width).num_tokens(num_prefix, features.grid)
    return num_tokens, width
