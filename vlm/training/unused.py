"""Weights that a step does not use: those that never are, and those of the bridge in a batch without images.

Processes that share a model wait for each other in every part of it, and with DDP too unless it looks for unused
weights. There each process has to run the vision encoder and the bridge in each step. Weights that never have a
gradient are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import TrainingArguments

from vlm.data.dataset import Row, TreeCollator, TreeItem
from vlm.training.inputs import training_inputs
from vlm.training.parts import named_parts, weights_of
from vlm.training.processes import sharded


def every_part_must_run(args: TrainingArguments) -> bool:
    """Whether processes wait for each other in parts of the model that a batch may not use."""
    if args.world_size == 1:
        return False
    looks_for_unused = args.ddp_find_unused_parameters
    if looks_for_unused is None:  # as Trainer decides then
        looks_for_unused = not args.activation_checkpointing
    return sharded(args) or not looks_for_unused


def blank_image_row(items: Sequence[TreeItem]) -> Row | None:
    """Return the shortest row that makes a model read an image, without labels; None if no item has images.

    In a batch without images it runs the vision encoder, the projector and cross-attention. It has no part in the loss,
    and all its gradients are zero.
    """
    shown = [item for item in items if item.example.images]
    return [min(shown, key=lambda item: len(item.tree)).blank()] if shown else None


def drop_gradients_of_images(model: nn.Module) -> None:
    """Make gradients None that images alone give: of all parts but the language model and its LoRA.

    After a step without images they are zero where blank rows were run. Adam moves weights whose gradient is zero, by
    its momentum, and no others.
    """
    for part, _, parameter in named_parts(model):
        if part not in ("language", "lora"):
            parameter.grad = None


def freeze_unread(model: Any, collator: TreeCollator, items: Sequence[TreeItem], device: torch.device) -> int:
    """Freeze the trainable weights of the vision encoder that the answers do not depend on, and return how many.

    These are the layers after the one that is read (`vision_feature_layer`), the norm after the last layer, and a
    pooling head; with LoRA, its weights there. One example is run to find them.
    """
    trained = [p for part, _, p in named_parts(model) if part in ("vision", "lora_vision") and p.requires_grad]
    shown = [item for item in items if item.example.images]
    if not trained or not shown:
        return 0
    model.eval()
    if not hasattr(model, "hf_device_map"):
        model.to(device)
    batch = send_to_device(collator([[min(shown, key=lambda item: len(item.tree))]]), device)
    labels, _ = batch.pop("labels"), batch.pop("loss_weights", None)
    with torch.enable_grad():
        read = _in_graph(model(**training_inputs(model.config, batch, labels)).logits)
    unread = [parameter for parameter in trained if id(parameter) not in read]
    for parameter in unread:
        parameter.requires_grad_(False)
    return sum(map(weights_of, unread))


def _in_graph(output: Tensor) -> set[int]:
    """Return the identities of the weights that `output` was computed from, by autograd's graph."""
    waiting, seen, leaves = [output.grad_fn], set[Any](), set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        waiting += [before for before, _ in node.next_functions]
    return leaves
