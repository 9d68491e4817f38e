"""The trainer of dual encoders: a batch of images and their texts, each told from those of all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlm.adapters.contrastive_loss import infonce, sigmoid
from vlm.data.pairs import PairCollator, PairDataset, PairItem, positives
from vlm.dual_encoder import MAX_LOGIT_SCALE
from vlm.eval.retrieval import METRICS, recall
from vlm.training.callbacks import PartCheck
from vlm.training.pair_embeddings import MODEL_INPUTS, gather_pairs, gather_rows, length_groups, logits_of
from vlm.training.part_trainer import PartTrainer
from vlm.training.parts import freeze_state

LOSSES = {"infonce": infonce, "sigmoid": sigmoid}
WHO_IS_WHOSE = ("image_ids", "images_of_texts", "text_ids")


class ContrastiveTrainer(PartTrainer):
    """Trains a model that is [`vlm.training.pair_embeddings.embedding_pairs`]. Negatives are the batches of all
    processes, so that two processes give the gradients of one with a batch twice as large."""

    train_dataset: PairDataset
    data_collator: PairCollator
    less_memory = (
        "Set contrastive.chunk_size, which changes nothing else, or halve it; or train.activation_checkpointing: true; "
        "or lower train.per_device_train_batch_size, which leaves fewer negatives"
    )

    def __init__(self, *, loss: Literal["infonce", "sigmoid"], held_out: Sequence[PairItem], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.contrastive_loss = LOSSES[loss]
        self.limits_scale = loss == "infonce"
        self.held_out = list(held_out)
        self.model_accepts_loss_kwargs = False
        self.all_positive = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The data set has an order of its own in each epoch. Of several processes each has as much to do in the last
        step, some of it blank."""
        together = 1 if self.args.dataloader_drop_last else self._train_batch_size * self.args.world_size
        count = len(self.train_dataset)
        return [*range(count), *(~(place % count) for place in range(-count % together))]

    def token_places(self, inputs: dict[str, Any]) -> int:
        groups = length_groups(self.accelerator.unwrap_model(self.model).config, inputs.get("attention_mask"))
        if groups is None:
            return super().token_places(inputs)
        return sum(len(group) * longest for group, longest in groups)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of the batches of all processes together."""
        freeze_state(model, self.rates)
        inner: Any = self.accelerator.unwrap_model(model)
        if self.limits_scale and inner.logit_scale.requires_grad:
            with torch.no_grad():
                inner.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        embeds = gather_pairs(self.accelerator, model(**{key: inputs[key] for key in MODEL_INPUTS if key in inputs}))
        images, texts = (gather_rows(self.accelerator, inputs[key]) for key in ("real_images", "real_texts"))
        image_ids, images_of_texts, text_ids = (gather_rows(self.accelerator, inputs[key]) for key in WHO_IS_WHOSE)
        positive = positives(image_ids[images], images_of_texts[texts], text_ids[texts])
        if self.state.global_step < PartCheck.patience:  # while it is asked for, since a device is waited for
            self.all_positive += bool(positive.all())
        return self.contrastive_loss(logits_of(embeds)[images][:, texts], positive)

    def why_no_gradient(self) -> str:
        if not self.all_positive:
            return super().why_no_gradient()
        return (
            f"In {self.all_positive} of the batches every text belongs to every image, since their captions are the "
            "same or they have one image, so that there was nothing to tell apart: raise "
            "train.per_device_train_batch_size, or look at the captions."
        )

    def embed_held_out(self) -> tuple[dict[str, Tensor], Tensor]:
        """The vectors of all that is held out, and who is whose `[images, texts]`; each process encodes its share."""
        model: Any = self.model.to(self.args.device).eval()  # type: ignore[union-attr, arg-type]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = -(-len(self.held_out) // world)
        mine = self.held_out[rank * share : (rank + 1) * share] or self.held_out[:1]
        size = self.args.per_device_eval_batch_size
        found: list[dict[str, Tensor]] = []
        with self.frozen_in_half(), self.compute_loss_context_manager():
            for start in range(0, share, size):  # as many steps on each process, which meet at the signals
                batch = self._prepare_inputs(self.data_collator(mine[start : start + size] or mine[:1]))
                embeds = model(**{key: batch[key] for key in MODEL_INPUTS if key in batch})
                if mine[start : start + size]:
                    found.append({**embeds, **{key: batch[key] for key in WHO_IS_WHOSE}})
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        names = ("image_embeds", "text_embeds", *WHO_IS_WHOSE)
        whole = {name: torch.cat([each[name] for each in found]) for name in names}
        if rank * share >= len(self.held_out):  # more processes than images
            whole = {key: tensor[:0] for key, tensor in whole.items()}
        whole = {key: gather_rows(self.accelerator, tensor) for key, tensor in whole.items()}
        positive = positives(*(whole.pop(key) for key in WHO_IS_WHOSE))
        return whole | {key: value for key, value in embeds.items() if key.startswith("logit_")}, positive

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss of all that is held out as one batch, and recall both ways."""
        # What is drawn here must not change the dropout of the next step.
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            embeds, positive = self.embed_held_out()
        logits = logits_of(embeds)
        metrics = {f"{metric_key_prefix}_loss": float(self.contrastive_loss(logits, positive))}
        if logits.isfinite().all():
            shares = recall(logits.float().cpu().numpy(), positive.cpu().numpy())
            metrics |= {f"{metric_key_prefix}_{name}": share.value for name, share in shares.items()}
        else:  # a training that diverges ends by its gradients, and not here
            metrics |= {f"{metric_key_prefix}_{name}": math.nan for name in METRICS}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
