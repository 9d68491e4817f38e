"""The bridges of published models by name: `model: {preset: llava, vision: ..., language: ...}` in a recipe.

A preset is what stands under `model` in a recipe, before the recipe's own keys, which go first.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

BLIP2_QFORMER = {
    "type": "qformer",
    "num_image_tokens": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "cross_attention_frequency": 2,
}

PRESETS: dict[str, dict[str, Any]] = {
    # LLaVA-1.5 (arXiv 2310.03744)
    "llava": {"adapter": {"projector": "mlp"}, "vision_feature_layer": -2, "image_aspect_ratio": "pad"},
    # LLaVA-NeXT (llava-vl.github.io/blog/2024-01-30-llava-next)
    "llava_next": {
        "adapter": {"projector": "mlp"},
        "vision_feature_layer": -2,
        "tiling": {"type": "anyres", "max_tiles": 4, "grids": [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]},
    },
    # Idefics3 (arXiv 2408.12637), with encoders whose grid is a multiple of 2
    "idefics3": {
        "adapter": {"projector": {"type": "pixel_shuffle", "scale_factor": 2}},
        "tiling": {"type": "idefics3", "max_tiles": 16},
    },
    # SmolVLM (arXiv 2504.05299), with encoders whose grid is a multiple of 4
    "smolvlm": {
        "adapter": {"projector": {"type": "pixel_shuffle", "scale_factor": 4}},
        "tiling": {"type": "idefics3", "max_tiles": 16},
    },
    # Idefics (arXiv 2306.16527), after Flamingo
    "idefics": {
        "adapter": {
            "projector": {
                "type": "resampler",
                "variant": "idefics",
                "num_image_tokens": 64,
                "depth": 6,
                "num_heads": 16,
                "head_dim": 96,
            },
            "fusion": "cross_attention",
            "cross_attention_every": 4,
            "cross_attention_block": "idefics",
        },
        "vision_feature_select_strategy": "full",
    },
    # Idefics2 (arXiv 2405.02246)
    "idefics2": {
        "adapter": {
            "projector": {
                "type": "resampler",
                "variant": "idefics2",
                "num_image_tokens": 64,
                "depth": 3,
                "num_heads": 16,
                "head_dim": 96,
                "num_key_value_heads": 4,
            }
        },
    },
    # Flamingo-9B (arXiv 2204.14198)
    "flamingo": {
        "adapter": {
            "projector": {"type": "resampler", "num_image_tokens": 64, "depth": 6, "num_heads": 8},
            "fusion": "cross_attention",
            "cross_attention_every": 4,
        }
    },
    # BLIP-2 (arXiv 2301.12597)
    "blip2": {
        "adapter": {"projector": BLIP2_QFORMER},
        "vision_feature_select_strategy": "full",
        "chat_template": "blip2",
    },
    # InstructBLIP (arXiv 2305.06500)
    "instructblip": {
        "adapter": {"projector": BLIP2_QFORMER | {"use_qformer_text_input": True}},
        "vision_feature_select_strategy": "full",
        "chat_template": "blip2",
    },
    # PaliGemma (arXiv 2407.07726)
    "paligemma": {"adapter": {"projector": "linear", "image_attention": "prefix_lm"}, "chat_template": "paligemma"},
    # Llama 3.2 Vision (arXiv 2407.21783, section 7)
    "mllama": {
        "adapter": {"projector": "linear", "fusion": "cross_attention", "cross_attention_layers": "mllama"},
        "vision_feature_layer": "mllama",
        "vision_feature_select_strategy": "full",
        "tiling": {"type": "tiles", "max_tiles": 4},
    },
    # InternVL 1.5 and later (arXiv 2404.16821)
    "internvl": {
        "adapter": {"projector": {"type": "pixel_shuffle_mlp", "scale_factor": 2}},
        "tiling": {"type": "internvl", "max_tiles": 12},
        "image_markers": ["<img>", "</img>"],
    },
    # Gemma 3 (arXiv 2503.19786)
    "gemma3": {
        "adapter": {
            "projector": {"type": "average_pool", "num_image_tokens": 256},
            "image_attention": "bidirectional",
        },
        "image_markers": ["\n\n<start_of_image>", "<end_of_image>\n\n"],
    },
}


def with_preset(model: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The keys under `model` in a recipe, and those of the preset `name` where the recipe has none. Another projector
    takes the place of the preset's with all its options."""
    return _merged(copy.deepcopy(PRESETS[name]), model)


def _merged(preset: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in own.items():
        before = preset.get(key)
        if isinstance(before, dict) and isinstance(value, Mapping) and value.get("type") in (None, before.get("type")):
            preset[key] = _merged(before, value)
        else:
            preset[key] = value
    return preset
