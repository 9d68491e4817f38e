"""A new model from a vision encoder, a language model and the description of a bridge."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vlm.adapters import build_projector
from vlm.configuration import VLMConfig
from vlm.encoder import encode, load_vision_tower
from vlm.modeling import VLMForConditionalGeneration
from vlm.processing import CHAT_TEMPLATE, IMAGE_TOKEN, VLMProcessor, chat_template_for


def build(
    vision: str,
    language: str,
    *,
    projector: dict[str, Any] | str = "mlp",
    fusion: Literal["prefix", "cross_attention", "prefix+cross_attention"] = "prefix",
    cross_attention_every: int = 4,
    vision_feature_layer: int | None = None,
    vision_feature_select_strategy: Literal["default", "full"] = "default",
    image_size: int | None = None,
    chat_template: Literal["auto", "chatml"] = "auto",
    trust_remote_code: bool = False,
) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """Join the encoder `vision` and the decoder `language`, each a folder or a Hub name.

    `image_size` is the side in pixels that images are brought to, the encoder's own by default. `chat_template` is
    `auto`, the language model's own, or `chatml`, plain ChatML turns without a system prompt. Weights are float32.
    """
    vision_tower = load_vision_tower(vision, trust_remote_code=trust_remote_code)
    language_model = AutoModelForCausalLM.from_pretrained(
        language, dtype="float32", trust_remote_code=trust_remote_code
    )
    image_processor = AutoImageProcessor.from_pretrained(vision, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(language, trust_remote_code=trust_remote_code)
    if image_size is not None:
        set_image_size(image_processor, image_size)
    return assemble(
        vision_tower,
        language_model,
        image_processor,
        tokenizer,
        projector=projector,
        fusion=fusion,
        cross_attention_every=cross_attention_every,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        chat_template=chat_template,
    )


def assemble(
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    image_processor: Any,
    tokenizer: Any,
    *,
    projector: dict[str, Any] | str = "mlp",
    fusion: Literal["prefix", "cross_attention", "prefix+cross_attention"] = "prefix",
    cross_attention_every: int = 4,
    vision_feature_layer: int | None = None,
    vision_feature_select_strategy: Literal["default", "full"] = "default",
    chat_template: Literal["auto", "chatml"] = "auto",
) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """As [`build`], from loaded parts. The image token is added to the tokenizer and to the embeddings if need be."""
    spec = {"type": projector} if isinstance(projector, str) else dict(projector)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    num_tokens = count_image_tokens(
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
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=num_tokens if "prefix" in fusion else 1,
    )
    # A nesting configuration resets the attention implementation that each part was loaded with.
    for part, implementation in zip((vision_tower, language_model), attention, strict=True):
        part.config._attn_implementation = implementation
    model = VLMForConditionalGeneration(vlm_config, vision_tower, language_model)
    model.generation_config = language_model.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    template = CHAT_TEMPLATE if chat_template == "chatml" else chat_template_for(tokenizer)
    processor = VLMProcessor(image_processor, tokenizer, template, vlm_config.image_seq_length)
    return model, processor


@torch.no_grad()
def count_image_tokens(
    vision_tower: PreTrainedModel,
    image_processor: Any,
    projector: dict[str, Any],
    *,
    vision_feature_layer: int | None,
    keep_prefix: bool,
) -> int:
    """How many visual tokens an image becomes: a blank one goes through the preprocessing and the encoder."""
    blank = torch.zeros(1, 3, *image_size_of(image_processor), device=vision_tower.device, dtype=vision_tower.dtype)
    features = encode(vision_tower, blank, vision_feature_layer)
    width = features.patches.shape[-1]
    num_prefix = features.prefix.shape[1] if keep_prefix else 0
    return build_projector(projector, width, width).num_tokens(num_prefix, features.grid)


def image_size_of(image_processor: Any) -> tuple[int, int]:
    """`(height, width)` of the pixel values that an image processor makes of any image."""
    pixels = image_processor(torch.zeros(3, 32, 32, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    return tuple(pixels.shape[-2:])


def set_image_size(image_processor: Any, side: int) -> None:
    """Make an image processor bring images to `side` x `side` pixels, by its own rule (resize, then crop if it does)."""
    size = image_processor.size
    image_processor.size = {"shortest_edge": side} if "shortest_edge" in size else {"height": side, "width": side}
    if getattr(image_processor, "crop_size", None):
        image_processor.crop_size = {"height": side, "width": side}
