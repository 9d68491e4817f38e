"""A training step with tree attention against one with masked SDPA: `python -m benchmarks.tree_attention [RECIPE ...]`.

Both see the same rows, weights and precision, in alternation. For each recipe (`quickstart` and `easy_vqa` by default)
the medians of forward and backward and their ratio are printed and written into `runs/benchmarks/tree_attention.md`.
Needs what `vlm quickstart` fetches.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vlm import recipe
from vlm.build import build
from vlm.data.dataset import TreeCollator, TreeDataset, make_items
from vlm.data.readers import read
from vlm.data.tree_masks import TreeMasks
from vlm.precision import default_device, fast_bfloat16
from vlm.training.parts import add_lora, set_trainable
from vlm.training.trainer import supervised_loss
from vlm.tree_attention import tree_attention

OUTPUT = Path("runs/benchmarks/tree_attention.md")
REPEATS = 9
EXAMPLES = 32


def steps_of(name: str) -> tuple[Callable[[], float], Callable[[], float]]:
    """Two functions that take a step of the recipe `name`, with tree attention and without, and give its loss."""
    loaded = recipe.load(name)
    stage, spec = loaded.stages[0], loaded.model
    model, processor = build(
        **spec.model_dump(exclude={"pretrained", "adapter"}),
        **spec.adapter.model_dump(exclude={"data_dependent_init"}),
    )
    examples = read(loaded.data.train, base_dir=Path(loaded.data.base_dir)).examples[:EXAMPLES]
    items, _ = make_items(
        examples, processor, max_length=10**6, too_long="error", report=print, progress=lambda steps, total: steps
    )
    rows = TreeDataset(items, loaded.data.max_tokens_per_row, loaded.seed)
    batch = TreeCollator(processor, masks=TreeMasks(model))(
        [rows[i] for i in range(stage.train["per_device_train_batch_size"])]
    )
    device = torch.device(default_device())
    network = model.to(device)
    with torch.no_grad():
        features, grid = network.get_vision_features(batch.pop("pixel_values").to(device))
    labels, layout = batch.pop("labels").to(device), batch.pop("tree_layout")
    inputs = {key: value.to(device) for key, value in batch.items()}
    keep = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
    trained = network
    if stage.lora:
        trained = add_lora(network, stage.lora.model_dump(), stage.learning_rates)
    set_trainable(trained, stage.learning_rates)

    def step(**more: object) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device.type)):
            outputs = trained(
                **inputs, **more, vision_features=features, vision_grid=grid, logits_to_keep=keep, use_cache=False
            )
            loss = supervised_loss(outputs, labels)
        loss.backward()
        trained.zero_grad()
        return float(loss.detach())

    def with_trees() -> float:
        with tree_attention(network):
            return step(tree_layout={key: value.to(device) for key, value in layout.items()})

    return with_trees, step


def compare(name: str) -> str:
    """A row of the table."""
    ways = steps_of(name)
    losses = [way() for way in ways]
    assert abs(losses[0] - losses[1]) < 2e-2 * losses[1], f"{name}: the losses differ: {losses}"
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for way, found in zip(ways, seconds, strict=True):
            start = time.monotonic()
            way()
            found.append(time.monotonic() - start)
    tree, masked = map(statistics.median, seconds)
    return f"| {name} | {masked:.2f} s | {tree:.2f} s | {masked / tree:.2f} |"


def main(names: list[str]) -> None:
    rows = ["| recipe | masked SDPA | tree attention | times as fast |", "| --- | --- | --- | --- |"]
    rows += [compare(name) for name in names or ["quickstart", "easy_vqa"]]
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print("\n".join(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
