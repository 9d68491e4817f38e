"""Everything that is claimed about speed: `python -m benchmarks.run [--repeats 3] [--precision auto] [GROUP ...]`.

Each group of comparisons runs its sides in alternation, each in a process of its own that waits while another works,
and takes medians. Peers try several batch sizes and attention implementations first, and the fastest goes on. Whatever
works on the same rows must report the same number of supervised tokens and the same loss. Tables and a plot are written
into `runs/benchmarks/`, with the figures of the machine. Needs what `vlm quickstart` fetches, and `pip install trl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.workload import Shape
from vlm.precision import default_device, fast_bfloat16
from vlm.training.report import environment

OUTPUT = Path("runs/benchmarks")
console = Console()


@dataclass
class Side:
    """A name for the tables, one of `benchmarks.sides.SIDES`, its options, and those among which the best is chosen."""

    name: str
    side: str
    options: dict[str, Any] = field(default_factory=dict)
    choices: Sequence[dict[str, Any]] = ({},)


@dataclass
class Claim:
    """`name`: that `ours` is `target` times as good as `peer`, by answers a second or by `peak` memory."""

    name: str
    ours: str
    peer: str
    target: str
    measure: str = "answers"


@dataclass
class Group:
    """Sides that work on the same examples."""

    name: str
    shape: Shape
    sides: list[Side]
    claims: list[Claim]
    same_loss: tuple[str, ...] = ()
    """Names of the sides whose losses must be equal: those that train on one row an answer, or on trees."""


def training(name: str, shape: Shape, trained: str, sizes: Sequence[int], claims: list[Claim]) -> Group:
    """A group of every way to train on `shape`; `sizes` are the batch sizes that peers try."""
    rows = [{"batch_size": size} for size in sizes]
    conversations = [{"batch_size": size} for size in (1, 2, 4) if shape.images % size == 0]
    eager = {"attention": "eager"}
    options = {"trained": trained}
    sides = [
        Side("first epoch", "ours", options | {"cached": False}),
        Side("later epochs", "ours", options | {"cached": True}),
        Side("TRL SFTTrainer", "trl", options, [*rows, rows[0] | eager]),
        Side("Trainer", "trainer", options, [*rows, rows[0] | eager]),
    ]
    if shape.answers > 1:
        sides.append(Side("Trainer, turns", "turns", options, [*conversations, conversations[0] | eager]))
    return Group(name, shape, sides, claims, same_loss=("first epoch", "later epochs", "TRL SFTTrainer", "Trainer"))


GROUPS = [
    training(
        "LLM frozen, 5 answers an image",
        Shape("captions", 4, 5),
        "projector",
        (2, 5, 20),
        [
            Claim("first epoch, against TRL", "first epoch", "TRL SFTTrainer", "6"),
            Claim("later epochs, against TRL", "later epochs", "TRL SFTTrainer", "8"),
            Claim("first epoch, against turns", "first epoch", "Trainer, turns", "1.4"),
            Claim("later epochs, against turns", "later epochs", "Trainer, turns", "1.7"),
            Claim("peak memory, against TRL", "later epochs", "TRL SFTTrainer", "0.6", "peak"),
        ],
    ),
    training(
        "LLM trained, 5 answers an image",
        Shape("captions", 4, 5),
        "language",
        (2, 5, 20),
        [
            Claim("first epoch, against TRL", "first epoch", "TRL SFTTrainer", "6"),
            Claim("later epochs, against TRL", "later epochs", "TRL SFTTrainer", "6"),
            Claim("first epoch, against turns", "first epoch", "Trainer, turns", "1.3"),
            Claim("later epochs, against turns", "later epochs", "Trainer, turns", "1.4"),
        ],
    ),
    training(
        "LLM frozen, 1 answer an image",
        Shape("captions", 12, 1),
        "projector",
        (2, 4, 12),
        [Claim("later epochs, against TRL", "later epochs", "TRL SFTTrainer", "2")],
    ),
]


class Worker:
    """A side in a process of its own."""

    def __init__(self, side: Side, choice: dict[str, Any], shape: Shape, bf16: bool) -> None:
        self.side, self.choice = side, choice
        command = [sys.executable, "-m", "benchmarks.worker"]
        log = (OUTPUT / "workers.log").open("a")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
        )
        options = {"bf16": bf16, **side.options, **choice}
        self.send({"side": side.side, "shape": asdict(shape), "options": options})

    def send(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"{self.side.name} {self.choice}:\n{answer['error']}")
        return answer

    def run(self, repeat: int) -> dict[str, Any]:
        return self.send({"repeat": repeat})

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def fastest(side: Side, shape: Shape, bf16: bool, tried: dict[str, list]) -> Iterator[Worker]:
    """The worker of the fastest choice, warm. What was tried goes into `tried`, with its seconds."""
    best: Worker | None = None
    least = float("inf")
    for choice in side.choices:
        worker = Worker(side, choice, shape, bf16)
        worker.run(0)
        if len(side.choices) > 1:
            seconds = worker.run(1)["seconds"]
            tried.setdefault(side.name, []).append({**choice, "seconds": seconds})
            console.print(f"  {side.name} {choice}: {seconds:.1f} s", highlight=False)
        else:
            seconds = 0.0
        if seconds < least:
            least, worker, best = seconds, best, worker  # type: ignore[assignment]
        if worker is not None:
            worker.close()
    assert best is not None
    try:
        yield best
    finally:
        best.close()


def run_group(group: Group, repeats: int, bf16: bool) -> dict[str, Any]:
    """Everything measured in a group: for each side the seconds and peaks of the repeats, and its best choice."""
    console.print(group.name, style="bold", highlight=False)
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in group.sides}
    tried: dict[str, list] = {}
    with ExitStack() as stack:
        workers = [stack.enter_context(fastest(side, group.shape, bf16, tried)) for side in group.sides]
        for repeat in range(2, 2 + repeats):
            for worker in workers:
                result = worker.run(repeat)
                found[worker.side.name].append(result)
                rate = group.shape.images * group.shape.answers / result["seconds"]
                console.print(f"  {worker.side.name}: {rate:.2f} answers/s", highlight=False)
        chosen = {worker.side.name: worker.choice for worker in workers}
    _require_same_work(group, found, bf16)
    return {"shape": asdict(group.shape), "results": found, "tried": tried, "chosen": chosen}


def _require_same_work(group: Group, found: dict[str, list[dict[str, Any]]], bf16: bool) -> None:
    for results in zip(*found.values(), strict=True):
        counts = {name: result.get("supervised") for name, result in zip(found, results, strict=True)}
        if len(set(counts.values())) > 1:
            raise RuntimeError(f"{group.name}: the supervised tokens differ: {counts}")
        losses = [result["loss"] for name, result in zip(found, results, strict=True) if name in group.same_loss]
        if losses and max(losses) - min(losses) > (2e-2 if bf16 else 1e-4) * max(losses):
            raise RuntimeError(f"{group.name}: the losses differ: {losses}")


def row_of(claim: Claim, measured: dict[str, Any]) -> str:
    """A line of the table: medians of both sides, the median of the ratios of neighbours, and their range."""
    ours, peer = (measured["results"][name] for name in (claim.ours, claim.peer))
    answers = measured["shape"]["images"] * measured["shape"]["answers"]
    if claim.measure == "peak":
        sides = [[result["peak"] / 1e9 for result in results] for results in (ours, peer)]
        unit = "GB"
    else:
        sides = [[answers / result["seconds"] for result in results] for results in (ours, peer)]
        unit = "answers/s"
    ratios = [a / b for a, b in zip(*sides, strict=True)]
    mine, other = (f"{statistics.median(values):.2f} {unit}" for values in sides)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"| {claim.name} | {mine} | {other} | {statistics.median(ratios):.2f} ({spread}) | {claim.target} |"


def table(groups: Sequence[Group], measured: dict[str, Any]) -> str:
    lines = []
    for group in groups:
        if group.name not in measured:
            continue
        lines += [f"**{group.name}** ({group.shape.images} images a step)", ""]
        lines += ["| comparison | ours | peer | ratio (range) | target |", "| --- | --- | --- | --- | --- |"]
        lines += [row_of(claim, measured[group.name]) for claim in group.claims]
        chosen = {name: choice for name, choice in measured[group.name]["chosen"].items() if choice}
        best = "; ".join(f"{name} {_words(choice)}" for name, choice in chosen.items())
        lines += ["", f"The fastest settings of the peers: {best}.", ""]
    return "\n".join(lines)


def _words(choice: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in choice.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", help="words of the names of the groups to run; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=["auto", "bfloat16", "float32"], default="auto")
    given = parser.parse_args()
    bf16 = fast_bfloat16(default_device()) if given.precision == "auto" else given.precision == "bfloat16"
    groups = [g for g in GROUPS if not given.groups or any(word in g.name for word in given.groups)]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / f"performance-{'bfloat16' if bf16 else 'float32'}.json"
    measured: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for group in groups:
        measured[group.name] = run_group(group, given.repeats, bf16)
        measured["machine"] = environment()
        path.write_text(json.dumps(measured, indent=1))
    text = table(GROUPS, measured)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
