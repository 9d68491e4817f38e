"""Loading a part of a checkpoint without the report that tells the rest apart."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging


def load_quietly(auto_class: Any, name: str, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(name, ...)` without a table of what the checkpoint has beyond the model's weights.

    A vision tower taken out of CLIP leaves the text half and the projection behind, as it should. Weights that are
    *missing* are an error: transformers would make them up and warn. Raises ValueError naming them.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, info = auto_class.from_pretrained(name, output_loading_info=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    # A pooling layer that a checkpoint was saved without (ViT, BEiT, DeiT) is not read here.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        raise ValueError(f"{name} lacks weights of {type(model).__name__}: {', '.join(missing)}")
    return model
