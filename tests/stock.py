"""Tiny vision-language models of transformers with their own processors, random weights, made here in moments."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.tiny import byte_level_tokenizer, clip_config, image_processor, text_config

SIGLIP = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,
}


def chat_template(image: str) -> str:
    """As theirs: the content is a list of parts; an image part becomes `image`."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + image + "' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def tokenizer_with(image: str, *others: str, **named: str) -> Any:
    tokenizer = byte_level_tokenizer(chat_template(image))
    tokens = [image, *others, *named.values()]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    for name, token in named.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def decoder(tokenizer: Any, name: str = "llama", **changes: Any) -> Any:
    return text_config(name, 2, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **changes)


def llava(**changes: Any) -> tuple[Any, Any]:
    tokenizer = tokenizer_with("<image>")
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config=decoder(tokenizer, **changes),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    options: dict[str, Any] = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    options |= {"num_additional_image_tokens": 1, "chat_template": tokenizer.chat_template}
    return LlavaForConditionalGeneration(config), LlavaProcessor(image_processor(), tokenizer, **options)


def _idefics3_like(model: Any, config: Any) -> tuple[Any, Any]:
    rows = [f"<row_{i + 1}_col_{j + 1}>" for i in range(3) for j in range(3)]
    tokenizer = tokenizer_with(
        "<image>", "<global-img>", *rows, fake_image_token="<fake_token_around_image>", end_of_utterance_token="<end>"
    )
    tokenizer.image_token, tokenizer.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
    tokenizer.global_image_token = "<global-img>"
    made = config(
        vision_config=SIGLIP,
        text_config=decoder(tokenizer),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    # An image of 40 x 36 is cut into 2 x 2 tiles and shown whole besides: five images of four tokens.
    pictures = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    template = tokenizer.chat_template
    return model(made), Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=template)


def idefics3() -> tuple[Any, Any]:
    return _idefics3_like(Idefics3ForConditionalGeneration, Idefics3Config)


def smolvlm() -> tuple[Any, Any]:
    """With the processor of its first version, which is that of Idefics3; its own needs another package."""
    return _idefics3_like(SmolVLMForConditionalGeneration, SmolVLMConfig)


def gemma3(sliding_window: int = 24) -> tuple[Any, Any]:
    """Image tokens see each other both ways; every second layer looks back `sliding_window` tokens."""
    tokenizer = tokenizer_with(
        "<start_of_image>", boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    config = Gemma3Config(
        vision_config=SIGLIP | {"vision_use_head": False, "model_type": "siglip_vision_model"},
        text_config=decoder(tokenizer, "gemma3", sliding_window=sliding_window),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        initializer_range=0.2,
    )
    pictures = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    processor = Gemma3Processor(pictures, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model, processor


def qwen2_vl() -> tuple[Any, Any]:
    """Positions of its own: rotary embeddings in three directions (M-RoPE)."""
    tokenizer = tokenizer_with(
        "<|vision_start|><|image_pad|><|vision_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>"
    )
    tokens = ["<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    identity = tokenizer.convert_tokens_to_ids
    text = decoder(tokenizer, "qwen2").to_dict()
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    config = Qwen2VLConfig(
        text_config={k: v for k, v in text.items() if k not in ("model_type", "architectures")},
        vision_config={"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 3, "patch_size": 8, "mlp_ratio": 2},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=identity("<|vision_start|>"),
        vision_end_token_id=identity("<|vision_end|>"),
    )
    pictures = Qwen2VLImageProcessor(patch_size=8, min_pixels=16 * 16, max_pixels=48 * 48)
    processor = Qwen2VLProcessor(pictures, tokenizer, Qwen2VLVideoProcessor(), chat_template=tokenizer.chat_template)
    return Qwen2VLForConditionalGeneration(config), processor


STOCK = {"llava": llava, "idefics3": idefics3, "smolvlm": smolvlm, "gemma3": gemma3, "qwen2_vl": qwen2_vl}


def stock(name: str, **changes: Any) -> tuple[Any, Any]:
    """A model of `STOCK` in evaluation mode, and its processor."""
    torch.manual_seed(0)
    model, processor = STOCK[name](**changes)
    return model.eval(), processor
