"""The trainer of vision-language models: rows of trees, and the loss on supervised tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler

from vlm.data.batches import RowSampler
from vlm.data.conversation import IGNORE
from vlm.data.dataset import TreeDataset, shifted
from vlm.data.stream import StreamCollator, StreamDataset
from vlm.training.inputs import training_inputs
from vlm.training.part_trainer import PartTrainer
from vlm.training.parts import freeze_state
from vlm.training.throughput import CountingCollator
from vlm.training.unused import drop_gradients_of_images
from vlm.tree_attention import sum_by_index


def stream_file(process: int) -> str:
    """What the file in a checkpoint is called that says where a process is in a stream."""
    return f"stream_{process}.json"


def supervised_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy summed over supervised tokens, divided by those of the whole global batch; with `weights [B, L]` of
    the labels a weighted sum, and divided by the sum of weights.

    Of the stock vision-language classes 26 do not divide so by themselves, and then accumulating gradients changes
    the result. `outputs.logits` are `[S, V]`, one row a supervised token; models that do not know `logits_to_keep`
    give `[B, L, V]`.
    """
    losses, _ = token_losses(outputs, labels)
    each = torch.ones_like(losses) if weights is None else weights[:, 1:][labels[:, 1:] != IGNORE]
    return (losses * each).sum() / (each.sum() if num_items_in_batch is None else num_items_in_batch)


def token_losses(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy `[S]` of each supervised token, and the row `[S]` it stands in."""
    targets = shifted(labels)
    keep = targets != IGNORE
    logits = outputs.logits if outputs.logits.ndim == 2 else outputs.logits[keep]
    return F.cross_entropy(logits.float(), targets[keep], reduction="none"), keep.nonzero()[:, 0]


class VLMTrainer(PartTrainer):
    """Trains on rows of trees, or on a stream of them."""

    train_dataset: TreeDataset | StreamDataset
    data_collator: Any
    less_memory = (
        "Set train.activation_checkpointing: true, or halve train.per_device_train_batch_size and double "
        "gradient_accumulation_steps, which changes nothing else; or, in a run that begins anew, lower "
        "data.max_tokens_per_row, or set model.quantization_config or train.auto_find_batch_size: true"
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(compute_loss_func=supervised_loss, **kwargs)
        # The loss is ours: the model need not be told how many items it is divided by.
        self.model_accepts_loss_kwargs = False
        self._loss_shifts_labels = True
        self._images_in_step = False
        self.measures: list[Callable[[float], dict[str, float]]] = []
        """What else an evaluation gives: called with the held-out loss, after it."""

    @property
    def _adds_blank_rows(self) -> bool:
        return getattr(self.data_collator, "blank", None) is not None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in Trainer, and in each batch what is counted of it."""
        collator = self.data_collator
        self.data_collator = CountingCollator(collator)
        if isinstance(self.train_dataset, StreamDataset):
            self.data_collator = StreamCollator(self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Batches of rows of about the same length, the same however they are divided among processes; a stream makes
        its own."""
        if isinstance(self.train_dataset, StreamDataset):
            return SequentialSampler(self.train_dataset)
        together = 1 if self.args.dataloader_drop_last else self._train_batch_size * self.args.world_size
        return RowSampler(self.train_dataset, self.get_total_train_batch_size(self.args), together)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(self.train_dataset, StreamDataset):
            self.train_dataset.trained(inputs.pop("trained"))
        self._images_in_step |= bool(inputs["counts"][:, 0].any())
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The head runs on supervised positions alone: `[B, L, V]` logits never exist."""
        freeze_state(model, self.rates)
        given = {key: value for key, value in inputs.items() if key != "loss_weights"}
        given = training_inputs(self.accelerator.unwrap_model(model).config, given, inputs["labels"])
        # Trainer hands outputs, labels and their number to its loss, and nothing else.
        self.compute_loss_func = partial(supervised_loss, weights=inputs.get("loss_weights"))
        return super().compute_loss(model, given, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in PartTrainer. If no process had an image in this step, weights that only images reach stay as they are,
        as they do in one process."""
        if self._adds_blank_rows:
            seen = torch.tensor([self._images_in_step], device=self.args.device)
            if not bool(self.accelerator.gather(seen).any()):
                drop_gradients_of_images(self.accelerator.unwrap_model(model))
            self._images_in_step = False
        return super()._get_grad_norm(model, grad_norm)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What the loss is divided by: as in Trainer the supervised tokens of the global batch, or their weights."""
        if not batch_samples or "loss_weights" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        weights = [batch["loss_weights"][:, 1:] * (batch["labels"][:, 1:] != IGNORE) for batch in batch_samples]
        total = torch.stack([weight.sum() for weight in weights]).sum().to(device)
        return self.accelerator.gather(total).sum()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, None, None]:
        """The loss alone, as in training."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        losses, rows = token_losses(outputs, inputs["labels"])
        each = torch.stack([losses, torch.ones_like(losses)], dim=1).double()
        sums = sum_by_index(each, rows, len(inputs["labels"]))
        if self._adds_blank_rows and not (inputs["labels"][-1] != IGNORE).any():
            sums = sums[:-1]  # a row that only this process has
        self._evaluated += self.accelerator.gather_for_metrics(sums).sum(dim=0)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """With the loss of each supervised token counted once. Trainer takes the mean over batches, and on several
        processes counts the rows twice that fill the last batch.

        Random numbers that are drawn here, if only by a data loader, do not change the dropout of the next step: an
        evaluation may be stopped halfway, and some measures take only as long as they need.
        """
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            self._evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            output: Any = super().evaluation_loop(*args, **kwargs)
            total, count = self._evaluated.tolist()
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_loss"] = loss = total / max(count, 1)
            if prefix == "eval":
                for measure in self.measures:
                    output.metrics.update(measure(loss))
        return output

    def _save_rng_state(self, output_dir: str) -> None:
        """As in Trainer, and where the readers of a stream are, which every process has to say too."""
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, StreamDataset):
            self.train_dataset.save(Path(output_dir) / stream_file(self.args.process_index))
