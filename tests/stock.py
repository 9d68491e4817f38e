"""Tiny vision-language models of transformers with their own processors, random weights, made here in moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessor,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.stock_prompted import PROMPTED, SIGLIP
from tests.tiny import byte_level_tokenizer, clip_config, image_processor, text_config


def chat_template(image: str) -> str:
    """As theirs: the content is a list of parts; an image part becomes `image`."""
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + image + "' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


def tokenizer_with(image: str, *others: str, **named: str) -> Any:
    """With tokens besides, those in `named` under a name that the tokenizer keeps when it is saved."""
    plain = byte_level_tokenizer(chat_template(image))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        eos_token=plain.eos_token,
        pad_token=plain.pad_token,
        extra_special_tokens=named,
    )
    tokens = ["<|im_start|>", "<|im_end|>", image, *others]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    tokenizer.chat_template = plain.chat_template
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
    named = {"image_token": "<image>", "global_image_token": "<global-img>", "end_of_utterance_token": "<end>"}
    tokenizer = tokenizer_with("<image>", *rows, fake_image_token="<fake_token_around_image>", **named)
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


def llava_next() -> tuple[Any, Any]:
    """An image is cut into tiles by its proportions, and what was padded is taken out again: sizes matter."""
    tokenizer = tokenizer_with("<image>")
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    config = LlavaNextConfig(
        vision_config=clip_config(),
        text_config=decoder(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=16,
    )
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
    )
    options: dict[str, Any] = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    options |= {"num_additional_image_tokens": 1, "chat_template": tokenizer.chat_template}
    return LlavaNextForConditionalGeneration(config), LlavaNextProcessor(pictures, tokenizer, **options)


def llava_onevision() -> tuple[Any, Any]:
    """As LLaVA-NeXT, but where a conversation has several images each is one tile."""
    tokenizer = tokenizer_with("<image>", "<video>")
    pinpoints = [[32, 32], [32, 64], [64, 32], [64, 64]]
    config = LlavaOnevisionConfig(
        vision_config=SIGLIP | {"vision_use_head": False, "model_type": "siglip_vision_model"},
        text_config=decoder(tokenizer, "qwen2"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
    )
    pictures = LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints)
    processor = LlavaOnevisionProcessor(
        pictures,
        tokenizer,
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    """An image is a number of tiles, and as many times four tokens."""
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    tokenizer = tokenizer_with("<IMG_CONTEXT>", context_image_token="<IMG_CONTEXT>", **named)
    vision = {key: value for key, value in SIGLIP.items() if not key.endswith("size")}
    vision |= {"hidden_size": 24, "intermediate_size": 48, "image_size": [32, 32], "patch_size": [8, 8]}
    config = InternVLConfig(
        vision_config=vision,
        text_config=decoder(tokenizer, "qwen2"),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    pictures = GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = InternVLProcessor(
        pictures, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=tokenizer.chat_template
    )
    return InternVLForConditionalGeneration(config), processor


def idefics2() -> tuple[Any, Any]:
    """Images keep their proportions, up to 32 pixels a side; a resampler makes four tokens of each."""
    tokenizer = tokenizer_with("<image>", image_token="<image>", image_boundary_token="<fake_token_around_image>")
    perceiver = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2}
    pictures = Idefics2ImageProcessor(size={"longest_edge": 32, "shortest_edge": 16}, do_image_splitting=False)
    processor = Idefics2Processor(pictures, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template)
    config = Idefics2Config(
        vision_config=SIGLIP,
        text_config=decoder(tokenizer, "mistral", sliding_window=None),
        perceiver_config=perceiver | {"resampler_head_dim": 8, "num_key_value_heads": 2},
        image_token_id=tokenizer.image_token_id,
    )
    return Idefics2ForConditionalGeneration(config), processor


def mllama(image_size: int = 32) -> tuple[Any, Any]:
    """Some layers attend to the images of their row, as `cross_attention_mask` says for each token."""
    tokenizer = tokenizer_with("<|image|>", "<|python_tag|>")
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    text = decoder(tokenizer).to_dict()
    text = {key: text[key] for key in text if key in ("vocab_size", "hidden_size", "intermediate_size")}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    text |= {"cross_attention_layers": [1], "bos_token_id": tokenizer.bos_token_id}
    text["eos_token_id"] = tokenizer.eos_token_id
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4}
    vision |= {"intermediate_size": 48, "image_size": image_size, "patch_size": 8, "max_num_tiles": 2}
    vision |= {"vision_output_dim": 48, "intermediate_layers_indices": [0]}
    vision |= {"supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "initializer_range": 0.2}
    config = MllamaConfig(
        vision_config=vision,
        text_config=text | {"pad_token_id": tokenizer.pad_token_id},
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    pictures = MllamaImageProcessor(size={"height": image_size, "width": image_size}, max_image_tiles=2)
    model = MllamaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("gate"):  # at its start shut, and no image would matter
            torch.nn.init.ones_(parameter)
    return model, MllamaProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)


def _qwen_vl(model: Any, config: Any, processor: Any, videos: Any, **vision: Any) -> tuple[Any, Any]:
    """Positions of its own: rotary embeddings in three directions (M-RoPE)."""
    tokenizer = tokenizer_with(
        "<|vision_start|><|image_pad|><|vision_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>"
    )
    tokens = ["<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    identity = tokenizer.convert_tokens_to_ids
    text = decoder(tokenizer, "qwen2").to_dict()
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    made = config(
        text_config={k: v for k, v in text.items() if k not in ("model_type", "architectures")} | {"head_dim": 8},
        vision_config={"depth": 2, "patch_size": 8, "initializer_range": 0.2} | vision,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=identity("<|vision_start|>"),
        vision_end_token_id=identity("<|vision_end|>"),
    )
    pictures = Qwen2VLImageProcessor(patch_size=8, min_pixels=16 * 16, max_pixels=48 * 48)
    return model(made), processor(pictures, tokenizer, videos, chat_template=tokenizer.chat_template)


def qwen2_vl() -> tuple[Any, Any]:
    vision = {"embed_dim": 24, "hidden_size": 32, "num_heads": 3, "mlp_ratio": 2}
    return _qwen_vl(Qwen2VLForConditionalGeneration, Qwen2VLConfig, Qwen2VLProcessor, Qwen2VLVideoProcessor(), **vision)


def qwen2_5_vl() -> tuple[Any, Any]:
    vision = {"hidden_size": 24, "out_hidden_size": 32, "num_heads": 3, "intermediate_size": 48, "window_size": 32}
    return _qwen_vl(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor(),
        fullatt_block_indexes=[1],
        **vision,
    )


def qwen3_vl() -> tuple[Any, Any]:
    vision = {"hidden_size": 24, "out_hidden_size": 32, "num_heads": 3, "intermediate_size": 48}
    return _qwen_vl(
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor(),
        num_position_embeddings=36,
        deepstack_visual_indexes=[0],
        **vision,
    )


STOCK: dict[str, Callable[..., tuple[Any, Any]]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "smolvlm": smolvlm,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "gemma3": gemma3,
    "internvl": internvl,
    "mllama": mllama,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}


def stock(name: str, **changes: Any) -> tuple[Any, Any]:
    """A model of `STOCK` or `PROMPTED` in evaluation mode, and its processor."""
    torch.manual_seed(0)
    model, processor = (STOCK | PROMPTED)[name](**changes)
    return model.eval(), processor
