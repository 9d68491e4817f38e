"""LoRA that was saved before the model had a base model, under the present names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from vlm.configuration import VLMConfig
from vlm.older_names import present_name

OF_MODULES = ("target_modules", "modules_to_save", "exclude_modules")
"""Keys of an adapter's configuration with names of modules."""


@contextmanager
def present_adapter(folder: Path, model: Any) -> Iterator[Path]:
    """Yield the folder of an adapter of `model` with present names: `folder`, or if its names are older, a copy.

    The copy is temporary. Adapters of models of transformers stay as they are.
    """
    if model.config.model_type != VLMConfig.model_type or not has_older_names(folder):
        yield folder
        return
    with TemporaryDirectory() as scratch:
        copy = Path(scratch) / "adapter"
        copy.mkdir()
        for path in folder.iterdir():
            if path.suffix == ".safetensors":
                save_file({present_name(name): tensor for name, tensor in load_file(path).items()}, copy / path.name)
            elif path.name == ADAPTER_CONFIG_NAME:
                values = _renamed(json.loads(path.read_text(encoding="utf-8")))
                (copy / path.name).write_text(json.dumps(values, indent=2), encoding="utf-8")
            elif path.is_file():
                shutil.copy(path, copy / path.name)
        yield copy


def has_older_names(folder: Path) -> bool:
    """Whether the weights of an adapter have older names."""
    path = folder / ADAPTER_SAFE_WEIGHTS_NAME
    if not path.is_file():
        return False
    with safe_open(path, framework="numpy") as file:
        return any(present_name(name) != name for name in file.keys())  # noqa: SIM118


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of peft with present names of modules."""
    for key in OF_MODULES:
        if isinstance(config.get(key), list):
            config[key] = [present_name(f"{name}.").removesuffix(".") for name in config[key]]
    return config
