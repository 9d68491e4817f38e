"""A few examples, and a trainer on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from tests.tiny import image, tiny
from vlm.data.dataset import TreeCollator, TreeDataset, make_items
from vlm.data.example import Example, question_and_answer
from vlm.training.parts import set_trainable
from vlm.training.trainer import VLMTrainer

ANSWERS = ["a cat", "a dog and a cat on the street", "2", "no", "a cat and a dog and a cat", "on the street"]


def examples(count: int = 8, branches: int = 2) -> list[Example]:
    """Answers of very different lengths, so that a mean of means is not the mean."""
    return [
        Example(
            (image(n),),
            tuple(question_and_answer(f"what {b}", ANSWERS[(n * branches + b) % 6]) for b in range(branches)),
            str(n),
            f"row {n}",
        )
        for n in range(count)
    ]


def rows_of(processor: Any, made: list[Example], max_tokens: int = 1, seed: int = 0) -> TreeDataset:
    """One example a row, unless `max_tokens` has room for more."""
    items, _ = make_items(
        made, processor, max_length=1000, too_long="error", report=print, progress=lambda steps, total: steps
    )
    return TreeDataset(items, max_tokens, seed)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        **(defaults | changes),
    )


def trainer_of(
    folder: Path,
    rates: dict[str, float] | None = None,
    *,
    made: tuple[Any, Any] | None = None,
    data: list[Example] | None = None,
    callbacks: Any = (),
    eval_data: list[Example] | None = None,
    **changes: Any,
) -> VLMTrainer:
    model, processor = made or tiny()
    rates = rates or {"projector": 1e-2}
    set_trainable(model, rates)
    return VLMTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=rows_of(processor, data or examples()),
        eval_dataset=rows_of(processor, eval_data, 150) if eval_data else None,
        data_collator=TreeCollator(processor),
        rates=rates,
        callbacks=list(callbacks),
    )


def weights(model: Any) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
