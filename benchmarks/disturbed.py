"""Tiny runs of `vlm train`, each in a process of its own, in which something goes wrong. The extra `test` is needed.

The processes are forked from one that has imported everything, so that a run takes seconds.
"""

import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import vlm.training.run  # noqa: F401 - so that it is there in the process that is forked
from tests.stock import stock
from tests.training.helpers import TRAIN, recipe_values, save_images, save_parts
from vlm.cli import app
from vlm.training.checkpoints import newest
from vlm.training.history import read_metrics

DOCUMENT = Path(__file__).parents[1] / "docs" / "faults.md"
STEPS = 12
Trouble = Callable[[], None]
"""What is done in the process before the run begins, to have something go wrong in it."""


@dataclass
class Workshop:
    """A folder for runs on the same tiny model and data, with LoRA, dropout, accumulation, and a rotation of two; or,
    with a `family` of `tests.stock.STOCK`, on a model of transformers, whose language model is trained in full."""

    folder: Path
    family: str = ""

    def __post_init__(self) -> None:
        self.parts = save_parts(self.folder / "parts")
        self.images = save_images(self.folder / "images")
        if self.family:
            for part in stock(self.family):
                part.save_pretrained(self.folder / "pretrained")

    def values(self, name: str, **train: Any) -> dict[str, Any]:
        """The recipe of the run `name`."""
        values = recipe_values(self.parts, self.images, self.folder / name / "run")
        values["data"] |= {"cache_features": True, "max_tokens_per_row": 80}
        values["train"] = TRAIN | {
            "max_steps": STEPS, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine",
            "save_steps": 2, "save_total_limit": 2, "eval_steps": 4, **train,
        }  # fmt: skip
        if self.family:
            values |= {"model": {"pretrained": str(self.folder / "pretrained")}, "trainable": {"language": 1e-2}}
            del values["lora"], values["data"]["cache_features"]
        return values

    def run(self, values: dict[str, Any], *options: str, trouble: Trouble | None = None) -> tuple[int, str]:
        """Train as the command line does. Gives the exit code, negative for the signal that killed it, and what was
        said."""
        home = Path(values["output_dir"]).parent
        home.mkdir(parents=True, exist_ok=True)
        (home / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.disturbed", "matplotlib.pyplot"])
        words = ["train", str(home / "recipe.yaml"), *options]
        process = context.Process(target=_train, args=(words, home, trouble))
        process.start()
        process.join()
        return process.exitcode or 0, (home / "said.txt").read_text(encoding="utf-8")


def _train(words: list[str], home: Path, trouble: Trouble | None) -> None:
    os.environ |= {"VLM_HOME": str(home / "home"), "COLUMNS": "200"}
    with (home / "said.txt").open("w", encoding="utf-8") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # for those that read data: as it is where nothing is set
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    if trouble:
        trouble()
    sys.argv = ["vlm", *words]
    app(words)


def outcome(values: dict[str, Any]) -> dict[str, Any]:
    """Everything that a finished run has left that must not depend on what happened to it: the bytes of the weights,
    the losses, the answers."""
    run = Path(values["output_dir"])
    files = ["model/model.safetensors", "evaluation/predictions.jsonl"]
    if "lora" in values:
        files.append("adapter/adapter_model.safetensors")
    entries = read_metrics(run / "metrics.jsonl")
    losses = [(entry["step"], entry.get("loss"), entry.get("eval_loss")) for entry in entries]
    return {name: (run / name).read_bytes() for name in files} | {"losses": [row for row in losses if any(row[1:])]}


def last_checkpoint(values: dict[str, Any]) -> int:
    """The step of the checkpoint that the run would go on from, 0 without one."""
    folder = Path(values["output_dir"]) / "checkpoints" / "train"
    found = newest(folder, lambda line: None) if folder.is_dir() else None
    return int(found.name.rpartition("-")[2]) if found else 0


def last_step(values: dict[str, Any]) -> int:
    """The last step that the run had taken."""
    log = Path(values["output_dir"]) / "metrics.jsonl"
    return max((entry["step"] for entry in read_metrics(log)), default=0) if log.is_file() else 0


def table_rows(heading: str) -> dict[str, str]:
    """The rows of the table below a heading of docs/faults.md, by their first cell."""
    section = DOCUMENT.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def put_table(heading: str, table: str) -> None:
    """Replace the table below a heading of docs/faults.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, section = text.partition(f"## {heading}\n")
    section = re.sub(r"(?m)(?:^\|.*\n)+", lambda _: table, section, count=1)
    DOCUMENT.write_text(f"{before}## {heading}\n{section}", encoding="utf-8")
