"""What a run leaves to read and to look at: the environment, the table before training, the loss curve."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from vlm.training.parts import PARTS, named_parts

PACKAGES = (
    "vlm-bridge", "torch", "torchvision", "transformers", "accelerate", "peft", "datasets", "timm", "bitsandbytes",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions and hardware, as far as they can change a result."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": versions,
    }


def parts_table(model: nn.Module, rates: Mapping[str, float], rows: Mapping[str, str]) -> Table:
    """What is trained at which rate, and below it `rows` of anything else worth knowing before."""
    counts: dict[str, int] = {}
    for part, _, parameter in named_parts(model):
        counts[part] = counts.get(part, 0) + parameter.numel()
    table = Table("part", "parameters", "learning rate", box=None, pad_edge=False)
    for part in PARTS:
        if part in counts:
            rate = f"{rates[part]:g}" if part in rates else "frozen"
            table.add_row(part, f"{counts[part]:,}", rate)
    for key, value in rows.items():
        table.add_row(key, value, "")
    return table


def duration(seconds: float) -> str:
    """Seconds as people say them: `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def plot_losses(metrics: Path, picture: Path) -> None:
    """The training and evaluation loss of `metrics.jsonl` over the steps, stages one after the other, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    offset, stages = 0, list(dict.fromkeys(entry["stage"] for entry in entries))
    for number, stage in enumerate(stages):
        mine = [entry for entry in entries if entry["stage"] == stage]
        for key, style in (("loss", "-"), ("eval_loss", "o--")):
            points = [(offset + entry["step"], entry[key]) for entry in mine if key in entry]
            if points:
                name = "training" if key == "loss" else "held out"
                label = name if len(stages) == 1 else f"{stage}: {name}"
                axes.plot(*zip(*points, strict=True), style, color=f"C{2 * number + (key != 'loss')}", label=label)
        offset += max(entry["step"] for entry in mine)
    axes.set(xlabel="step", ylabel="cross-entropy per supervised token", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)
