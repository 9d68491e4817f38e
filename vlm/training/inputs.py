"""What a model's `forward` is given in training, beside what it is given for inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vlm.data.conversation import IGNORE
from vlm.data.dataset import shifted
from vlm.precision import devices

Inputs = dict[str, Any]


def training_inputs(config: Any, batch: Mapping[str, Any], labels: Tensor) -> Inputs:
    """`batch` with the mask `[B, L]` of the positions that predict a label `[B, L]`: the head runs on them alone, and
    `[B, L, V]` logits never exist."""
    inputs = {**batch, "logits_to_keep": shifted(labels) != IGNORE, "use_cache": False}
    change = OWN_WAYS.get(config.model_type)
    return change(config, inputs) if change else inputs


def scoring_inputs(model: Any, batch: Mapping[str, Any], labels: Tensor) -> Inputs:
    """[`training_inputs`] of a model that may be split over devices. Transformers' models index with `logits_to_keep`
    on the device of the head, where it may not be: they are left to compute all logits."""
    inputs = training_inputs(model.config, batch, labels)
    if len(devices(model)) > 1 and not hasattr(model, "get_vision_features"):
        del inputs["logits_to_keep"]
    return inputs


def _git(config: Any, inputs: Inputs) -> Inputs:
    """GIT puts the patches of the image, and a class token, before the words that it is given."""
    vision = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    return inputs | {"logits_to_keep": F.pad(inputs["logits_to_keep"], (patches, 0), value=False)}


def _blip(config: Any, inputs: Inputs) -> Inputs:
    """BLIP's decoder begins with a token that its tokenizer does not know; its `generate` puts it there as well."""
    ids = inputs["input_ids"].clone()
    ids[:, 0] = config.text_config.bos_token_id
    return inputs | {"input_ids": ids}


OWN_WAYS: dict[str, Callable[[Any, Inputs], Inputs]] = {"blip": _blip, "git": _git}
"""By `config.model_type`: models whose `forward` wants something else in training than others do."""
