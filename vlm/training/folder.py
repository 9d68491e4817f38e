"""How far a run has come, by what stands in its folder, and its model there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vlm.disk_faults import saving
from vlm.errors import UserError
from vlm.files import atomic_folder, write_text
from vlm.hashes import hashes
from vlm.processing import pad_left
from vlm.training.checkpoints import changed
from vlm.training.finite import require_finite
from vlm.training.quantization import merged

MODEL_HASHES = "model_hashes.json"
"""The file next to a stage's model that has the SHA-256 of each of its files."""


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
    merged in, which is given back.

    Raises DiskError if that cannot be written, and NonFiniteWeights, with nothing written, if merged weights are not
    finite.
    """
    advice = "Make room, and go on with --resume from the last checkpoint"
    with saving(f"the model in {home}", advice), ExitStack() as stack:
        if adapter is not None:  # before it is merged: then there is none any more
            shutil.rmtree(home / "adapter", ignore_errors=True)  # of a try that was stopped before the model was saved
            adapter.save_pretrained(str(stack.enter_context(atomic_folder(home / "adapter"))))
        model = merged(trained)
        require_finite(model, "the model with LoRA merged in" if adapter else "the model")
        stack.close()
        save_model(model, processor, home / "model")
    return model


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """Write a model and its processor to `folder`, which is there whole or not at all, and the hashes of its files next
    to it."""
    with atomic_folder(folder) as unfinished:  # a folder called `model` is a whole model
        model.save_pretrained(unfinished)
        if model.can_generate():
            pad_left(processor.tokenizer)
        processor.save_pretrained(unfinished)
        names = [path.relative_to(unfinished).as_posix() for path in sorted(unfinished.rglob("*")) if path.is_file()]
        write_text(folder.with_name(MODEL_HASHES), json.dumps(hashes(unfinished, names), indent=1))


def require_unchanged(home: Path) -> None:
    """Raise UserError if the model in `home` is not what its stage has left. Older runs have no hashes of it."""
    file = home / MODEL_HASHES
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        raise UserError(f"{file} cannot be read; remove it to use {home / 'model'} unchecked") from None
    if why := changed(home / "model", before):
        raise UserError(
            f"{home / 'model'} is damaged: {why}. Put back a copy, or remove this folder: --resume then makes the "
            f"model anew from the last checkpoint of its stage. If you have changed it on purpose, remove {file}"
        )
