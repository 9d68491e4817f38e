"""Captions of the stamps on several held-out splits: `python -m benchmarks.stamps 0 1 2 [override ...]`.

For each seed 100 images are held out so that none of their captions is in the training data, the recipe `quickstart` is
trained on the rest, and both scores are written into `runs/benchmarks/stamps.md`, sighted and blind. Needs what
`vlm quickstart` fetches.
"""

import json
import sys
import time
from pathlib import Path

from rich.console import Console

from vlm import recipe
from vlm.quickstart import write_stamp_splits
from vlm.recipe_paths import home
from vlm.training.run import train

OUTPUT = Path("runs/benchmarks")


def run(seed: int, overrides: list[str], console: Console) -> dict[str, float | list[float]]:
    """Train and score on the split of `seed`; gives the row of CIDEr-D in the summary, and the minutes it all took."""
    names = {"train": f"train-{seed}.jsonl", "test": f"test-{seed}.jsonl"}
    write_stamp_splits(home() / "tuxpaint-stamps", seed, train_name=names["train"], test_name=names["test"])
    loaded = recipe.load(
        "quickstart",
        [
            f"data.train.metadata={names['train']}",
            f"data.validation.metadata={names['test']}",
            f"seed={seed}",
            f"output_dir={OUTPUT / f'stamps-{seed}'}",
            *overrides,
        ],
    )
    start = time.monotonic()
    folder = train(loaded, overwrite=True, console=console)
    minutes = (time.monotonic() - start) / 60
    summary = json.loads((folder / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    return {**summary["metrics"]["cider_d"], "minutes": minutes}


def table(rows: dict[int, dict]) -> str:
    """The rows as Markdown, their means below."""

    def cell(row: dict, name: str, interval: str) -> str:
        return f"{row[name]:.2f} ({row[interval][0]:.2f} to {row[interval][1]:.2f})"

    lines = ["| seed | CIDEr-D | blind | minutes |", "| --- | --- | --- | --- |"]
    for seed, row in rows.items():
        sighted, blind = cell(row, "score", "interval"), cell(row, "blind_score", "blind_interval")
        lines.append(f"| {seed} | {sighted} | {blind} | {row['minutes']:.1f} |")
    mean = {name: sum(row[name] for row in rows.values()) / len(rows) for name in ("score", "blind_score", "minutes")}
    lines.append(f"| mean | {mean['score']:.2f} | {mean['blind_score']:.3f} | {mean['minutes']:.1f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    console = Console()
    seeds = [int(argument) for argument in arguments if argument.isdigit()]
    overrides = [argument for argument in arguments if not argument.isdigit()]
    rows = {}
    for seed in seeds or [0, 1, 2]:
        rows[seed] = run(seed, overrides, console)
        OUTPUT.mkdir(parents=True, exist_ok=True)
        (OUTPUT / "stamps.md").write_text(table(rows), encoding="utf-8")
    console.print(table(rows), markup=False)


if __name__ == "__main__":
    main(sys.argv[1:])
