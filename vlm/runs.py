"""`vlm runs`: the runs in a folder, how far they have come and how well, and two of them side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from vlm.errors import UserError, cut
from vlm.recipe_source import read_written
from vlm.training.history import draw_losses, duration, is_alive, read_metrics


def ls(folder: Path, console: Console) -> None:
    """List the runs in `folder`, itself or any below it; the latest first. A run whose files cannot be read is
    listed as damaged, and the reason is given below the table. Raises UserError if there are no runs."""
    found = [path.parent for path in folder.rglob("recipe.yaml") if _is_run(path.parent)]
    if not found:
        raise UserError(f"there is no run in {folder}: a run is a folder that `vlm train` has written")
    table = Table("run", "recipe", "step", "state", "best", "changed", box=None, pad_edge=False)
    damaged = []
    for run in sorted(found, key=_changed, reverse=True):
        name = str(run.relative_to(folder)) if run != folder else str(run)
        ago = f"{duration(time.time() - _changed(run))} ago"
        try:
            with _readable(run):
                table.add_row(Text(name), *_columns(run), ago)
        except UserError as error:
            table.add_row(Text(name), "", "", "damaged", "", ago)
            damaged.append(str(error))
    console.print(table, highlight=False)
    for why in damaged:
        console.print(f"damaged: {why}", markup=False, highlight=False, soft_wrap=True)


def _columns(run: Path) -> tuple[str, str, str, str]:
    """Return the recipe, step, state and best score of a run."""
    recipe = _recipe(run)
    return str(recipe.get("name")), _step(recipe, _entries(run)), state(run), _best(run)


@contextmanager
def _readable(run: Path) -> Iterator[None]:
    """Turn an error about what is in the files of a run into a UserError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{run}: its files are not as `vlm train` writes them ({cut(repr(error))})") from error


def compare(first: Path, second: Path, picture: Path, console: Console) -> None:
    """Print in what the recipes of two runs differ, and what they came to; draw their losses into `picture`.

    Raises UserError for a folder that is no run, and for a damaged run.
    """
    runs = {}
    for run in (first, second):
        if not _is_run(run):
            raise UserError(f"{run} is no run: there is no recipe.yaml and environment.json in it")
        with _readable(run):
            runs[run] = (dict(_flat(_recipe(run))), _results(run))
    (a, ours), (b, theirs) = runs[first], runs[second]
    columns = [Column(header, overflow="fold") for header in ("", str(first), str(second))]
    table = Table(*columns, box=None, pad_edge=False)
    for key in dict.fromkeys([*a, *b]):
        if a.get(key) != b.get(key) and key != "output_dir":
            table.add_row(key, str(a.get(key, "")), str(b.get(key, "")))
    if not table.row_count:
        table.add_row("the recipes are the same", "", "")
    table.add_section()
    for key in dict.fromkeys([*ours, *theirs]):
        table.add_row(key, ours.get(key, ""), theirs.get(key, ""))
    console.print(table, highlight=False)
    draw_losses({str(run): run / "metrics.jsonl" for run in (first, second)}, picture)
    console.print(f"losses: {picture}", highlight=False, soft_wrap=True)


def state(run: Path) -> str:
    """`finished`, `running` (its process is alive on this machine) or `stopped`."""
    if (run / "model" / "config.json").is_file():
        return "finished"
    environment = _read_object(run / "environment.json")
    return "running" if is_alive(environment.get("process")) else "stopped"


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a run. Raises UserError for a damaged file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__} in place of an object with keys")
    return found


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file() and (folder / "environment.json").is_file()


def _changed(run: Path) -> float:
    files = (run / name for name in ("recipe.yaml", "metrics.jsonl", "model", "evaluation/summary.json"))
    return max(file.stat().st_mtime for file in files if file.exists())


def _recipe(run: Path) -> dict[str, Any]:
    return read_written(run / "recipe.yaml")


def _entries(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []


def _step(recipe: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """`120 of 500`, in which stage if there are several; how many there will be follows from the epoch."""
    if not entries:
        return "0"
    last = entries[-1]
    stages = recipe["stages"]
    number = next((i for i, stage in enumerate(stages) if stage["name"] == last["stage"]), 0)
    section = stages[number]["train"]
    steps = section.get("max_steps", -1)
    if steps <= 0 and last.get("epoch"):
        steps = round(last["step"] / last["epoch"] * section.get("num_train_epochs", 3))
    text = f"{last['step']} of {steps}" if steps > 0 else str(last["step"])
    return f"{text} ({last['stage']}, stage {number + 1} of {len(stages)})" if len(stages) > 1 else text


def _results(run: Path) -> dict[str, str]:
    """The lowest held-out loss and the scores, with the blind ones."""
    entries = _entries(run)
    found = {"step": str(entries[-1]["step"])} if entries else {}
    losses = [(loss, entry["step"]) for entry in entries if (loss := entry.get("eval_loss")) is not None]
    if losses:
        loss, step = min(losses)
        found["lowest held-out loss"] = f"{loss:.4f} (step {step})"
    if (run / "evaluation" / "summary.json").is_file():
        summary = _read_object(run / "evaluation" / "summary.json")
        for name, score in summary["metrics"].items():
            blind = "" if score["blind_score"] is None else f", blind {score['blind_score']:.3f}"
            found[name] = "not finite" if score["score"] is None else f"{score['score']:.3f}{blind}"
    return found


def _best(run: Path) -> str:
    """The score of the first metric, or the lowest held-out loss before there is one."""
    results = _results(run)
    results.pop("step", None)
    loss = results.pop("lowest held-out loss", None)
    if results:
        name = next(iter(results))
        return f"{name} {results[name].partition(',')[0]}"
    return "" if loss is None else f"loss {loss.partition(' ')[0]}"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """`stages.0.train.max_steps`, 10 for each value that stands in a recipe."""
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else None
    if items is None:
        yield key, value
        return
    for name, inner in items:
        yield from _flat(inner, f"{key}.{name}" if key else str(name))
