"""Recall on several splits of the stamps: `python -m benchmarks.contrastive [seed ...] [override ...]`.

For each seed (0, 1 and 2) 100 images are held out so that none of their captions is in the training data, and the
recipe `contrastive` is trained on the rest. With it stands a ridge regression from the vision encoder's vectors to
those of the text encoder, fitted on the same pairs, its penalty chosen on a fifth of them: what there is without
training. Writes the table of docs/contrastive.md. Needs what
`vlm fetch clip-vit-base-patch16 all-MiniLM-L6-v2 tuxpaint-stamps` gets.
"""

import json
import sys
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


def prepare(seed: int, overrides: list[str]) -> recipe.Recipe:
    """The recipe on the split of `seed`."""
    names = {"train": f"train-{seed}.jsonl", "test": f"test-{seed}.jsonl"}
    write_stamp_splits(home() / "tuxpaint-stamps", seed, train_name=names["train"], test_name=names["test"])
    return recipe.load(
        "contrastive",
        [
            f"data.train.metadata={names['train']}",
            f"data.validation.metadata={names['test']}",
            f"seed={seed}",
            f"output_dir={OUTPUT / f'contrastive-{seed}'}",
            *overrides,
        ],
    )


def run(loaded: recipe.Recipe, console: Console) -> dict[str, dict]:
    """The scores of the recipe."""
    folder = train(loaded, overwrite=True, console=console)
    return json.loads((folder / "evaluation" / "summary.json").read_text(encoding="utf-8"))["metrics"]


class Encoded:
    """Unit vectors of images `[D]`, with CLIP's own projection, and of their captions `[D_t]`, by the encoders that a
    recipe begins with; each image once for all splits."""

    def __init__(self, loaded: recipe.Recipe) -> None:
        self.model, self.processor = start_model(loaded, None)
        self.model.eval()
        self.known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @torch.no_grad()
    def __call__(self, examples: list[Example]) -> tuple[np.ndarray, np.ndarray]:
        """`[N, D]` and `[N, D_t]`."""
        new = [example for example in examples if example.image_id not in self.known]
        for start in range(0, len(new), 16):
            batch = new[start : start + 16]
            opened = [open_image(example.images[0]) for example in batch]
            pixels = self.processor.image_processor(images=opened, return_tensors="pt")["pixel_values"]
            tokens = tokenize(self.processor.tokenizer, self.model.config, [e.branches[0].answer for e in batch])
            texts = pool_text(self.model.text_model(**tokens), tokens["attention_mask"], "mean")
            images = self.model.get_image_features(pixels).pooler_output
            for example, *found in zip(batch, unit(images).numpy(), unit(texts).numpy(), strict=True):
                self.known[example.image_id] = (found[0], found[1])
        images, texts = zip(*(self.known[example.image_id] for example in examples), strict=True)
        return np.stack(images), np.stack(texts)


def ridge(loaded: recipe.Recipe, encoded: Encoded) -> dict[str, dict]:
    """The regression's scores, in the form of a summary."""
    train, held_out = (read(source).examples for source in (loaded.data.sources[0], loaded.data.validation))
    (images, texts), (test_images, test_texts) = encoded(train), encoded(held_out)
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
    numbers = torch.arange(len(held_out))
    says = torch.tensor([text_number(example.branches[0].answer) for example in held_out])
    shares = recall(scores, positives(numbers, numbers, says).numpy())
    return {name: {"score": share.value, "interval": [share.low, share.high]} for name, share in shares.items()}


def table(rows: dict[str, dict[int, dict[str, dict]]]) -> str:
    """The rows of each kind as Markdown, with 95 % intervals over images or texts, and their means below."""

    def cell(row: dict) -> str:
        return f"{row['score']:.2f} ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})"

    head = [name.replace("_", " ").replace(" r", " R@") for name in SHOWN]
    lines = [f"| | split | {' | '.join(head)} |", "| --- " * (len(SHOWN) + 2) + "|"]
    for kind, of_splits in rows.items():
        for seed, row in of_splits.items():
            lines.append(f"| {kind} | {seed} | {' | '.join(cell(row[name]) for name in SHOWN)} |")
        means = [sum(row[name]["score"] for row in of_splits.values()) / len(of_splits) for name in SHOWN]
        lines.append(f"| {kind} | mean | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    seeds = [int(argument) for argument in arguments if argument.isdigit()] or [0, 1, 2]
    overrides = [argument for argument in arguments if not argument.isdigit()]
    recipes = {seed: prepare(seed, overrides) for seed in seeds}
    encoded = Encoded(recipes[seeds[0]])
    rows = {
        "recipe": {seed: run(loaded, Console()) for seed, loaded in recipes.items()},
        "ridge": {seed: ridge(loaded, encoded) for seed, loaded in recipes.items()},
    }
    if overrides or seeds != [0, 1, 2]:
        print(table(rows))
    else:
        replace_table(DOCUMENT, table(rows), "## On the stamps")


if __name__ == "__main__":
    main(sys.argv[1:])
