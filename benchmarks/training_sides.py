"""The sides of a comparison of training: ours, TRL's SFTTrainer, transformers' Trainer, the same on turns.

Each has a `run(number)` that takes one optimizer step on the examples of that repeat: one row an answer or one tree an
image, in batches of its own size, accumulated to the same step.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks import workload
from benchmarks.workload import Shape
from vlm.data.conversation import IGNORE, TokenizedBranch, tokenize_branch
from vlm.data.dataset import TreeCollator, TreeDataset, make_items, supervised_tokens
from vlm.data.encoding import encode_images, hash_images, keep
from vlm.data.example import Example
from vlm.data.features import FeatureCache
from vlm.data.images import open_image
from vlm.data.tree_masks import TreeMasks
from vlm.training.features import encoder_of
from vlm.training.peak import peak_flops
from vlm.training.step import flops_per_token
from vlm.training.trainer import VLMTrainer
from vlm.tree_attention import tree_attention

MAX_LENGTH = 4096
RATE = 1e-6  # as good as none: each repeat starts from the weights of the first


def arguments(bf16: bool, batch_size: int, accumulate: int) -> dict[str, Any]:
    """TrainingArguments for one step, the same on every side."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": bf16,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulate,
        "gradient_checkpointing": False,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def set_trained(model: Any, trained: str) -> None:
    """`trained` is `projector`, the language model frozen, or `language`, which trains with it."""
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        learns = "multi_modal_projector" in name or (trained == "language" and "vision_tower" not in name)
        parameter.requires_grad_(learns)


class EpochTimer(TrainerCallback):
    """Seconds of an epoch: loading batches, forward, backward and the optimizer, not what Trainer does once a run."""

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.start


def timed(trainer: Trainer) -> dict[str, Any]:
    """Seconds of an epoch of `trainer`, and the loss and MFU that it logs of its only step."""
    trainer.state.log_history.clear()
    trainer.remove_callback(EpochTimer)
    trainer.add_callback(timer := EpochTimer())
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": timer.seconds, "loss": entry["loss"], "mfu": entry.get("mfu")}


class Ours:
    """Trees, tree attention and kept features. With `cached`, images were encoded and words tokenized before."""

    def __init__(self, shape: Shape, trained: str, bf16: bool, *, cached: bool, max_tokens_per_row: int = 4096) -> None:
        self.shape, self.cached, self.max_tokens_per_row = shape, cached, max_tokens_per_row
        self.model, self.processor = workload.ours()
        set_trained(self.model, trained)
        self.args = TrainingArguments(remove_unused_columns=False, **arguments(bf16, 1, 1))
        rows, collator = self.load(shape.examples())
        self.trainer = VLMTrainer(
            model=self.model,
            args=self.args,
            train_dataset=rows,
            data_collator=collator,
            rates=dict.fromkeys(("projector", "language") if trained == "language" else ("projector",), RATE),
        )
        with tree_attention(self.model):  # without it the whole square of a row would be counted
            self.trainer.throughput.flops_per_token = flops_per_token(self.trainer, rows)
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.trainer.throughput.peak_flops = max(peak_flops.__wrapped__(self.args.device, dtype) for _ in range(3))

    def load(self, examples: list[Example]) -> tuple[TreeDataset, TreeCollator]:
        """From examples to rows, as at the start of a stage."""
        cache = FeatureCache(Path(tempfile.mkdtemp()))
        sources = [example.images[0] for example in examples]
        keys = hash_images(sources)
        encode = encoder_of(self.model, self.args)
        images = dict(zip(keys, sources, strict=True))
        keep(cache, encode_images(images, self.processor, encode, broken={}))
        items, _ = make_items(
            examples,
            self.processor,
            max_length=MAX_LENGTH,
            too_long="error",
            report=print,
            features={index: (key,) for index, key in enumerate(keys)},
            progress=lambda steps, total: steps,
        )
        rows = TreeDataset(items, self.max_tokens_per_row)
        self.args.gradient_accumulation_steps = len(rows)
        return rows, TreeCollator(self.processor, cache, TreeMasks(self.model))

    def run(self, number: int) -> dict[str, Any]:
        start = time.perf_counter()
        self.trainer.train_dataset, self.trainer.data_collator = self.load(self.shape.examples(number))
        seconds = time.perf_counter() - start
        with tree_attention(self.model):
            result = timed(self.trainer)
        if not self.cached:
            result["seconds"] += seconds
        return result | {"supervised": supervised_tokens(self.trainer.train_dataset.items)}


class Trl:
    """TRL's SFTTrainer on the stock model, one row an answer."""

    def __init__(self, shape: Shape, trained: str, bf16: bool, *, batch_size: int, attention: str = "sdpa") -> None:
        from trl import SFTConfig, SFTTrainer

        self.shape = shape
        model, self.processor = workload.stock()
        model.set_attn_implementation(attention)
        set_trained(model, trained)
        accumulate = shape.images * shape.answers // batch_size
        options = arguments(bf16, batch_size, accumulate)
        self.trainer = SFTTrainer(
            model=model,
            args=SFTConfig(max_length=None, **options),
            train_dataset=self.rows(0),
            processing_class=self.processor,
        )

    def rows(self, number: int) -> Dataset:
        examples = self.shape.examples(number)
        return Dataset.from_list(
            [
                {
                    "images": [open_image(image) for image in example.images],
                    "prompt": [{**m, "content": _texts(m)} for m in branch.messages[:-1]],
                    "completion": [{**branch.messages[-1], "content": _texts(branch.messages[-1])}],
                }
                for example in examples
                for branch in example.branches
            ]
        )

    def run(self, number: int) -> dict[str, Any]:
        self.trainer.train_dataset = self.rows(number)
        batches = list(self.trainer.get_train_dataloader())
        supervised = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
        return timed(self.trainer) | {"supervised": supervised}


def _texts(message: dict[str, Any]) -> str:
    """TRL puts the images in front of a text itself."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


class Plain:
    """transformers' Trainer on the stock model: one row an answer, or with `turns` one conversation an image."""

    def __init__(
        self, shape: Shape, trained: str, bf16: bool, *, batch_size: int, turns: bool = False, attention: str = "sdpa"
    ) -> None:
        self.shape, self.turns = shape, turns
        model, self.processor = workload.stock()
        _, self.ours = workload.ours()
        model.set_attn_implementation(attention)
        set_trained(model, trained)
        rows = shape.images * (1 if turns else shape.answers)
        self.trainer = Trainer(
            model=model,
            args=TrainingArguments(remove_unused_columns=False, **arguments(bf16, batch_size, rows // batch_size)),
            train_dataset=self.rows(0),
            data_collator=self.collate,
        )

    def rows(self, number: int) -> list[tuple[Any, TokenizedBranch]]:
        examples: Sequence[Example] = self.shape.examples(number)
        if self.turns:
            examples = [workload.as_turns(example) for example in examples]
        return [(e.images[0], tokenize_branch(self.ours, branch)) for e in examples for branch in e.branches]

    def collate(self, rows: Sequence[tuple[Any, TokenizedBranch]]) -> dict[str, torch.Tensor]:
        def padded(name: str, fill: int) -> torch.Tensor:
            sequences = [torch.tensor(getattr(row, name)) for _, row in rows]
            return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=fill)

        ids = padded("input_ids", -1)
        pixels = self.processor.image_processor([open_image(image) for image, _ in rows], return_tensors="pt")
        return {
            "input_ids": ids.clamp(min=0),
            "attention_mask": (ids >= 0).long(),
            "labels": padded("labels", IGNORE),
            "pixel_values": pixels["pixel_values"],
        }

    def run(self, number: int) -> dict[str, Any]:
        self.trainer.train_dataset = rows = self.rows(number)
        supervised = sum(label != IGNORE for _, row in rows for label in row.labels)
        return timed(self.trainer) | {"supervised": supervised}
