"""A training step, answers and a chat of tiny models, on any device, in any precision; and the models to try."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device

from tests.tiny import ALL_FUSIONS, CONFIGS, PROJECTORS, image, small_projector, tiny
from tests.training.helpers import examples, rows_of
from vlm.data.dataset import TreeCollator
from vlm.data.tree_masks import TreeMasks
from vlm.generation import generate
from vlm.session import Session
from vlm.training.inputs import training_inputs
from vlm.training.trainer import supervised_loss
from vlm.tree_attention import tree_attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", "autocast bf16", "autocast fp16", "bf16", "fp16")
FUSIONS = {fusion: {"fusion": fusion} for fusion in ALL_FUSIONS}
MODELS: dict[str, dict[str, Any]] = {
    **FUSIONS,
    **{projector: {"projector": small_projector(projector)} for projector in PROJECTORS},
    **{decoder: {"decoder": decoder} for decoder in (*CONFIGS, "gpt2")},
    **{
        f"{tiling}, {fusion}": {"fusion": fusion, "tiling": {"type": tiling, "max_tiles": 4}}
        for tiling, fusion in itertools.product(
            ("tiles", "anyres", "idefics3", "internvl"), ("prefix", "cross_attention")
        )
        if (tiling, fusion) != ("anyres", "cross_attention")  # refused: cross-attention needs tiles in their order
    },
    **{
        f"{kind}, {decoder}": {"decoder": decoder, "image_attention": kind}
        for kind, decoder in itertools.product(("bidirectional", "prefix_lm"), ("llama", "gemma3"))
    },
}
"""Options of `tests.tiny.tiny`."""
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "samples": {"do_sample": True},
    "static cache": {"cache_implementation": "static"},
}
"""Options of `generate`."""


def autocast(device: str, precision: str) -> Any:
    dtype = DTYPES.get(precision.removeprefix("autocast "))
    return torch.autocast(device, dtype, enabled=precision.startswith("autocast"))


def placed(device: str, precision: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model and its processor."""
    model, processor = tiny(**options)
    return model.to(device, DTYPES.get(precision, torch.float32)), processor


def step(device: str, precision: str, options: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of rows of trees, and the gradients, all parts trained."""
    model, processor = placed(device, precision, options)
    model.train().requires_grad_(True)
    rows = rows_of(processor, examples(4, 3), 120)
    batch: Any = TreeCollator(processor, masks=TreeMasks(model))([rows[n] for n in range(len(rows))])
    if device == "cuda":
        batch = torch.utils.data._utils.pin_memory.pin_memory(batch)
    batch = send_to_device(batch, torch.device(device), non_blocking=True)
    with tree_attention(model), autocast(device, precision):
        given = training_inputs(model.config, dict(batch), batch["labels"])
        labels = given.pop("labels")
        loss = supervised_loss(model(**given), labels)
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def ask(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}


def answers(device: str, precision: str, options: dict[str, Any], **how: Any) -> list[str]:
    """The answers to two questions about one image, and one about another."""
    model, processor = placed(device, precision, options)
    one, other = image(1), image(2)
    requests = [([one], [ask("what ?")]), ([one], [ask("a cat ?")]), ([other], [ask("on the street")])]
    with autocast(device, precision):
        return list(generate(model.requires_grad_(False), processor, requests, max_new_tokens=4, **how))


def chat(device: str, precision: str, options: dict[str, Any]) -> list[str]:
    """What the model says in two turns, streamed."""
    model, processor = placed(device, precision, options)
    session, turns, said = Session(model.requires_grad_(False), processor), [ask("what ?")], []
    said.append("".join(session.stream(([image(1)], turns), max_new_tokens=3)))
    for role, text in (("assistant", said[0]), ("user", "a dog ?")):
        turns.append({"role": role, "content": [{"type": "text", "text": text}]})
    said.append("".join(session.stream(([image(1)], turns), max_new_tokens=3)))
    return said


def precisions(name: str) -> Iterator[str]:
    """Those that a training step of a model is tried in: all for each fusion, fewer for the rest."""
    count = 5 if name in FUSIONS else 4 if "," not in name else 2
    yield from PRECISIONS[:count]
