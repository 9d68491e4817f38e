"""The run folder before a run: whether it may be written to, the lock on it, and clearing it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from vlm.errors import UserError
from vlm.files import discard, remove_leftovers
from vlm.locks import InUse, locked_folder, real_path
from vlm.paths import existing, existing_folder
from vlm.recipe import Recipe
from vlm.recipe_paths import PATH_KEYS
from vlm.recipe_source import RecipeError, read_written, write_yaml
from vlm.training.folder import MODEL_HASHES, has_model, unscored_stages

CONTENTS = (
    "recipe.yaml", "environment.json", "metrics.jsonl", "skipped_steps.jsonl", "loss.png", "data_problems.json",
    "checkpoints", "stages", "model", MODEL_HASHES, "adapter", "evaluation", "samples", "tensorboard",
)  # fmt: skip
"""What a run writes into its folder."""

RESOLVED = {"name", "model", "data", "stages", "evaluation", "output_dir", "seed"}
"""Keys of the recipe that a run of any version writes: every default is in it."""


@contextmanager
def run_lock(folder: Path, processes: PartialState) -> Iterator[None]:
    """Hold the lock on a run folder: the first process for all of the run.

    Raises UserError in every process if another run holds it, or if the folder cannot be written to.
    """
    with ExitStack() as stack:
        why: list[str | None] = [None]
        if processes.is_main_process:
            try:
                stack.enter_context(locked_folder(folder, "Wait until it ends, or choose another output_dir."))
            except UserError as error:
                why = [str(error)]
        broadcast_object_list(why)
        if why[0] is not None:
            raise InUse(why[0])
        if processes.is_main_process:
            for parent, _, _ in os.walk(folder):
                remove_leftovers(Path(parent))
        yield


def require_place(folder: Path, recipe: Recipe) -> None:
    """Raise UserError for a run folder that is a file, that the run reads, or whose files would be read as data, and
    for a name that no folder can have."""
    try:
        place = real_path(folder)
    except UserError as error:
        raise UserError(f"output_dir: {error}") from None
    if place.exists() and not place.is_dir():
        raise UserError(f"output_dir: {folder} is a file; choose another folder")
    for key, path in _read_by(recipe):
        if existing_folder(path) and path.resolve() == place:
            raise UserError(f"output_dir: {folder} is the folder that {key} reads; choose another folder")
    for section, source in _sources(recipe):
        path = Path(recipe.data.base_dir, str(source.get("path")))
        if source.get("format") == "dataset" and existing_folder(path) and path.resolve() in place.parents:
            raise UserError(
                f"output_dir: {folder} is in {path}, all of which {section}.path reads, and a run would add its files; "
                "choose another folder"
            )


def require_free(
    folder: Path, recipe: Recipe, *, recipe_file: Path | None = None, resume: bool, overwrite: bool
) -> None:
    """Raise UserError if the folder holds what the run would replace, unless `resume` or `overwrite` allow it.

    Files that no run writes, such as a log, may be there. `recipe_file` is where `recipe` was read from; a new run
    never replaces it with another text.
    """
    for key, path in _read_by(recipe):
        if overwrite and existing(path) and folder.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"{key} {path} is in {folder}, which --overwrite would replace; choose another folder")
    found = [name for name in CONTENTS if os.path.lexists(folder / name)]
    known = is_run(folder)
    if recipe_file is not None and (overwrite or not known) and _replaces(folder, recipe_file, recipe):
        raise UserError(
            f"the recipe {recipe_file} is in output_dir {folder}, where a run would replace it; choose another folder "
            "with output_dir=..., or move the recipe"
        )
    if known and not (resume or overwrite):
        choices = "Replace it with --overwrite, or choose another folder with output_dir=..."
        if finished(folder, recipe):
            raise UserError(f"{folder} holds a finished run. {choices}")
        raise UserError(f"{folder} holds a stopped run. Go on with it with --resume. {choices}")
    if found and not known and ("recipe.yaml" in found or not resume):
        raise UserError(
            f"{folder} is no run, and it holds {', '.join(found)}, which a run would replace. Choose another "
            "folder with output_dir=..., or move them away"
        )
    if resume and finished(folder, recipe):
        raise UserError(f"{folder} holds a finished run: nothing to resume. Use --overwrite to train anew.")


def is_run(folder: Path) -> bool:
    """Return whether a run has written `folder`: it has a resolved recipe and `environment.json`, or that recipe alone,
    if the run was killed as it began."""
    try:
        resolved = read_written(folder / "recipe.yaml").keys() >= RESOLVED
    except RecipeError:
        return False
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return resolved and not any(os.path.lexists(folder / name) for name in CONTENTS if name != "recipe.yaml")
    except (OSError, ValueError):
        return False
    return resolved and isinstance(environment, dict) and "packages" in environment


def _replaces(folder: Path, recipe_file: Path, recipe: Recipe) -> bool:
    """Return whether a new run in `folder` removes the recipe that it is read from, or writes another text there."""
    file = recipe_file.resolve()
    if not any((folder / name).resolve() in (file, *file.parents) for name in CONTENTS):
        return False
    own = file == (folder / "recipe.yaml").resolve()
    return not own or file.read_text(encoding="utf-8") != write_yaml(recipe.resolved())


def finished(folder: Path, recipe: Recipe) -> bool:
    """Whether the run in `folder` has left its model and its scores."""
    missing = recipe.is_scored and unscored_stages(folder, recipe.stage_names)
    return has_model(folder) and not missing


def clear(folder: Path) -> None:
    """Remove what a run writes, not the folder: other files stay. The recipe goes last: as long as it is there, the
    folder holds a run."""
    for name in reversed(CONTENTS):
        discard(folder / name)


def _read_by(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """The files and folders that a run reads, each with its key."""
    model = recipe.model
    for part, names in (("pretrained", model.pretrained), ("vision", model.vision), ("language", model.language)):
        for name in [names] if isinstance(names, str) else names or []:
            yield f"model.{part}", Path(name)
    for section, source in _sources(recipe):
        for key in PATH_KEYS:
            value: Any = source.get(key)
            values = value if isinstance(value, list) else [value]
            yield from ((f"{section}.{key}", Path(recipe.data.base_dir, path)) for path in values if _is_name(path))


def _sources(recipe: Recipe) -> list[tuple[str, dict[str, Any]]]:
    """The data sources of a recipe, each with its section."""
    held_out = [("data.validation", recipe.data.validation)] if recipe.data.validation else []
    return [*(("data.train", source) for source in recipe.data.sources), *held_out]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
