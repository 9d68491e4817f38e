"""Where a checkpoint is; loading one without the bar over every weight, and a part of one without the report on the
rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers.utils import logging

from vlm.errors import UserError
from vlm.paths import existing, existing_folder

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SHOWN = 4
"""So many missing weights are named: enough to know what they belong to."""


@dataclass(frozen=True)
class Placement:
    """Where the weights of a model go, and their number format: arguments of `from_pretrained`, as the command line
    takes them. Raises UserError for values that are not valid, or a device that is not there.

    Args:
        device_map: one of `DEVICE_MAPS`, which spread the model over all GPUs, then memory and disk, or one device.
        dtype: one of `DTYPES`.
    """

    device_map: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise UserError(f"dtype {self.dtype!r} is not valid; choose one of {', '.join(DTYPES)}")
        if self.device_map not in (None, *DEVICE_MAPS) and self.device_map not in (valid := _devices()):
            raise UserError(
                f"device_map {self.device_map!r} is not valid here; choose one of {', '.join((*DEVICE_MAPS, *valid))}"
            )

    def options(self) -> dict[str, Any]:
        """The arguments that are given."""
        return {name: value for name, value in vars(self).items() if value is not None}


def _devices() -> list[str]:
    """The devices of this machine by name."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ["cpu"]
    return ["cpu", accelerator.type, *(f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count()))]


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Without the bar of transformers over the weights it reads. The Hub's bars over downloads stay."""
    before = logging.set_tqdm_hook(lambda bar, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def load_quietly(auto_class: Any, name: str, *, pooled: bool = False, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained(name, ...)` without a table of what the checkpoint has beyond the model's weights.

    A vision tower taken out of CLIP leaves the text half and the projection behind, as it should. Weights that are
    *missing* are an error: transformers would make them up and warn. Those of a pooling layer, which some checkpoints
    are saved without (ViT, BEiT, DeiT), are missed only if its output is wanted, `pooled`. Raises ValueError with
    their names.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_loading_bar():
            model, info = auto_class.from_pretrained(name, output_loading_info=True, **kwargs)
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(key for key in info["missing_keys"] if pooled or "pooler" not in key.split("."))
    if missing:
        more = f" and {len(missing) - SHOWN} others" if len(missing) > SHOWN else ""
        raise ValueError(f"{name} lacks weights of {type(model).__name__}: {', '.join(missing[:SHOWN])}{more}")
    return model


def checkpoint_of(name_or_path: str) -> str:
    """The checkpoint inside a run folder; any other folder or Hub name as it is. Raises UserError for a run folder
    without one."""
    folder = existing_folder(name_or_path)
    if folder is None:
        return str(existing(name_or_path) or name_or_path)
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is a run without a finished model: its training did not end. Resume it with --resume."
        )
    return str(folder)
