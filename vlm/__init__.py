"""Join any vision encoder to any Hugging Face language model through a small trainable bridge.

Importing this package registers its model with the Auto classes of transformers, so that
`AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained` load what it trained.
"""

from typing import TYPE_CHECKING, Any

from vlm.registration import register_with_transformers

if TYPE_CHECKING:
    from vlm.configuration import VLMConfig
    from vlm.modeling import VLMForConditionalGeneration
    from vlm.processing import VLMProcessor

__version__ = "0.1.0"
__all__ = ["VLMConfig", "VLMForConditionalGeneration", "VLMProcessor"]

_HOMES = {
    "VLMConfig": "vlm.configuration",
    "VLMForConditionalGeneration": "vlm.modeling",
    "VLMProcessor": "vlm.processing",
}

register_with_transformers()


def __getattr__(name: str) -> Any:
    # The classes import torch and transformers, which the command line's help does not wait for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
