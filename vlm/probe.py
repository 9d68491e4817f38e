"""`vlm probe`: how good the features of frozen encoders are for recognition, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vlm.data.encoding import BATCH_IMAGES
from vlm.data.example import ImageSource
from vlm.data.images import ImageError
from vlm.embedding import Embedder, load_embedder
from vlm.errors import UserError
from vlm.files import new_file, write_text
from vlm.precision import default_device
from vlm.printing import json_text
from vlm.recognition.labelled_images import LabelledImages, read_labelled_images
from vlm.recognition.linear_probe import ITERATIONS
from vlm.recognition.probes import TOP, Probed, probe
from vlm.recognition.splits import Parts, given, split

TEST_SIZE = 0.2


def run(
    encoders: Sequence[str],
    *,
    data: str,
    label_column: str | None = None,
    test: str | None = None,
    test_size: float | None = None,
    seed: int = 0,
    k: Sequence[int],
    output: Path | None = None,
    console: Console,
) -> None:
    """Learn the labels of `data` from the features of each of `encoders`, and test on `test`, or else on the share
    `test_size` of each label's images, drawn by `seed`.

    Raises UserError for options that do not go together, more neighbours than images, and as the readers of labelled
    images and [`load_embedder`] do.
    """
    if test is not None and test_size is not None:
        raise UserError("--test and --test-size: give one of the two")
    if twice := [name for name, count in Counter(encoders).items() if count > 1]:
        raise UserError(f"{twice[0]} is given twice; give each encoder once")
    with new_file(output):
        learning = read_labelled_images(data, label_column)
        testing = read_labelled_images(test, label_column) if test is not None else None
        share = TEST_SIZE if test_size is None else test_size
        _divide(
            learning, testing, share, seed, k, broken={}
        )  # what is wrong with that is said before hours of encoding
        with console.status("loading the encoders"):
            embedders = [load_embedder(name) for name in encoders]
        images = learning.images | (testing.images if testing else {})
        broken: dict[str, ImageError] = {}
        features = {each.name: _embed(each, images, broken, console) for each in embedders}
        parts = _divide(learning, testing, share, seed, k, broken)
        problems = [*learning.problems, *(testing.problems if testing else ()), *broken.values(), *parts.left_out]
        for problem in problems:
            console.print(f"left out: {problem}", markup=False, highlight=False, soft_wrap=True)
        found: dict[str, list[Probed]] = {}
        for name in track(features, "probing", console=console, disable=not console.is_terminal):
            found[name] = _probe(features[name], parts, k, seed)
        _show(found, parts, console)
        if output is not None:
            _write(
                output,
                found,
                parts,
                {"data": data, "test": test, "seed": seed} | ({} if test else {"test_size": share}),
            )


def _divide(
    learning: LabelledImages,
    testing: LabelledImages | None,
    share: float,
    seed: int,
    ks: Sequence[int],
    broken: Mapping[str, ImageError],
) -> Parts:
    def labels(images: LabelledImages) -> dict[str, str]:
        named = zip(images.images, images.targets, strict=True)
        return {name: images.labels[target] for name, target in named if name not in broken}

    parts = given(labels(learning), labels(testing)) if testing else split(labels(learning), share, seed)
    if max(ks) > len(parts.train):
        raise UserError(
            f"--k {max(ks)}: there are only {len(parts.train)} images to learn from; choose fewer neighbours"
        )
    return parts


def _embed(
    embedder: Embedder, images: Mapping[str, ImageSource], broken: dict[str, ImageError], console: Console
) -> dict[str, Tensor]:
    """The unit vector of each image that opens, by its name."""
    batches = embedder.embed_images(images, broken=broken)
    total = -(-len(images) // BATCH_IMAGES)
    found: dict[str, Tensor] = {}
    for batch in track(
        batches, f"encoding by {escape(embedder.name)}", total, console=console, disable=not console.is_terminal
    ):
        found |= zip(batch.images, batch.features.cpu(), strict=True)
    return found


def _probe(features: Mapping[str, Tensor], parts: Parts, ks: Sequence[int], seed: int) -> list[Probed]:
    device = default_device()
    device = "cpu" if device == "mps" else device  # which has no float64
    train, test = (torch.stack([features[name] for name in part]).to(device) for part in (parts.train, parts.test))
    targets, test_targets = (torch.tensor(list(part.values()), device=device) for part in (parts.train, parts.test))
    return probe(train, targets, test, test_targets, len(parts.labels), ks, seed=seed)


def _show(found: Mapping[str, Sequence[Probed]], parts: Parts, console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("encoder", overflow="fold")
    table.add_column("probe", no_wrap=True)
    table.add_column("top-1 accuracy", no_wrap=True)
    with_top = len(parts.labels) > TOP
    if with_top:
        table.add_column(f"top-{TOP} accuracy", no_wrap=True)
    for name, probes in found.items():
        for each in probes:
            shares = [str(each.top[rank]) if rank in each.top else "" for rank in ((1, TOP) if with_top else (1,))]
            table.add_row(Text(name), each.probe, *shares)
    console.print(table, highlight=False)
    label, share = most_common(parts)
    console.print(
        f"{len(parts.train):,} images to learn from, {len(parts.test):,} to test on, {len(parts.labels)} labels; "
        f"{label!r} for each would be right {share:.3f} of the time",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for name, probes in found.items():
        if not all(each.converged for each in probes):
            console.print(
                f"{name}: the linear probe was still moving after {ITERATIONS:,} iterations",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def most_common(parts: Parts) -> tuple[str, float]:
    """The label that most images to learn from have, and the share of the test images that have it."""
    place, _ = Counter(parts.train.values()).most_common(1)[0]
    tests = list(parts.test.values())
    return parts.labels[place], tests.count(place) / len(tests)


def _write(output: Path, found: Mapping[str, Sequence[Probed]], parts: Parts, about: Mapping[str, Any]) -> None:
    results = [
        {
            "encoder": name,
            "probe": each.probe,
            **({} if each.c is None else {"C": each.c, "converged": each.converged}),
            **{f"top_{rank}": {"value": s.value, "interval": [s.low, s.high]} for rank, s in each.top.items()},
            "predicted": [parts.labels[place] for place in each.predicted],
        }
        for name, probes in found.items()
        for each in probes
    ]
    label, share = most_common(parts)
    report = {
        **about,
        "labels": parts.labels,
        "left_out": parts.left_out,
        "train_images": len(parts.train),
        "most_common": {"label": label, "accuracy": share},
        "test_images": [{"image": name, "label": parts.labels[place]} for name, place in parts.test.items()],
        "results": results,
    }
    write_text(output, json_text(report, indent=1) + "\n")
