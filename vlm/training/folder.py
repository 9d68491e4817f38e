"""How far a run has come, by what stands in its folder, and its model there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm.files import atomic_folder, saving
from vlm.processing import pad_left
from vlm.training.quantization import merged


def stage_home(folder: Path, names: Sequence[str], number: int) -> Path:
    """Where a stage leaves its model and its scores: the last one in the run folder itself."""
    return folder if number == len(names) - 1 else folder / "stages" / names[number]


def finished_stages(folder: Path, names: Sequence[str]) -> int:
    """How many of the stages with these `names` have left their model."""
    if has_model(folder):  # those of the stages before may be gone
        return len(names)
    return next(number for number in range(len(names)) if not has_model(stage_home(folder, names, number)))


def begun_stages(folder: Path, names: Sequence[str]) -> int:
    """How many have left their model or a checkpoint."""
    with_checkpoints = [number + 1 for number, name in enumerate(names) if has_checkpoints(folder, name)]
    return max([finished_stages(folder, names), *with_checkpoints])


def unscored_stages(folder: Path, names: Sequence[str]) -> list[int]:
    """The numbers of those that have left their model, but no scores."""
    homes = [stage_home(folder, names, number) for number in range(len(names))]
    return [n for n, home in enumerate(homes) if has_model(home) and not (home / "evaluation/summary.json").is_file()]


def has_model(home: Path) -> bool:
    return (home / "model" / "config.json").is_file()


def has_checkpoints(folder: Path, name: str) -> bool:
    return any((folder / "checkpoints" / name).glob("checkpoint-*"))


def save_stage(home: Path, trained: Any, adapter: Any, processor: Any) -> Any:
    """Leave in `home` what a stage has `trained`: its `adapter`, if it has LoRA, unmerged, and the model with LoRA
    merged in, which is given back. Raises DiskError if that cannot be written."""
    with saving(f"the model in {home}", "Make room, and go on with --resume from the last checkpoint"):
        if adapter is not None:
            adapter.save_pretrained(str(home / "adapter"))  # before it is merged: then there is none any more
        model = merged(trained)
        save_model(model, processor, home / "model")
    return model


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """Write a model and its processor to `folder`, which is there whole or not at all."""
    with atomic_folder(folder) as unfinished:  # a folder called `model` is a whole model
        model.save_pretrained(unfinished)
        if model.can_generate():
            pad_left(processor.tokenizer)
        processor.save_pretrained(unfinished)
