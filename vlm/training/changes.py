"""What may differ between the recipe that a run began with and the one it goes on with."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm.errors import UserError
from vlm.recipe import Recipe
from vlm.recipe_source import read_written
from vlm.training.folder import begun_stages, finished_stages, has_model

MAY_DIFFER = re.compile(
    r"""
    name | output_dir | evaluation\..* | model\.trust_remote_code
    | data\.(train|validation|base_dir|max_bad|cache_features|max_cache_size)(\..*)?   # the data are compared
    | stages\.\d+\.(trainable\.\w+ | lora\.(learning_rate|parts\.\w+))         # a rate; not which parts learn
    | stages\.\d+\.train\.(
        max_steps | num_train_epochs | max_grad_norm | per_device_eval_batch_size
        | per_device_train_batch_size | gradient_accumulation_steps  # their product is compared
        | bf16 | fp16 | tf32 | use_cpu | (activation|gradient)_checkpointing(_kwargs)?(\..*)? | torch_compile\w*
        | dataloader_(num_workers|pin_memory|prefetch_factor|multiprocessing_context)
        | (save|eval|logging|log|report|trackio|ddp)_\w+(\..*)? | project | run_name | disable_tqdm | debug
        | load_best_model_at_end | metric_for_best_model | greater_is_better | torch_empty_cache_steps
    )
    """,
    re.VERBOSE,
)
"""Keys that decide nothing about the steps that were taken, or that may well be decided anew for those to come."""


def changes(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each key whose value differs, as `stages.0.train.max_steps`, with the two values."""
    if isinstance(before, list) and isinstance(now, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            yield from changes(before.get(name), now.get(name), f"{key}.{name}" if key else str(name))
    elif before != now:
        yield key, before, now


def recipe_changes(folder: Path, recipe: Recipe) -> list[str]:
    """How `recipe` differs from that of the run in `folder`, a line for each key.

    Raises UserError for a difference that would make the steps to come other than those of either recipe, or comes too
    late. Before the first checkpoint of a stage all of it may differ.
    """
    before = read_written(folder / "recipe.yaml")
    names = [stage["name"] for stage in before["stages"]]
    finished, begun = finished_stages(folder, names), begun_stages(folder, names)
    if has_model(folder):  # all is trained, and a stage more would never be
        finished = begun = sys.maxsize
    found = list(changes(before, recipe.resolved()))
    refused = [line for line in found if begun and not _may_differ(*line, finished=finished, begun=begun)]
    if refused:
        raise UserError(
            "the recipe has changed since this run began, where a run that goes on cannot:\n"
            + "".join(f"  {in_words(*line)}\n" for line in refused)
            + f"Take these back ({folder / 'recipe.yaml'} is the recipe it began with), or begin anew with --overwrite "
            "or another output_dir"
        )
    return [in_words(*line) for line in found]


def _may_differ(key: str, before: Any, now: Any, *, finished: int, begun: int) -> bool:
    stage = re.match(r"stages\.(\d+)", key)
    if stage is None:
        return MAY_DIFFER.fullmatch(key) is not None
    number = int(stage[1])
    if number >= begun:
        return True
    part = re.search(r"\.(trainable|parts)\.", key) and None in (before, now)  # one that learns in one recipe alone
    return number >= finished and not part and MAY_DIFFER.fullmatch(key) is not None


def in_words(key: str, before: Any, now: Any) -> str:
    return f"{key}: {before}, now {now}"
