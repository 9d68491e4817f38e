"""Weights from a checkpoint into a model, none missing and none left over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from vlm.errors import UserError
from vlm.older_adapters import present_adapter
from vlm.training.finite import some
from vlm.training.parts import loose_parameters

LOOSE = "loose_parameters.safetensors"
"""The file of a checkpoint, next to the adapter, with the trained parameters that are in no module that peft saves."""


class WrongWeights(UserError):  # noqa: N818 - named for what is wrong
    """The weights of a checkpoint are not those of the model."""


def load_checkpoint(model: Any, checkpoint: Path) -> None:
    """Load the weights of `checkpoint` into `model`: all of them, or with LoRA the adapter and what is trained with it.

    Trainer loads with `strict=False`, and goes on from the first weights where the names differ.
    Raises WrongWeights if a weight is missing, unknown, or of another shape.
    """
    if not isinstance(model, PeftModel):
        _load_model(model, checkpoint)
        return
    with present_adapter(checkpoint, model) as folder:
        adapter = folder / ADAPTER_SAFE_WEIGHTS_NAME
        name = model.active_adapters[0]
        own = get_peft_model_state_dict(model, adapter_name=name)
        _compare(own, _shapes([adapter]), checkpoint / ADAPTER_SAFE_WEIGHTS_NAME)
        model.load_adapter(str(folder), name, is_trainable=True)
        loose = loose_parameters(model)
        path = folder / LOOSE
        saved = _shapes([path] if path.is_file() else [])
        _compare(loose, saved, checkpoint / LOOSE)
        if saved:
            model.load_state_dict(load_file(path), strict=False)


def _load_model(model: nn.Module, checkpoint: Path) -> None:
    files = _files(checkpoint)
    saved = _shapes(files)
    own = model.state_dict()
    try:
        _compare(own, saved, checkpoint, model)
    except WrongWeights:
        if not (isinstance(model, PreTrainedModel) and (checkpoint / CONFIG_NAME).is_file()):
            raise
        # Older checkpoints have the names that transformers uses on the Hub, which only its own loading translates.
        loaded: Any = type(model).from_pretrained(checkpoint, dtype=torch.float32, output_loading_info=True)
        translated, told = loaded
        if any(told.values()):
            raise
        model.load_state_dict(translated.state_dict())
        return
    for file in files:  # one at a time, to save memory
        model.load_state_dict(load_file(file), strict=False)


def _files(checkpoint: Path) -> list[Path]:
    index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return [checkpoint / SAFE_WEIGHTS_NAME]
    return [
        checkpoint / name for name in sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    ]


def _shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights in safetensors `files`, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        if not path.is_file():
            raise WrongWeights(f"{path} is missing: the checkpoint holds other weights than this recipe trains")
        with safe_open(path, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def _compare(
    own: Mapping[str, Tensor], saved: Mapping[str, tuple[int, ...]], path: Path, model: nn.Module | None = None
) -> None:
    """Raise WrongWeights unless `saved` has the names and shapes of `own`. Of tied weights one is enough; `model` may
    name others that need not be there."""
    there = {_place(own[name]) for name in saved if name in own}
    not_saved = getattr(model, "_keys_to_ignore_on_save", None) or ()
    missing = [name for name in own if name not in saved and _place(own[name]) not in there and name not in not_saved]
    left_over = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unknown = [name for name in saved if name not in own and not any(re.search(each, name) for each in left_over)]
    reshaped = [
        f"{name} {list(shape)} instead of {list(own[name].shape)}"
        for name, shape in saved.items()
        if name in own and shape != tuple(own[name].shape)
    ]
    wrong = {"lacks": missing, "has unknown": unknown, "has other shapes:": reshaped}
    if any(wrong.values()):
        raise WrongWeights(
            f"the weights in {path} are not those of this model: it "
            + ", and ".join(f"{what} {some(names)}" for what, names in wrong.items() if names)
            + ". Use the recipe and the versions of vlm and transformers that it was saved with, or begin anew with "
            "--overwrite"
        )


def _place(tensor: Tensor) -> Any:
    """Equal for two names of one weight, as tied weights have."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)
