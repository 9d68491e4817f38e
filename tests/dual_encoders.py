"""Tiny dual encoders of transformers with their processors, by name; `SAVE[name](folder)` writes one."""

from collections.abc import Callable
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from tests.tiny import byte_level_tokenizer, clip_config, image_processor

LENGTH = 24
"""Tokens that a text has at most."""
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = SIZES | {"image_size": 32, "patch_size": 8}


def tokenizer() -> PreTrainedTokenizerFast:
    made = byte_level_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(  # CLIP's vector is that of the first such token
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", made.eos_token_id)]
    )
    return made


def text_sizes() -> dict[str, int]:
    made = tokenizer()
    special = {"bos_token_id": 1, "eos_token_id": made.eos_token_id}
    return SIZES | special | {"vocab_size": len(made), "max_position_embeddings": LENGTH}


def save_clip(folder: Path) -> None:
    config = CLIPConfig(text_config=text_sizes(), vision_config=VISION, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(image_processor(), tokenizer()).save_pretrained(folder)


def save_siglip(folder: Path) -> None:
    model = SiglipModel(SiglipConfig(text_config=text_sizes(), vision_config=VISION))
    model.logit_bias.data.fill_(-3.0)
    model.save_pretrained(folder)
    pixels = SiglipImageProcessor(size={"height": 32, "width": 32})
    VisionTextDualEncoderProcessor(pixels, tokenizer()).save_pretrained(folder)


def save_dual(folder: Path) -> None:
    text = BertConfig(**text_sizes())
    config = VisionTextDualEncoderConfig.from_vision_text_configs(clip_config(), text, projection_dim=16)
    VisionTextDualEncoderModel(config).save_pretrained(folder)
    VisionTextDualEncoderProcessor(image_processor(), tokenizer()).save_pretrained(folder)


SAVE: dict[str, Callable[[Path], None]] = {"clip": save_clip, "siglip": save_siglip, "dual": save_dual}
