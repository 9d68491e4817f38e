"""The paths of a recipe, made whole: `~`, `${VLM_HOME}`, and files beside the recipe."""

import os
from pathlib import Path
from typing import Any

from vlm.paths import existing, expanded
from vlm.recognition.labels import TEMPLATES

PATH_KEYS = ("path", "images", "annotations", "questions", "data_files")
"""The keys of a data source that name a file or folder of their own."""


def home() -> Path:
    """Return the cache folder of vlm: the environment variable VLM_HOME, or ~/.cache/vlm."""
    return expanded(os.environ.get("VLM_HOME") or "~/.cache/vlm")


def expand(values: dict[str, Any], base_dir: Path | None) -> None:
    """Make the paths of a raw recipe whole, in place. Names that are no path here (Hub names) stay as they are."""
    model, data, evaluation = values.get("model"), values.get("data"), values.get("evaluation")
    if isinstance(model, dict):
        for key in ("pretrained", "vision", "language"):
            if key in model:
                model[key] = _whole(model[key], base_dir)
    if isinstance(data, dict):
        start = _whole(data.get("base_dir", str(base_dir or ".")), base_dir)
        train = data.get("train")
        for source in (*(train if isinstance(train, list) else [train]), data.get("validation")):
            expand_source(source, Path(start) if isinstance(start, str) else None)
        data["base_dir"] = start
    if isinstance(evaluation, dict) and isinstance(tasks := evaluation.get("classification"), dict):
        for task in tasks.values():
            if isinstance(task, dict):
                task |= {key: _whole(task[key], base_dir) for key in ("data", "templates") if _is_path(task.get(key))}


def expand_source(source: Any, base_dir: Path | None) -> None:
    """Make the paths of a data source whole, in place."""
    if not isinstance(source, dict):
        return
    for key in PATH_KEYS:
        # With `data_files`, a bare `path` is the name of a builder (json, parquet), not a folder that is called so.
        builder = key == "path" and "data_files" in source and "/" not in str(source.get(key))
        if key in source and not builder:
            source[key] = _whole(source[key], base_dir)


def _is_path(value: Any) -> bool:
    """Not the name of templates, whatever folders are called so: ImageNet's is."""
    return isinstance(value, str) and value not in TEMPLATES


def _whole(value: Any, base_dir: Path | None) -> Any:
    """Expand `${VLM_HOME}` and `~`; make a path that exists beside the recipe, or here, absolute."""
    if isinstance(value, list):
        return [_whole(item, base_dir) for item in value]
    if not isinstance(value, str) or not value:
        return value
    text = value.replace("${VLM_HOME}", str(home()))
    path = expanded(text)
    if path.is_absolute():
        return str(path)
    for folder in (base_dir, Path.cwd()):
        if folder is not None and (existing(folder / path) or _matches(folder, text)):
            return str(Path(os.path.abspath(folder / path)))
    return text


def _matches(folder: Path, pattern: str) -> bool:
    """Whether `pattern` has a star and finds a file in `folder`."""
    try:
        return "*" in pattern and any(folder.glob(pattern))
    except (OSError, ValueError):  # no pattern, or no name that a file can have
        return False
