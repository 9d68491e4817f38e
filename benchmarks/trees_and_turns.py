"""What exactness buys: an image's answers as a tree against the same as turns of one conversation.

`python -m benchmarks.trees_and_turns [easy_vqa] [stamps]` trains the quickstart's models both ways, on the same images,
answers, order and number of steps, three seeds each, and asks each held-out question alone. In turns, as in LLaVA's mix
of questions, an answer sees the questions and answers before it. Prints and writes
`runs/benchmarks/trees_and_turns.md`: scores with 95 % intervals, and their paired difference. Needs what
`vlm quickstart` fetches; what is finished already is not run again.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.workload import as_turns
from vlm import generation, recipe
from vlm.data.example import Example
from vlm.data.readers import read
from vlm.eval import evaluate
from vlm.precision import generation_in_bfloat16
from vlm.quickstart import write_stamp_splits
from vlm.recipe_paths import home
from vlm.training.run import train

OUTPUT = Path("runs/benchmarks/trees_and_turns")
SEEDS = (0, 1, 2)
WAYS = ("trees", "turns")
IMAGES_PER_STEP = 8


@dataclass
class Task:
    """A recipe, how many images it is trained and scored on, the metric, and the languages of the captions."""

    recipe: str
    images: int
    test_images: int
    metric: str
    max_new_tokens: int
    languages: tuple[str, ...] = ()

    def examples(self, seed: int) -> tuple[list[Example], list[Example], Path]:
        """To train on, to score on, and the folder of the images."""
        loaded = recipe.load(self.recipe)
        sources = [dict(loaded.data.train, limit=self.images), dict(loaded.data.validation, limit=self.test_images)]
        if self.languages:
            names = [f"{part}-{seed}-{'-'.join(self.languages)}.jsonl" for part in ("train", "test")]
            write_stamp_splits(
                home() / "tuxpaint-stamps", seed, languages=self.languages, train_name=names[0], test_name=names[1]
            )
            sources = [dict(source, metadata=name) for source, name in zip(sources, names, strict=True)]
        found = [read(source, base_dir=Path(loaded.data.base_dir)).examples for source in sources]
        folder = Path(loaded.data.train.get("path") or loaded.data.train["images"])
        return found[0], found[1], folder


TASKS = {
    "easy_vqa": Task("easy_vqa", images=400, test_images=200, metric="exact_match", max_new_tokens=4),
    "stamps": Task(
        "quickstart", images=849, test_images=100, metric="cider_d", max_new_tokens=24, languages=("de", "fr")
    ),
}


def shuffled(example: Example, rng: random.Random) -> Example:
    """The answers in another order: in turns, each should come first, where it sees no other, as often as the rest."""
    return replace(example, branches=tuple(rng.sample(example.branches, len(example.branches))))


def write_rows(examples: Sequence[Example], path: Path) -> None:
    """One line for each conversation; those about the same image are put together again when they are read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"file_name": str(Path(str(e.images[0])).resolve()), "messages": branch.messages}
        for e in examples
        for branch in e.branches
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(name: str, seed: int, way: str, console: Console) -> np.ndarray:
    """The score of each held-out item `[items]`, in order, and with it the number of its image `[items, 2]`."""
    task, folder = TASKS[name], OUTPUT / f"{name}-{seed}-{way}"
    train_on, score_on, images = task.examples(seed)
    rng = random.Random(seed)
    train_on = [shuffled(example, rng) for example in train_on]
    if way == "turns":
        train_on = [as_turns(example) for example in train_on]
    rows = (OUTPUT / f"{name}-{seed}-{way}.jsonl").resolve()
    write_rows(train_on, rows)
    source = {"format": "image_folder", "path": str(images.resolve()), "metadata": str(rows)}
    overrides = [
        f"data.train={json.dumps(source)}",
        "data.validation=null",
        "data.max_tokens_per_row=1",  # an image a row, so that both ways take the same steps
        f"train.per_device_train_batch_size={IMAGES_PER_STEP}",
        "train.num_train_epochs=1",
        "train.save_strategy=no",
        "train.eval_strategy=no",
        "evaluation.metrics=[]",
        f"seed={seed}",
        f"output_dir={folder}",
    ]
    if not (folder / "model" / "config.json").is_file():
        train(recipe.load(task.recipe, overrides), overwrite=True, console=console)
    if not (folder / "scores" / "predictions.jsonl").is_file():
        model, processor = generation.load(str(folder))

        def predict(requests: list) -> list[str]:
            return generation.generate(model, processor, requests, max_new_tokens=task.max_new_tokens)

        with generation_in_bfloat16(model):
            evaluate(score_on, predict, [task.metric], output_dir=folder / "scores", seed=seed, blind=False)
    lines = (folder / "scores" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    numbers = {image: i for i, image in enumerate(dict.fromkeys(row["image_id"] for row in found))}
    return np.array([[row["scores"][task.metric], numbers[row["image_id"]]] for row in found])


def interval(found: Sequence[np.ndarray], resamples: int = 2000) -> tuple[float, float, float]:
    """Mean over seeds of the mean over items, with its 95 % interval over images (percentile bootstrap, all items of an
    image together). `found` has `[items, 2]` for each seed."""
    rng = np.random.default_rng(0)
    sums = []
    for scores in found:
        groups = scores[:, 1].astype(int)
        sums.append((np.bincount(groups, scores[:, 0]), np.bincount(groups)))
    draws = []
    for _ in range(resamples):
        means = []
        for total, count in sums:
            chosen = rng.integers(0, len(count), len(count))
            means.append(total[chosen].sum() / count[chosen].sum())
        draws.append(np.mean(means))
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(np.mean([scores[:, 0].mean() for scores in found])), float(low), float(high)


def table(found: dict[tuple[str, int, str], np.ndarray]) -> str:
    lines = ["| task | seed | trees | turns | difference |", "| --- | --- | --- | --- | --- |"]
    for name in dict.fromkeys(key[0] for key in found):
        seeds = [seed for seed in SEEDS if all((name, seed, way) in found for way in WAYS)]
        for chosen in [*([seed] for seed in seeds), seeds]:
            sides = [[found[name, seed, way] for seed in chosen] for way in WAYS]
            paired = [np.column_stack([a[:, 0] - b[:, 0], a[:, 1]]) for a, b in zip(*sides, strict=True)]
            cells = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in map(interval, [*sides, paired])]
            label = str(chosen[0]) if len(chosen) == 1 else "all"
            lines.append(f"| {name}, {TASKS[name].metric} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(names: list[str]) -> None:
    console = Console()
    found: dict[tuple[str, int, str], np.ndarray] = {}
    for name in names or TASKS:
        for seed in SEEDS:
            for way in WAYS:
                found[name, seed, way] = run(name, seed, way, console)
    text = table(found)
    OUTPUT.with_suffix(".md").write_text(text, encoding="utf-8")
    console.print(text, markup=False)


if __name__ == "__main__":
    main(sys.argv[1:])
