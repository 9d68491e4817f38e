"""Where a checkpoint is; loading one without the bar over every weight, and a part of one without the report on the
rest; what is said of one that is damaged."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    logging,
)

from vlm.errors import UserError, cut
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


ANY_MODEL = "a run, a checkpoint folder or a Hub name"
SMALL_FILE = 1_000_000
"""Bytes. Smaller JSON files are read before loading; of a tokenizer only after it has failed."""
READ_BY_TRANSFORMERS = {
    CONFIG_NAME, GENERATION_CONFIG_NAME, PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME,
    "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "adapter_config.json",
}  # fmt: skip
"""JSON files of a checkpoint, each with an object."""


@contextmanager
def reading(name: str, part: str = "weights", *, kind: str = ANY_MODEL) -> Iterator[None]:
    """Turn what goes wrong while `part` of the checkpoint `name` is loaded into a UserError that names the folder, and
    the damaged file if there is one.

    A damaged file can make transformers, tokenizers or torch raise anything. An error that our own code raises without
    meaning to (TypeError, KeyError ...) stays as it is: it is a bug.
    """
    folder = existing_folder(checkpoint_of(name))
    if folder and (found := damage(folder)):
        raise UserError(f"cannot load {name!r} as {kind}: {found}")
    with user_errors(lambda error: _cannot_load(name, part, kind, error)):
        yield


@contextmanager
def user_errors(say: Callable[[Exception], str]) -> Iterator[None]:
    """Turn errors raised within it into a UserError with the message that `say` makes of them, but for bugs of ours and
    memory that ran out."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if not isinstance(error, ValueError | OSError) and (_is_ours(error) or "out of memory" in str(error).lower()):
            raise
        raise UserError(say(error)) from error


def damage(folder: Path, *, whole: bool = False) -> str | None:
    """Say which file of a checkpoint cannot be read, and why; None if all can. With `whole`, large files too.

    Only files that transformers reads are looked at: a repository may hold others, of any content.
    """
    for path in sorted(folder.glob("*.json")):
        if path.name in READ_BY_TRANSFORMERS and (whole or path.stat().st_size <= SMALL_FILE):
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                return f"{path.name} is damaged: {cut(str(error), 200)}"
            if not isinstance(found, dict):
                return f"{path.name} is damaged: it holds a {type(found).__name__} in place of an object with keys"
            is_index = path.name == SAFE_WEIGHTS_INDEX_NAME and not (folder / SAFE_WEIGHTS_NAME).is_file()
            if is_index and (gone := _missing_shard(folder, found)):
                return f"{path.name} {gone}"
    for path in sorted(folder.glob("*.safetensors")) if whole else ():
        try:
            with safe_open(path, framework="numpy"):
                pass
        except Exception as error:  # safetensors has an error of its own, and raises others
            return f"{path.name} is damaged: {error}"
    return None


def _missing_shard(folder: Path, index: dict[str, Any]) -> str | None:
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        return "is damaged: its weight_map does not say which file each weight is in"
    gone = next((name for name in sorted(set(shards.values())) if not (folder / name).is_file()), None)
    return f"names a file that is not there: {gone}" if gone is not None else None


def _cannot_load(name: str, part: str, kind: str, error: Exception) -> str:
    here = "" if existing(name) else " (there is no such folder here)"
    why = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
    folder = existing_folder(checkpoint_of(name))
    found = damage(folder, whole=True) if folder else None
    where = f"{part}: " if folder else ""
    return f"cannot load {name!r}{here} as {kind}: {found or _in_words(why) or where + cut(why, 1000)}"


def _in_words(why: str) -> str | None:
    """Return what transformers says of a model of another kind, without its list of all the models that there are."""
    if match := re.match(r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)'>", why):
        return f"its config.json is that of another kind of model ({match[1].removesuffix('Config')})"
    if why.startswith("Unrecognized model in"):
        return "its config.json does not say of which type it is (model_type), or is not there"
    if match := re.match(r"Can't load (image processor|feature extractor|processor|tokenizer) for", why):
        article = "an" if match[1].startswith("image") else "a"
        return f"it has no files of {article} {match[1]}; is it a model of another kind?"
    return None


def _is_ours(error: Exception) -> bool:
    """Whether the line that raised `error` is one of vlm."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("vlm.")


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
    require_all_weights(name, model, info, pooled=pooled)
    return model


def require_all_weights(name: str, model: Any, info: Mapping[str, Any], *, pooled: bool = False) -> None:
    """Raise ValueError, with their names, for weights that the checkpoint `name` lacks, by the loading info of
    `from_pretrained`: transformers makes them up and warns. Those that a model may do without, such as tied ones, are
    not in the info; those of a pooling layer are missed only if its output is wanted, `pooled`."""
    missing = sorted(key for key in info["missing_keys"] if pooled or "pooler" not in key.split("."))
    if missing:
        more = f" and {len(missing) - SHOWN} others" if len(missing) > SHOWN else ""
        raise ValueError(f"{name} lacks weights of {type(model).__name__}: {', '.join(missing[:SHOWN])}{more}")


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
