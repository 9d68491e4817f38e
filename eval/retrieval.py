"""How well images find their texts and texts their images: recall at k, both ways."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vlm.eval.top_k import Share, first_right, top_k

KS = (1, 5, 10)
DIRECTIONS = ("image_to_text", "text_to_image")
METRICS = tuple(f"{direction}_r{k}" for direction in DIRECTIONS for k in KS)


def recall(scores: np.ndarray, positive: np.ndarray) -> dict[str, Share]:
    """The share of queries that find what belongs to them among the first k, named as in `METRICS`.

    Args:
        scores: `[images, texts]`, higher is nearer.
        positive: `[images, texts]`, true where the text belongs to the image.
    """
    found: dict[str, Share] = {}
    for direction, turned, right in zip(DIRECTIONS, (scores, scores.T), (positive, positive.T), strict=True):
        shares = top_k(first_right(turned, right), KS)
        found |= {f"{direction}_r{k}": share for k, share in shares.items()}
    return found


def by_chance(positive: np.ndarray) -> dict[str, float]:
    """The recall that a random order would have on average: of `positive [images, texts]`, as in [`recall`]."""
    found = {}
    for direction, right in zip(DIRECTIONS, (positive, positive.T), strict=True):
        candidates, of_query = right.shape[1], right.sum(axis=1).tolist()
        for k in KS:
            missed = [comb(candidates - n, k) / comb(candidates, k) if k <= candidates else 0.0 for n in of_query]
            found[f"{direction}_r{k}"] = 1 - sum(missed) / len(missed)
    return found


def summarize(scores: np.ndarray, positive: np.ndarray) -> dict[str, Any]:
    """[`recall`] in the form of the summary of an evaluation; what a random order would have stands for blind."""
    chance = by_chance(positive)
    metrics = {
        name: {
            "score": share.value,
            "interval": [share.low, share.high],
            "blind_score": chance[name],
            "blind_interval": None,
            "sees": share.low > chance[name],
        }
        for name, share in recall(scores, positive).items()
    }
    return {"metrics": metrics, "n_images": len(positive), "n_items": positive.shape[1], "blind_missing": None}


def nearest_texts(scores: np.ndarray, positive: np.ndarray, texts: Sequence[str]) -> list[dict[str, Any]]:
    """For each image the nearest of `texts`, those that belong to it, and where the best of these stands, from 1: the
    rows of `predictions.jsonl`, without the image."""
    return [
        {
            "prompt": "",
            "prediction": texts[int(row.argmax())],
            "references": [texts[int(column)] for column in np.flatnonzero(right)],
            "scores": {"place": int(place) + 1},
        }
        for row, right, place in zip(scores, positive, first_right(scores, positive), strict=True)
    ]


def show(summary: dict[str, Any], console: Console) -> None:
    """Print recall both ways with its 95 % intervals, beside that of a random order."""
    table = Table("recall at", *(direction.replace("_", " ") for direction in DIRECTIONS), "random order", box=None)
    for k in KS:
        rows = [summary["metrics"][f"{direction}_r{k}"] for direction in DIRECTIONS]
        cells = [f"{row['score']:.3f}  ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})" for row in rows]
        table.add_row(str(k), *cells, " / ".join(f"{row['blind_score']:.3f}" for row in rows))
    console.print(table)
    console.print(f"{summary['n_images']} images and {summary['n_items']} texts", style="dim", highlight=False)
