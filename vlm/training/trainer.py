"""transformers' Trainer with a learning rate for each part, the loss on supervised tokens, and its traps closed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from vlm.data.conversation import IGNORE
from vlm.data.dataset import shifted
from vlm.training.parts import freeze_state, named_parts


class NonFiniteGradients(RuntimeError):  # noqa: N818 - named for what happened
    """Too many steps in a row had gradients that are not finite."""


def supervised_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy summed over supervised tokens, divided by those of the whole global batch.

    Of the stock vision-language classes 26 do not divide so by themselves, and then accumulating gradients changes
    the result. `outputs.logits` are `[S, V]`, one row a supervised token; models that do not know `logits_to_keep`
    give `[B, L, V]`.
    """
    targets = shifted(labels)
    keep = targets != IGNORE
    logits = outputs.logits if outputs.logits.ndim == 2 else outputs.logits[keep]
    loss = F.cross_entropy(logits.float(), targets[keep], reduction="sum")
    return loss / (keep.sum() if num_items_in_batch is None else num_items_in_batch)


class VLMTrainer(Trainer):
    """Trains the parts in `rates` (part to learning rate), each at its own.

    Raises NonFiniteGradients after `max_bad_steps` steps in a row whose gradients are not finite; each is skipped.
    """

    max_bad_steps = 5

    def __init__(self, *, rates: Mapping[str, float], **kwargs: Any) -> None:
        super().__init__(compute_loss_func=supervised_loss, **kwargs)
        self.rates = dict(rates)
        # The loss is ours: the model need not be told how many items it is divided by.
        self.model_accepts_loss_kwargs = False
        self._loss_shifts_labels = True
        self.skipped_steps = 0
        self._bad_in_a_row = 0

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The head runs on supervised positions alone: `[B, L, V]` logits never exist."""
        freeze_state(model, self.rates)
        keep = shifted(inputs["labels"]) != IGNORE
        return super().compute_loss(model, {**inputs, "logits_to_keep": keep, "use_cache": False}, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As in Trainer, with a parameter group for each part and for decayed and undecayed weights."""
        if self.optimizer is None:
            model = model or self.model
            decayed = set(self.get_decay_parameter_names(model))
            groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
            for part, name, parameter in named_parts(model):
                if parameter.requires_grad:
                    groups.setdefault((part, name in decayed), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self.rates[part],
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                        "part": part,
                    }
                    for (part, decay), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """A step whose gradients are not finite changes nothing. Trainer would apply it, and log a loss of 0.0."""
        norm = super()._get_grad_norm(model, grad_norm)
        if torch.isfinite(torch.as_tensor(norm)):
            self._bad_in_a_row = 0
            return norm
        self.skipped_steps += 1
        self._bad_in_a_row += 1
        model.zero_grad()
        if self._bad_in_a_row >= self.max_bad_steps:
            raise NonFiniteGradients(
                f"the gradients of {self._bad_in_a_row} steps in a row up to step {self.state.global_step + 1} are not "
                "finite. Lower the learning rates, or train in float32 (train.bf16: false)."
            )
        return norm

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, None, None]:
        """The loss alone, as in training."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None
