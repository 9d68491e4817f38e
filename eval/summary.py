"""The summary of an evaluation as a table in the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show(summary: dict[str, Any], console: Console) -> None:
    """Print the scores with their 95 % intervals, beside those of the same model shown the wrong images."""
    table = Table("", "score", "blind", "looks?")
    words = {True: "yes", False: "not shown", None: "-"}
    for name, row in summary["metrics"].items():
        cells = [
            _score(row[key], row[interval])
            for key, interval in (("score", "interval"), ("blind_score", "blind_interval"))
        ]
        table.add_row(name, *cells, words[row["sees"]])
    console.print(table)
    note = f"{summary['n_items']} questions about {summary['n_images']} images; blind: the same, shown the wrong images"
    console.print(note if not summary["blind_missing"] else f"no blind score: {summary['blind_missing']}", style="dim")


def _score(score: float | None, interval: Sequence[float] | None) -> str:
    if score is None:
        return "-"
    return f"{score:.3f}" + (f"  ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
