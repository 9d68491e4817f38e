"""Bridges side by side: `python -m benchmarks.bridges [easy_vqa] [stamps]`.

The quickstart's two models are joined by each bridge and trained on the same images in the same order, for the same
number of steps, at the same rates, three seeds each. Images are small, so that it all takes about an hour on two cores.
Prints and writes `runs/benchmarks/bridges.md` and `.png`: the score on held-out images, the score with another image in
place of the right one (blind), tokens an image, and the time of an image in training, taken in a few steps of each, one
after the other. Needs what `vlm quickstart` fetches; what is finished already is not run again.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm import recipe
from vlm.training.run import train

OUTPUT = Path("runs/benchmarks/bridges")
SEEDS = (0, 1, 2)
BRIDGES: dict[str, dict[str, Any]] = {
    "linear": {"projector": "linear"},
    "mlp": {"projector": "mlp"},
    "pixel_shuffle": {"projector": "pixel_shuffle"},
    "average_pool": {"projector": {"type": "average_pool", "num_image_tokens": 16}},
    "resampler": {"projector": {"type": "resampler", "num_image_tokens": 16}},
    "qformer": {"projector": {"type": "qformer", "num_image_tokens": 16}},
    "cross_attention": {"projector": {"type": "resampler", "num_image_tokens": 16}, "fusion": "cross_attention"},
}
TASKS = {"easy_vqa": ("easy_vqa", "exact_match", 150, 50), "stamps": ("quickstart", "cider_d", 400, 100)}
"""A recipe, its metric, and how many images it is trained and scored on."""

SAME = [
    "model.image_size=128",  # 8 x 8 patches
    "model.vision_feature_select_strategy=default",  # no class token, for which some bridges have no place
    "data.max_tokens_per_row=1",  # an image a row, so that all take the same steps
    "train.per_device_train_batch_size=4",
    "train.num_train_epochs=1",
    "train.save_strategy=no",
    "train.eval_strategy=no",
    "train.warmup_steps=5",
    "lora.learning_rate=5.0e-4",
]


def overrides(task: str, bridge: str, seed: int) -> list[str]:
    _, _, images, held_out = TASKS[task]
    parts = ["projector", *(["fusion"] if "fusion" in BRIDGES[bridge] else [])]
    return [
        *SAME,
        f"data.train.limit={images}",
        f"data.validation.limit={held_out}",
        f"model.adapter={json.dumps(BRIDGES[bridge])}",
        f"trainable={json.dumps(dict.fromkeys(parts, 1e-3))}",
        f"seed={seed}",
    ]


def run(task: str, bridge: str, seed: int, console: Console) -> dict[str, Any]:
    """The row of the metric in the run's summary, with the tokens an image."""
    name, metric, *_ = TASKS[task]
    folder = OUTPUT / f"{task}-{bridge}-{seed}"
    kept = folder / "result.json"
    if not kept.is_file():
        settings = [*overrides(task, bridge, seed), f"evaluation.metrics=[{metric}]", f"output_dir={folder}"]
        train(recipe.load(name, settings), overwrite=True, console=console)
        summary = json.loads((folder / "evaluation" / "summary.json").read_text(encoding="utf-8"))
        config = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
        # With cross-attention the text has one token an image, and the blocks read what the projector makes.
        tokens = BRIDGES[bridge]["projector"]["num_image_tokens"] if "fusion" in BRIDGES[bridge] else None
        result = {**summary["metrics"][metric], "tokens": tokens or config["image_seq_length"]}
        kept.write_text(json.dumps(result), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def seconds_an_image(task: str, bridge: str, console: Console) -> float:
    """In eight steps of training, the encoder's features on disk."""
    folder = OUTPUT / f"{task}-{bridge}-time"
    settings = ["train.max_steps=8", "evaluation.metrics=[]", f"output_dir={folder}"]
    train(recipe.load(TASKS[task][0], [*overrides(task, bridge, 0), *settings]), overwrite=True, console=console)
    last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return 1 / last["images_per_second"]


Found = dict[tuple[str, str], list[dict[str, Any]]]


def table(found: Found, seconds: dict[tuple[str, str], float]) -> str:
    """Means over the seeds, and their range."""
    lines = [
        "| task | bridge | tokens | score (seeds) | blind | s an image |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (task, bridge), rows in found.items():
        scores = [row["score"] for row in rows]
        lines.append(
            f"| {task}, {TASKS[task][1]} | `{bridge}` | {rows[0]['tokens']} "
            f"| {statistics.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f}) "
            f"| {statistics.mean(row['blind_score'] for row in rows):.3f} | {seconds[task, bridge]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(found: Found, seconds: dict[tuple[str, str], float], path: Path) -> None:
    """Scores of all seeds against the time of an image, one panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(task for task, _ in found))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4.2), squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        for key, rows in ((key, rows) for key, rows in found.items() if key[0] == task):
            label = f"{key[1]} ({rows[0]['tokens']})"
            axes.plot([seconds[key]] * len(rows), [row["score"] for row in rows], "o", label=label)
        blind = [row["blind_score"] for key, rows in found.items() if key[0] == task for row in rows]
        axes.axhspan(min(blind), max(blind), alpha=0.2, color="grey", label="blind")
        axes.set(title=task, xlabel="seconds an image in training", ylabel=TASKS[task][1], xlim=(0, None))
        axes.grid(alpha=0.3)
    panels[0][-1].legend(title="bridge (tokens an image)", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(names: list[str]) -> None:
    console = Console()
    found: Found = {}
    for seed in SEEDS:
        for task in names or TASKS:
            for bridge in BRIDGES:
                found.setdefault((task, bridge), []).append(run(task, bridge, seed, console))
    seconds = {(task, bridge): seconds_an_image(task, bridge, console) for task, bridge in found}
    OUTPUT.with_suffix(".md").write_text(table(found, seconds), encoding="utf-8")
    plot(found, seconds, OUTPUT.with_suffix(".png"))
    console.print(table(found, seconds), markup=False)


if __name__ == "__main__":
    main(sys.argv[1:])
