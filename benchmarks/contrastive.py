"""Recall on several splits of the stamps: `python -m benchmarks.contrastive [seed ...] [override ...]`.

For each seed (0, 1 and 2) 100 images are held out so that none of their captions is in the training data, and the
recipe `contrastive` is trained on the rest. With it stands a ridge regression from the vision encoder's vectors to
those of the text encoder, fitted on the same pairs, its penalty chosen on a fifth of them: what there is without
training. Writes the table of docs/contrastive.md. Needs what
`vlm fetch clip-vit-base-patch16 all-MiniLM-L6-v2 tuxpaint-stamps` gets.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.noted import ROOT, replace_table
from vlm import recipe
from vlm.data.example import Example
from vlm.data.images import open_image
from vlm.data.pairs import positives, text_number
from vlm.data.readers import read
from vlm.dual_encoder import pool_text, tokenize
from vlm.embedding import unit
from vlm.eval.retrieval import recall
from vlm.quickstart import write_stamp_splits
from vlm.recipe_paths import home
from vlm.training.contrastive import start_model
from vlm.training.run import train

DOCUMENT = ROOT / "docs" / "contrastive.md"
OUTPUT = Path("runs/benchmarks")
SHOWN = ("image_to_text_r1", "image_to_text_r5", "text_to_image_r1", "text_to_image_r5")
PENALTIES = 10.0 ** np.arange(-3, 2)


def run(seed: int, overrides: list[str], console: Console) -> dict[str, dict]:
    """The scores of the recipe and of the regression on the split of `seed`, and the minutes of the former."""
    names = {"train": f"train-{seed}.jsonl", "test": f"test-{seed}.jsonl"}
    write_stamp_splits(home() / "tuxpaint-stamps", seed, train_name=names["train"], test_name=names["test"])
    loaded = recipe.load(
        "contrastive",
        [
            f"data.train.metadata={names['train']}",
            f"data.validation.metadata={names['test']}",
            f"seed={seed}",
            f"output_dir={OUTPUT / f'contrastive-{seed}'}",
            *overrides,
        ],
    )
    start = time.monotonic()
    folder = train(loaded, overwrite=True, console=console)
    minutes = (time.monotonic() - start) / 60
    summary = json.loads((folder / "evaluation" / "summary.json").read_text(encoding="utf-8"))
    return {"recipe": summary["metrics"], "ridge": ridge(loaded), "minutes": {"": minutes}}


def vectors(loaded: recipe.Recipe, examples: list[Example]) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Unit vectors of images `[N, D]`, with CLIP's own projection, and of their captions `[N, D_t]`, by the encoders
    that the recipe begins with; and what each caption says."""
    model, processor = start_model(loaded, None)
    model.eval()
    images, texts = [], []
    captions = [example.branches[0].answer for example in examples]
    with torch.no_grad():
        for start in range(0, len(examples), 16):
            opened = [open_image(example.images[0]) for example in examples[start : start + 16]]
            pixels = processor.image_processor(images=opened, return_tensors="pt")["pixel_values"]
            images.append(model.get_image_features(pixels).pooler_output)
            tokens = tokenize(processor.tokenizer, model.config, captions[start : start + 16])
            texts.append(pool_text(model.text_model(**tokens), tokens["attention_mask"], "mean"))
    says = torch.tensor([text_number(caption) for caption in captions])
    return unit(torch.cat(images)).numpy(), unit(torch.cat(texts)).numpy(), says


def ridge(loaded: recipe.Recipe) -> dict[str, dict]:
    """The regression's scores, in the form of a summary."""
    groups = [read(source).examples for source in (loaded.data.sources[0], loaded.data.validation)]
    (images, texts, _), (test_images, test_texts, says) = (vectors(loaded, group) for group in groups)
    order = np.random.default_rng(0).permutation(len(images))
    check, learn = order[: len(order) // 5], order[len(order) // 5 :]

    def similar(penalty: float, x: np.ndarray, y: np.ndarray, new: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        means = x.mean(axis=0), y.mean(axis=0)
        x, y = x - means[0], y - means[1]
        weight = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
        sides = [torch.tensor((new - means[0]) @ weight), torch.tensor(candidates - means[1])]
        return (unit(sides[0]) @ unit(sides[1]).T).numpy()

    def right(penalty: float) -> float:
        scores = similar(penalty, images[learn], texts[learn], images[check], texts[check])
        return float((scores.argmax(axis=1) == np.arange(len(check))).mean())

    scores = similar(max(PENALTIES, key=right), images, texts, test_images, test_texts)
    numbers = torch.arange(len(says))
    shares = recall(scores, positives(numbers, numbers, says).numpy())
    return {name: {"score": share.value, "interval": [share.low, share.high]} for name, share in shares.items()}


def table(rows: dict[int, dict[str, dict]]) -> str:
    """The rows as Markdown, with 95 % intervals over images or texts, and their means below."""

    def cell(row: dict) -> str:
        return f"{row['score']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})"

    head = [name.replace("_", " ").replace(" r", " R@") for name in SHOWN]
    lines = [f"| split | | {' | '.join(head)} | minutes |", "| --- " * (len(SHOWN) + 3) + "|"]
    for kind in ("recipe", "ridge"):
        for seed, row in rows.items():
            minutes = f"{row['minutes']['']:.1f}" if kind == "recipe" else ""
            lines.append(f"| {seed} | {kind} | {' | '.join(cell(row[kind][name]) for name in SHOWN)} | {minutes} |")
        means = [sum(row[kind][name]["score"] for row in rows.values()) / len(rows) for name in SHOWN]
        lines.append(f"| mean | {kind} | {' | '.join(f'{mean:.2f}' for mean in means)} | |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    seeds = [int(argument) for argument in arguments if argument.isdigit()] or [0, 1, 2]
    overrides = [argument for argument in arguments if not argument.isdigit()]
    rows = {seed: run(seed, overrides, Console()) for seed in seeds}
    if overrides or seeds != [0, 1, 2]:
        print(table(rows))
    else:
        replace_table(DOCUMENT, table(rows), "## On the stamps")


if __name__ == "__main__":
    main(sys.argv[1:])
