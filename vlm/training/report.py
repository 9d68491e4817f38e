"""What a run says of itself before it trains: versions and hardware, and the table of its parts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table
from torch import nn

from vlm.training.history import this_process
from vlm.training.parts import PARTS, named_parts, weights_of

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
        "process": this_process(),
    }


def parts_table(model: nn.Module, rates: Mapping[str, float], rows: Mapping[str, str]) -> Table:
    """What is trained at which rate, and below it `rows` of anything else worth knowing before."""
    counts: dict[str, int] = {}
    for part, _, parameter in named_parts(model):
        counts[part] = counts.get(part, 0) + weights_of(parameter)
    table = Table("part", "parameters", "learning rate", box=None, pad_edge=False)
    for part in PARTS:
        if part in counts:
            rate = f"{rates[part]:g}" if part in rates else "frozen"
            table.add_row(part, f"{counts[part]:,}", rate)
    for key, value in rows.items():
        table.add_row(key, value, "")
    return table
