"""The vectors that a contrastive loss compares: of a large batch in little memory, and of the batches of all processes.

B images, T texts, D the common space, D_v what the vision encoder pools an image into.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.dual_encoder import reads_padding
from vlm.encoder import encode

MODEL_INPUTS = ("input_ids", "attention_mask", "pixel_values", "vision_features")

LENGTH_GROUPS = 4


@contextmanager
def embedding_pairs(model: Any, chunk_size: int | None) -> Iterator[None]:
    """Within it the `forward` of a dual encoder is [`embed_pairs`]: what wraps a model, as DDP and autocast do, knows
    of nothing else."""
    model.forward = partial(embed_pairs, model, chunk_size)
    try:
        yield
    finally:
        del model.forward


def embed_pairs(model: Any, chunk_size: int | None, /, **inputs: Tensor) -> dict[str, Tensor]:
    """`image_embeds [B, D]` and `text_embeds [T, D]`, unit vectors, with what their products are multiplied with,
    `logit_scale`, and if the model has one `logit_bias`, which is added.

    `inputs` are `input_ids`, `attention_mask` `[T, L]`, and `pixel_values [B, 3, H, W]` or, as [`pooled_features`] gave
    them earlier, `vision_features [B, 1, D_v]`.

    `chunk_size` images, then texts of about the same length, are encoded at a time, and what the backward pass needs is
    computed anew there, with the same random numbers. So a batch takes the memory of a chunk beside that of its
    vectors, and the gradients are those of the whole: GradCache (arXiv 2101.06983) by activation checkpointing. `None`:
    all at once.
    """

    def of_images(pixel_values: Tensor) -> Tensor:
        return model.get_image_features(pixel_values=pixel_values).pooler_output

    def of_texts(*given: Tensor) -> Tensor:
        return model.get_text_features(*given).pooler_output

    if "vision_features" in inputs:
        image_embeds = project(model, inputs["vision_features"][:, 0])
    else:
        image_embeds = _in_chunks(of_images, chunk_size, inputs["pixel_values"])
    texts = [inputs[name] for name in ("input_ids", "attention_mask") if name in inputs]
    groups = length_groups(model.config, inputs.get("attention_mask"))
    if groups is None:
        text_embeds = _in_chunks(of_texts, chunk_size, *texts)
    else:
        cut = ([tensor[group, :longest] for tensor in texts] for group, longest in groups)
        order = torch.cat([group for group, _ in groups]).argsort()
        text_embeds = torch.cat([_in_chunks(of_texts, chunk_size, *each) for each in cut])[order]
    found = {
        "image_embeds": F.normalize(image_embeds.float(), dim=-1),
        "text_embeds": F.normalize(text_embeds.float(), dim=-1),
        # Not the parameters themselves: DDP would count one that is an output twice.
        "logit_scale": model.logit_scale.float().exp(),
    }
    bias = getattr(model, "logit_bias", None)
    return found if bias is None else found | {"logit_bias": bias.float().clone()}


def _in_chunks(function: Any, chunk_size: int | None, *tensors: Tensor) -> Tensor:
    if chunk_size is None:
        return function(*tensors)
    chunks = zip(*(tensor.split(chunk_size) for tensor in tensors), strict=True)
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])


def length_groups(config: Any, attention_mask: Tensor | None) -> list[tuple[Tensor, int]] | None:
    """Texts of about the same length, by their places, with the longest's: encoded together, without the padding beyond
    it, since one long text would make all others as long. None for a dual encoder that reads padding, and for texts
    that are padded on the left, where places are counted from."""
    if attention_mask is None or reads_padding(config) or not bool(attention_mask[:, 0].all()):
        return None
    lengths = attention_mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    groups = order.split(-(-len(order) // LENGTH_GROUPS))
    return [(group, int(lengths[group].max())) for group in groups]


def logits_of(embeds: Mapping[str, Tensor]) -> Tensor:
    """`[B, T]`: cosines times the temperature, and the bias if there is one."""
    logits = embeds["image_embeds"] @ embeds["text_embeds"].T * embeds["logit_scale"]
    return logits + embeds["logit_bias"] if "logit_bias" in embeds else logits


def pooled_features(model: Any, pixel_values: Tensor) -> Tensor | None:
    """`[B, 1, D_v]`, what the vision encoder pools each of `pixel_values [B, 3, H, W]` into before it is projected."""
    pooled = encode(model.vision_model, pixel_values).pooled
    return None if pooled is None else pooled[:, None]


def project(model: Any, pooled: Tensor) -> Tensor:
    """`[B, D_v]` into the common space `[B, D]`; the vectors of SigLIP's encoder are in it already."""
    projection = getattr(model, "visual_projection", None)
    dropout = getattr(model, "dropout", None)
    pooled = pooled if dropout is None else dropout(pooled)
    return pooled if projection is None else projection(pooled)


@torch.no_grad()
def can_keep(model: Any, pixel_values: Tensor) -> bool:
    """Whether pooled features are all that the model's image vectors depend on: tried on `pixel_values`."""
    if not hasattr(model, "vision_model"):
        return False
    try:
        pooled = pooled_features(model, pixel_values)
        if pooled is None:
            return False
        ours, its = project(model, pooled[:, 0]), model.get_image_features(pixel_values=pixel_values).pooler_output
    except (AttributeError, RuntimeError, ValueError):
        return False
    return ours.shape == its.shape and torch.allclose(ours, its, rtol=1e-4, atol=1e-5)


def gather_rows(accelerator: Any, rows: Tensor) -> Tensor:
    """The `rows [n, ...]` of all processes, in their order; of other processes without gradients. The numbers of rows
    may differ."""
    if accelerator.num_processes == 1:
        return rows
    sizes = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    room = rows.new_zeros(max(sizes), *rows.shape[1:])
    room[: len(rows)] = rows.detach()
    parts = list(accelerator.gather(room).split(max(sizes)))
    found = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    found[accelerator.process_index] = rows
    return torch.cat(found)


def gather_pairs(accelerator: Any, embeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`embeds` with the images and texts of all processes.

    All compute the same loss then, and DDP takes the mean of their gradients. That is right for what all hold alike,
    the temperature; but a vector has its gradient on its own process alone, so that it has to count as often as there
    are processes.
    """
    found = dict(embeds)
    for name in ("image_embeds", "text_embeds"):
        mine = embeds[name]
        if mine.requires_grad and accelerator.num_processes > 1:
            mine.register_hook(lambda gradient: gradient * accelerator.num_processes)
        found[name] = gather_rows(accelerator, mine)
    return found
