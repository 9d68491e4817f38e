"""A few examples, a trainer on them, and whole runs."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModel, AutoModelForCausalLM, TrainingArguments

from tests.tiny import byte_level_tokenizer, clip_config, image, image_processor, text_config, tiny
from vlm import recipe
from vlm.data.dataset import TreeCollator, TreeDataset, make_items
from vlm.data.example import Example, question_and_answer
from vlm.training import run as running
from vlm.training.parts import add_lora, set_trainable
from vlm.training.trainer import VLMTrainer

LORA = {
    "parts": ["language"],
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "use_rslora": False,
}
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
    weighting: Any = "equal_tokens",
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
        data_collator=TreeCollator(processor, answer_weighting=weighting),
        rates=rates,
        callbacks=list(callbacks),
    )


RATES = {"projector": 1e-2, "lora": 1e-2}
_OPTIONS: dict[str, Any] = {
    "max_steps": 6,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
}


def lora_trainer(folder: Path, callbacks: Any = (), **changes: Any) -> VLMTrainer:
    """Six steps with LoRA, dropout and accumulation: 7 examples, 2 rows a step; a checkpoint every two steps."""
    model, processor = tiny()
    torch.manual_seed(1)
    adapted = add_lora(model, LORA | {"lora_dropout": 0.3}, RATES)
    return trainer_of(
        folder, RATES, made=(adapted, processor), data=examples(7), callbacks=callbacks, **(_OPTIONS | changes)
    )


def weights(model: Any) -> dict[str, Any]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def save_parts(folder: Path, **changes: Any) -> Path:
    """A vision encoder and a language model, each a folder as the Hub has them; `changes` to the latter's config."""
    torch.manual_seed(0)
    AutoModel.from_config(clip_config()).save_pretrained(folder / "vision")
    image_processor().save_pretrained(folder / "vision")
    tokenizer = byte_level_tokenizer()
    config = text_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **changes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    return folder


def save_images(folder: Path, *, broken: int = 0) -> Path:
    """An image folder: 10 images for training, two captions each, and 3 held out. The first `broken` do not open."""
    folder.mkdir(parents=True)
    for name, numbers in (("train", range(10)), ("test", range(10, 13))):
        rows = []
        for n in numbers:
            image(n).save(folder / f"{n}.png")
            rows.append({"file_name": f"{n}.png", "captions": [ANSWERS[n % 6], ANSWERS[(n + 2) % 6]]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n in range(broken):
        (folder / f"{n}.png").write_bytes(b"not an image")
    return folder


TRAIN = {
    "max_steps": 4,
    "per_device_train_batch_size": 1,
    "use_cpu": True,
    "bf16": False,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "disable_tqdm": True,
}


def recipe_values(parts: Path, images: Path, run: Path) -> dict[str, Any]:
    """A recipe as its YAML file would say it."""
    source = {"format": "image_folder", "path": str(images)}
    return {
        "name": "tiny",
        "model": {"vision": str(parts / "vision"), "language": str(parts / "language")},
        "data": {
            "train": {**source, "metadata": "train.jsonl"},
            "validation": {**source, "metadata": "test.jsonl"},
            "max_bad": 0.5,
            "max_tokens_per_row": 200,
        },
        "trainable": {"projector": 1.0e-2},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "learning_rate": 1.0e-2},
        "train": dict(TRAIN),
        "evaluation": {"metrics": ["exact_match"], "max_new_tokens": 4},
        "output_dir": str(run),
    }


def train(values: dict[str, Any], **options: Any) -> str:
    """Run a recipe; what it said."""
    said = StringIO()
    console = Console(file=said, width=200)
    running.train(recipe.from_dict(values), console=console, **options)
    return said.getvalue()


STAGES = [
    {"name": "align", "trainable": {"projector": 1e-2}, "train": dict(TRAIN)},
    {
        "name": "tune",
        "trainable": {"projector": 1e-3},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "learning_rate": 1e-2},
        "train": dict(TRAIN),
    },
]


def staged(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe with two stages in place of its one."""
    return {key: value for key, value in values.items() if key not in ("trainable", "lora", "train")} | {
        "stages": STAGES,
        "evaluation": {},
    }


class Killed(BaseException):
    pass


def kill_in(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """Die at a step of a stage, as the machine would."""
    from vlm.training.callbacks import MetricsLog

    original = MetricsLog.on_log

    def on_log(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if (self.stage, state.global_step) == (stage, step):
            raise Killed

    monkeypatch.setattr(MetricsLog, "on_log", on_log)
