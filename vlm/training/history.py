"""What a run has left to read, for those who only look at it: no model library is imported here."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from vlm.errors import UserError, nearest
from vlm.files import atomic_write


def this_process() -> dict[str, Any]:
    """What tells this process from all others."""
    return {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_alive(process: Mapping[str, Any] | None) -> bool:
    """Whether the process that `environment.json` names still runs, as far as this machine can tell."""
    if not process or process["host"] != platform.node() or not psutil.pid_exists(process["pid"]):
        return False
    try:
        return abs(psutil.Process(process["pid"]).create_time() - process["started"]) < 1  # the number may be another's
    except psutil.NoSuchProcess:
        return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a `metrics.jsonl`, without lines that are no object: one that was cut off as the disk was
    full. A number that was not finite is None."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            entry = json.loads(line, parse_constant=lambda name: None)  # earlier versions wrote NaN
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


def draw_losses(runs: Mapping[str, Path], picture: Path, loss: str = "cross-entropy per supervised token") -> None:
    """The training and held-out losses of runs, by name their `metrics.jsonl`, over the steps as a PNG. Stages follow
    one another; `loss` says what it is. Raises UserError for a format that matplotlib does not write."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if (ending := picture.suffix[1:].lower() or "png") not in known:
        raise UserError(f"{picture}: no picture is written in the format {ending!r}; {nearest(ending, known)}")
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    color = 0
    for run, metrics in runs.items():
        entries = read_metrics(metrics) if metrics.is_file() else []
        offset, stages = 0, list(dict.fromkeys(entry["stage"] for entry in entries))
        for stage in stages:
            mine = [entry for entry in entries if entry["stage"] == stage]
            for key, style, name in (("loss", "-", "training"), ("eval_loss", "o--", "held out")):
                points = [(offset + entry["step"], entry[key]) for entry in mine if entry.get(key) is not None]
                if points:
                    words = [run] * (len(runs) > 1) + [stage] * (len(stages) > 1) + [name]
                    axes.plot(*zip(*points, strict=True), style, color=f"C{color}", label=": ".join(words))
                color += 1
            offset += max(entry["step"] for entry in mine)
    axes.set(xlabel="step", ylabel=loss, yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    try:
        with atomic_write(picture, "wb") as file:
            figure.savefig(file, dpi=150, format=ending)
    finally:
        pyplot.close(figure)


def duration(seconds: float) -> str:
    """Seconds as people say them: `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
