"""What a training step costs, tried before the first one: its time, and the model's FLOPs for a token."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vlm.data.dataset import TreeDataset
from vlm.data.pairs import PairDataset
from vlm.training.peak import synchronize

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * int(sdpa_flop_count(query, key, value))


FORMULAS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}
"""Beside PyTorch's own: it has none for attention on a CPU, and counts the scores that a kernel computes anew in its
backward pass, which are no work of the model's."""


def flops_per_token(trainer: Any, rows: TreeDataset) -> float:
    """FLOPs that the model needs for a token, forward and backward: the mean over a batch of `rows`, short and long.

    Counted are matrix products, convolutions and attention, 2 for a multiplication with its addition. A linear layer
    takes 2 x in x out forward, as much again backward, and once more if its weights are trained; nothing backward if no
    trained weight lies before it. Attention counts every score that is computed, masked or not. What gradient
    checkpointing computes again is not counted, nor are attention kernels from outside PyTorch (FlashAttention's own).
    This is what "model FLOPs" means in PaLM (arXiv 2204.02311, appendix B), where it is a formula; here
    `torch.utils.flop_counter` counts it.

    Rows are run one at a time, so that padding is not counted, and little memory is used.
    """
    number = min(trainer._train_batch_size, len(rows))
    places = [(2 * i + 1) * len(rows) // (2 * number) for i in range(number)]
    with (
        untouched(trainer),
        _checkpointing_off(trainer.model),
        FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter,
    ):
        for place in places:
            forward_and_backward(trainer, trainer.data_collator([rows[place]]))
    return float(counter.get_total_flops()) / sum(rows.row_lengths[place] for place in places)


def seconds_per_step(trainer: Any, rows: TreeDataset | PairDataset) -> float:
    """Seconds of a forward and backward pass over a batch of `rows` of mean length."""
    size = trainer._train_batch_size
    start = max(0, (len(rows) - size) // 2)
    batch = rows.row_lengths[start : start + size]
    inputs = trainer.data_collator([rows[i] for i in range(start, start + len(batch))])
    with untouched(trainer), checkpointing(trainer):
        for _ in range(2):  # the first one warms caches up
            began = time.monotonic()
            forward_and_backward(trainer, dict(inputs))
            synchronize(trainer.args.device)
            seconds = time.monotonic() - began
    return seconds * (sum(rows.row_lengths) / len(rows)) / (sum(batch) / len(batch))


def forward_and_backward(trainer: Any, batch: dict[str, Any]) -> None:
    """As in training, without a step."""
    args = trainer.args
    precision = (
        torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16)
        if args.bf16 or args.fp16
        else nullcontext()
    )
    with precision:
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    trainer.model.zero_grad()


@contextmanager
def untouched(trainer: Any) -> Iterator[None]:
    """Random numbers and batch statistics are afterwards as they were before, and the model is in training mode."""
    device = trainer.args.device
    model = trainer.model.to(device).train()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), trainer.frozen_in_half():
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


@contextmanager
def checkpointing(trainer: Any) -> Iterator[None]:
    """Within it activations are computed anew in the backward pass, if training is to do so: Trainer begins later."""
    if not trainer.args.activation_checkpointing:
        yield
        return
    options = dict(trainer.args.activation_checkpointing_kwargs or {})
    chosen = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **chosen)
    keep_gradients_out(trainer)
    try:
        yield
    finally:
        trainer.model.activation_checkpointing_disable()


def keep_gradients_out(trainer: Any) -> None:
    """Undo what transformers does beside activation checkpointing: it makes the output of every embedding require a
    gradient, so that the whole of a frozen encoder is kept and gone back through. Only `use_reentrant` needs that."""
    if not (trainer.args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        trainer.model.disable_input_require_grads()


@contextmanager
def _checkpointing_off(model: nn.Module) -> Iterator[None]:
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    yield
    for module in modules:
        module.gradient_checkpointing = True  # type: ignore[assignment]
