"""Trained and untrained encoders on the stamps' folders: `python -m benchmarks.probe [seed ...]` writes the table and
the picture in docs/recognition.md.

For each seed (0, 1 and 2 unless said) a fifth of each label's images is held out, and the label, which is the folder
that a stamp is in, is learnt from the rest as `vlm probe` does it. An untrained network has the configuration of a
trained one and the weights that its library starts training from. EfficientNet-Lite0 is there untrained in two ways:
its BatchNorm layers as they are made, which normalise nothing, and with the statistics of 256 of the images.

Features are kept in `runs/benchmarks/probe`; remove the folder to have the images encoded anew. Needs what
`vlm quickstart` fetches, and fetches EfficientNet-Lite0.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from benchmarks.noted import ROOT, replace_table
from vlm.data.images import open_image
from vlm.embedding import load_embedder
from vlm.eval.metrics import Scores, bootstrap_interval, mean
from vlm.eval.top_k import Share
from vlm.quickstart import efficientnet_lite0
from vlm.recipe_paths import home
from vlm.recognition.labelled_images import LabelledImages, read_labelled_images
from vlm.recognition.linear_probe import ITERATIONS
from vlm.recognition.probes import probe
from vlm.recognition.splits import Parts, split

OUTPUT = Path("runs/benchmarks/probe")
TEST_SIZE = 0.2
KS = (1, 20)
MEASURED = 256
"""Images whose statistics an untrained BatchNorm gets."""

Found = dict[str, dict[str, Share]]
"""Top-1 accuracy by encoder and probe."""


def untrained(trained: Path, folder: Path, images: Tensor | None = None) -> str:
    """A network of the same configuration with new weights, in `folder`. With `images [N, 3, H, W]` its BatchNorm
    layers have the statistics that these have there."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(trained))
    if images is not None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # the mean over all batches
        model.train()
        with torch.no_grad():
            for batch in images.split(32):
                model(pixel_values=batch)
    model.save_pretrained(folder)
    AutoImageProcessor.from_pretrained(trained).save_pretrained(folder)
    return str(folder)


def encoders(stamps: LabelledImages, scratch: Path) -> dict[str, Callable[[], str]]:
    """What gives the folder of each encoder, by its name in the table."""
    clip, efficientnet = home() / "clip-vit-base-patch16", efficientnet_lite0()

    def measured() -> str:
        drawn = np.random.default_rng(0).choice(list(stamps.images), MEASURED, replace=False)
        prepare = load_embedder(str(efficientnet)).prepare_images
        pixels = prepare([open_image(name) for name in drawn])["pixel_values"]
        return untrained(efficientnet, scratch / "measured", pixels)

    return {
        "CLIP ViT-B/16": lambda: str(clip),
        "EfficientNet-Lite0": lambda: str(efficientnet),
        "EfficientNet-Lite0, untrained": lambda: untrained(efficientnet, scratch / "efficientnet"),
        "EfficientNet-Lite0, untrained, statistics measured": measured,
        "CLIP ViT-B/16, untrained": lambda: untrained(clip, scratch / "clip"),
    }


def features_of(name: str, folder: Callable[[], str], stamps: LabelledImages) -> Tensor:
    """`[images, D]`, unit vectors."""
    kept = OUTPUT / f"{name.replace('/', '-')}.safetensors"
    if not kept.exists():
        batches = load_embedder(folder()).embed_images(stamps.images, broken={})
        features = torch.cat([batch.features.cpu() for batch in batches])
        OUTPUT.mkdir(parents=True, exist_ok=True)
        save_file({"features": features}, kept)
    return load_file(kept)["features"]


def score(features: Tensor, places: dict[str, int], splits: list[Parts]) -> dict[str, Share]:
    """Accuracy of each probe over all splits. An image that is held out in several is resampled as one."""
    hits: dict[str, list[float]] = {}
    images = [name for parts in splits for name in parts.test]
    for seed, parts in enumerate(splits):
        train, test = (features[[places[name] for name in part]] for part in (parts.train, parts.test))
        targets, answers = (torch.tensor(list(part.values())) for part in (parts.train, parts.test))
        for found in probe(train, targets, test, answers, len(parts.labels), KS, seed=seed):
            right = (torch.tensor(found.predicted) == answers).double().tolist()
            hits.setdefault(found.probe, []).extend(right)
            if not found.converged:
                print(f"split {seed}: the linear probe was still moving after {ITERATIONS:,} iterations")
    shares = {}
    for name, values in hits.items():
        right = np.array(values)
        scores = Scores(right, np.stack([right, np.ones_like(right)], axis=-1), mean)
        shares[name] = Share(scores.score, *bootstrap_interval(scores, images))
    return shares


def table(found: Found) -> str:
    probes = list(next(iter(found.values())))
    lines = ["| encoder | " + " | ".join(probes) + " |", "| --- " * (len(probes) + 1) + "|"]
    for encoder, shares in found.items():
        cells = [f"{s.value:.2f} ({s.low:.2f} to {s.high:.2f})" for s in shares.values()]
        lines.append("| " + " | ".join([encoder, *cells]) + " |")
    return "\n".join(lines) + "\n"


def plot(found: Found, chance: float, most_common: float, path: Path) -> None:
    """Bars of each probe for each encoder, with their intervals, and what needs no features."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    probes = list(next(iter(found.values())))
    thick = 0.8 / len(probes)
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for number, name in enumerate(probes):
        shares = [each[name] for each in found.values()]
        bars = axes.barh(
            [row + (number - (len(probes) - 1) / 2) * thick for row in range(len(found))],
            [share.value for share in shares],
            thick * 0.92,
            xerr=np.array([(s.value - s.low, s.high - s.value) for s in shares]).T,
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "0.25"},
            label=name,
        )
        for bar, share in zip(bars, shares, strict=True):
            middle = bar.get_y() + bar.get_height() / 2
            axes.text(0.01, middle, f"{share.value:.2f}", va="center", color="white", fontsize=8, fontweight="bold")
    axes.axvline(chance, color="0.4", linestyle=":", label=f"by chance, {chance:.2f}")
    axes.axvline(most_common, color="0.1", linestyle="--", label=f"always the commonest label, {most_common:.2f}")
    axes.set_yticks(range(len(found)), [name.replace(", ", "\n", 1) for name in found])
    axes.invert_yaxis()
    axes.set(xlabel="top-1 accuracy on images held out, with 95 % intervals", xlim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", framealpha=1)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str]) -> None:
    console = Console()
    stamps = read_labelled_images(str(home() / "tuxpaint-stamps"), "category")
    labels = {name: stamps.labels[target] for name, target in zip(stamps.images, stamps.targets, strict=True)}
    splits = [split(labels, TEST_SIZE, int(seed)) for seed in arguments or ("0", "1", "2")]
    for line in splits[0].left_out:
        console.print(f"left out: {line}", markup=False, highlight=False)
    places = {name: place for place, name in enumerate(stamps.images)}
    found: Found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in track(encoders(stamps, Path(scratch)).items(), "encoders", console=console):
            found[name] = score(features_of(name, folder, stamps), places, splits)
            console.print(name, {key: str(share) for key, share in found[name].items()}, highlight=False)
    tested = Counter(place for parts in splits for place in parts.test.values())
    chance, most_common = 1 / len(splits[0].labels), max(tested.values()) / tested.total()
    plot(found, chance, most_common, ROOT / "docs" / "images" / "probe.png")
    replace_table(ROOT / "docs" / "recognition.md", table(found), after="## What is measured")


if __name__ == "__main__":
    main(sys.argv[1:])
