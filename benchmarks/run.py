"""Everything that is claimed about speed: `python -m benchmarks.run [--repeats 3] [--precision auto] [GROUP ...]`.

Each group of comparisons runs its sides in alternation, each in a process of its own that waits while another works,
and takes medians. Peers try several batch sizes and attention implementations first, and the fastest goes on. Whatever
works on the same rows must report the same number of supervised tokens and the same loss. Tables and a plot are written
into `runs/benchmarks/`, with the figures of the machine. Needs what `vlm quickstart` fetches, and
`pip install -e '.[benchmarks]'`.
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
from typing import Any, Literal

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
    """`name`: that `ours` is `target` times `peer`, by answers a second or by `peak` memory; or that our `mfu` is."""

    name: str
    ours: str
    peer: str
    target: str
    measure: Literal["answers", "peak", "mfu"] = "answers"


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
    conversations = [{"batch_size": size} for size in (1, 2, 4)]
    eager = {"attention": "eager"}
    choices = [*rows, *(row | eager for row in rows[:2])]
    options = {"trained": trained}
    sides = [
        Side("first epoch", "ours", options | {"cached": False}),
        Side("later epochs", "ours", options | {"cached": True}),
        Side("TRL SFTTrainer", "trl", options, choices),
        Side("Trainer", "trainer", options, choices),
    ]
    if any(claim.ours == "an image at a time" for claim in claims):
        sides.append(Side("an image at a time", "ours", options | {"cached": True, "max_tokens_per_row": 1}))
    if shape.answers > 1:
        sides.append(
            Side("Trainer, turns", "turns", options, [*conversations, *(row | eager for row in conversations[:2])])
        )
    alike = tuple(side.name for side in sides if side.side != "turns")
    return Group(name, shape, sides, claims, same_loss=alike)


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
            Claim("the same, an image at a time", "an image at a time", "TRL SFTTrainer", "0.6", "peak"),
            Claim("an image at a time, against TRL", "an image at a time", "TRL SFTTrainer", "8"),
            Claim("MFU", "later epochs", "later epochs", "65 %", "mfu"),
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
    Group(
        "evaluation, 5 questions an image",
        Shape("questions", 8, 5),
        [
            Side("ours", "our evaluation"),
            Side("one by one", "generate", {"batch_size": 1}),
            Side("in batches", "generate", choices=[{"batch_size": size} for size in (5, 20, 40)]),
        ],
        [
            Claim("against `generate` for each question", "ours", "one by one", "4"),
            Claim("against `generate` at its best batch size", "ours", "in batches", "4"),
        ],
    ),
    Group(
        "chat, first token of the second answer",
        Shape("questions", 5, 2),
        [Side("ours", "our chat"), Side("re-prefilling", "re-prefilling")],
        [Claim("against re-prefilling", "ours", "re-prefilling", "5")],
    ),
    *(
        training(
            f"LLM frozen, {answers} answers an image, for the plot",
            Shape("captions", 4, answers),
            "projector",
            (4,),
            [],
        )
        for answers in (2, 10)
    ),
]


class WorkerDied(RuntimeError):  # noqa: N818 - named for what happened
    """A side's process is gone without an answer."""


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
        line = self.process.stdout.readline()
        if not line:
            raise WorkerDied(f"{self.side.name} {self.choice} was killed, perhaps for its memory")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.side.name} {self.choice}:\n{answer['error']}")
        return answer

    def run(self, repeat: int) -> dict[str, Any]:
        return self.send({"repeat": repeat})

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def fastest(side: Side, shape: Shape, bf16: bool, tried: list[dict[str, Any]]) -> Iterator[Worker]:
    """The worker of the fastest choice, warm. What was tried goes into `tried`, with its seconds."""
    best, least = None, float("inf")
    try:
        for choice in side.choices:
            worker = Worker(side, choice, shape, bf16)
            try:
                result = worker.run(0)  # warms it up, too
                seconds, peak = result["seconds"], result["peak"]
            except WorkerDied as death:
                console.print(f"  {death}", highlight=False, style="yellow")
                seconds, peak = float("inf"), 0
            tried.append({"name": side.name, **choice, "seconds": seconds, "peak": peak})
            console.print(f"  {side.name} {choice}: {seconds:.1f} s, {peak / 1e9:.1f} GB", highlight=False)
            slower, best = (best, worker) if seconds < least else (worker, best)
            least = min(least, seconds)
            if slower is not None:
                slower.close()
        if best is None:
            raise WorkerDied(f"{side.name}: no choice of {list(side.choices)} got through")
        yield best
    finally:
        if best is not None:
            best.close()


def run_group(group: Group, repeats: int, bf16: bool) -> dict[str, Any]:
    """Everything measured in a group: for each side the seconds and peaks of the repeats, and its best choice."""
    console.print(group.name, style="bold", highlight=False)
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in group.sides}
    tried: list[dict[str, Any]] = []
    with ExitStack() as stack:
        workers = [stack.enter_context(fastest(side, group.shape, bf16, tried)) for side in group.sides]
        for repeat in range(1, 1 + repeats):
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
        answers = [result["answers"] for result in results if "answers" in result]
        if not bf16 and any(found != answers[0] for found in answers):
            raise RuntimeError(f"{group.name}: the answers differ: {answers}")
        if losses and max(losses) - min(losses) > (2e-2 if bf16 else 1e-4) * max(losses):
            raise RuntimeError(f"{group.name}: the losses differ: {losses}")


def row_of(claim: Claim, measured: dict[str, Any]) -> str:
    """A line of the table: medians of both sides, the median of the ratios of neighbours, and their range."""
    ours, peer = (measured["results"][name] for name in (claim.ours, claim.peer))
    if claim.measure == "mfu":
        shares = [result["mfu"] for result in ours]
        spread = f"{min(shares):.0%} to {max(shares):.0%}"
        return f"| {claim.name} | {statistics.median(shares):.0%} ({spread}) | | | {claim.target} |"
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
        if group.name not in measured or not group.claims:
            continue
        lines += [f"**{group.name}** ({group.shape.images} images a step)", ""]
        lines += ["| comparison | ours | peer | ratio (range) | target |", "| --- | --- | --- | --- | --- |"]
        lines += [row_of(claim, measured[group.name]) for claim in group.claims]
        chosen = {name: choice for name, choice in measured[group.name]["chosen"].items() if choice}
        best = "; ".join(f"{name} {_words(choice)}" for name, choice in chosen.items())
        lines += ["", *([f"The fastest settings of the peers: {best}.", ""] if best else [])]
    return "\n".join(lines)


def _words(choice: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in choice.items())


def plot(measured: dict[str, Any], path: Path) -> None:
    """Answers a second against answers an image, for each side of the groups with a frozen language model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, dict[int, float]] = {}
    for name, group in measured.items():
        if name.startswith("LLM frozen"):
            answers = group["shape"]["answers"]
            for side, results in group["results"].items():
                seconds = statistics.median(result["seconds"] for result in results)
                lines.setdefault(side, {})[answers] = group["shape"]["images"] * answers / seconds
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for side, points in lines.items():
        if len(points) == 1:  # measured for its memory
            continue
        counts = sorted(points)
        label = f"vlm, {side}" if side.endswith(("epoch", "epochs")) else side
        axes.plot(counts, [points[count] for count in counts], marker="o", label=label)
    axes.set(xlabel="answers an image", ylabel="answers a second", xticks=[1, 2, 5, 10], ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


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
    plot(measured, path.with_suffix(".png"))
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
