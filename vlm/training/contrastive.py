"""The stages of a recipe with `contrastive`: pairs, the trainer, and the dual encoder saved and scored at the end."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import PartialState
from peft import PeftModel
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments, set_seed

from vlm.data.check import ProblemLog
from vlm.data.example import Example
from vlm.data.features import FeatureCache
from vlm.data.pairs import PairCollator, PairDataset, PairItem, make_pairs, require_negatives
from vlm.disk_faults import going_on
from vlm.dual_encoder import build_dual_encoder, is_dual_encoder
from vlm.embedding import Embedder, load_dual_encoder
from vlm.errors import UserError
from vlm.generation import load_config
from vlm.loading import checkpoint_of, user_errors
from vlm.pair_evaluation import evaluate_pairs
from vlm.recipe import Recipe, Stage
from vlm.recipe_contrastive import Contrastive
from vlm.recognition.tasks import measure
from vlm.recognition.zero_shot import zero_shot
from vlm.training.arguments import training_arguments
from vlm.training.callbacks import StopOnSignal
from vlm.training.checkpoints import fingerprint
from vlm.training.contrastive_trainer import ContrastiveTrainer
from vlm.training.ending import steps_to_train
from vlm.training.features import kept_features
from vlm.training.finite import require_finite
from vlm.training.folder import save_stage, stage_home
from vlm.training.history import draw_losses, duration
from vlm.training.memory import estimate
from vlm.training.pair_embeddings import can_keep, embedding_pairs, pooled_features
from vlm.training.parts import add_lora, set_trainable, trains_vision
from vlm.training.processes import GlobalBatch, sharded, what_differs
from vlm.training.quantization import merged
from vlm.training.rehearsal import rehearse
from vlm.training.report import parts_table
from vlm.training.skipped import SkippedSteps
from vlm.training.stage import (
    checkpoint_to_resume,
    say_how_it_ended,
    train_to_end,
    watch,
)
from vlm.training.step import seconds_per_step

SIGLIP_SCALE, SIGLIP_BIAS = math.log(10), -10.0
"""SigLIP's start: logits of ten times the cosine, less ten, since nearly all pairs are negative."""


def start_model(recipe: Recipe, source: str | None) -> tuple[PreTrainedModel, Any]:
    """The dual encoder in the folder `source`, or if it is None the one that `recipe` names, or a new one."""
    spec, contrastive = recipe.model, recipe.contrastive or Contrastive()
    if source is None and spec.pretrained is None:
        sigmoid = contrastive.loss == "sigmoid"
        start = {"logit_scale_init_value": SIGLIP_SCALE, "logit_bias_init_value": SIGLIP_BIAS} if sigmoid else {}
        with user_errors(lambda error: f"model: {error}"):
            return build_dual_encoder(
                spec.encoders,
                spec.language or "",
                image_size=spec.image_size,
                image_aspect_ratio=spec.image_aspect_ratio,
                trust_remote_code=spec.trust_remote_code,
                projection_dim=contrastive.projection_dim,
                projection_dropout=contrastive.projection_dropout,
                text_pooling=contrastive.text_pooling,
                **start,
            )
    name = source or checkpoint_of(spec.pretrained or "")
    if not is_dual_encoder(config := load_config(name, trust_remote_code=spec.trust_remote_code)):
        raise UserError(
            f"model.pretrained: {name} is of type {config.model_type}, which is no dual encoder, as CLIP and SigLIP are"
        )
    model, processor = load_dual_encoder(name, trust_remote_code=spec.trust_remote_code)
    if contrastive.loss == "sigmoid" and not hasattr(model, "logit_bias"):
        raise UserError(f"contrastive.loss: {name} has no bias, which the sigmoid loss needs; use infonce")
    return model, processor


def run_stages(
    recipe: Recipe,
    model: PreTrainedModel,
    processor: Any,
    train_examples: Sequence[Example],
    validation_examples: Sequence[Example],
    log: ProblemLog,
    done: int,
    *,
    dry_run: bool,
    resume: bool,
    stop: StopOnSignal,
    console: Console,
) -> None:
    """The stages from `done` on, each from the model that the one before has left; the first from `model`."""
    folder, processes = Path(recipe.output_dir), PartialState()
    for number, stage in enumerate(recipe.stages[done:], start=done):
        console.print(f"stage {number + 1} of {len(recipe.stages)}: {stage.name}", style="bold", highlight=False)
        args = training_arguments(recipe, stage, folder / "checkpoints" / stage.name)
        if sharded(args):
            raise UserError(
                "a dual encoder is trained whole on each process: start it with torchrun, or with the configuration "
                "that `vlm recipes show accelerate/ddp` prints"
            )
        held_out = validation_examples if args.eval_strategy != "no" else []
        groups = (train_examples, held_out)
        cache, keys = _kept(recipe, stage, groups, model, processor, args, log, console, stop)
        train, validation = (
            _pairs(group, model, processor, found, log, console, stop, name)
            for group, found, name in zip(groups, keys, ("training", "held out"), strict=True)
        )
        if recipe.contrastive is None or recipe.contrastive.loss == "infonce":
            require_negatives(train, args.train_batch_size * args.world_size)
        trained, adapter = _run_stage(
            recipe, stage, model, train, validation, PairCollator(processor, model.config, cache), folder,
            dry_run=dry_run, resume=resume, stop=stop, console=console,
        )  # fmt: skip
        if processes.is_main_process and not dry_run:
            model = save_stage(stage_home(folder, recipe.stage_names, number), trained, adapter, processor)
            with going_on(folder / "loss.png"):
                draw_losses({recipe.name: folder / "metrics.jsonl"}, folder / "loss.png", "contrastive loss")
        elif processes.is_main_process and number == done:
            batch = PairCollator(processor, model.config, cache)(train[:2])
            model, said = rehearse(trained, processor, batch, args.device)
            console.print(said, highlight=False, soft_wrap=True)
        else:
            model = merged(trained)
        processes.wait_for_everyone()
        model.requires_grad_(False)
        if validation_examples and not dry_run:
            score(recipe, number, model, processor, validation_examples, stop, console)


def score(
    recipe: Recipe,
    number: int,
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    stop: StopOnSignal,
    console: Console,
) -> None:
    """Recall of a stage's model on what is held out, by the first process."""
    processes = PartialState()
    if processes.is_main_process:
        folder = stage_home(Path(recipe.output_dir), recipe.stage_names, number) / "evaluation"
        some = examples[: recipe.evaluation.limit]
        network = model.to(processes.device).eval()
        embedder = Embedder(recipe.name, network, processor.image_processor, processor.tokenizer)
        watch: Any = partial(stop.checked, "scoring what is held out; the model is saved")
        more = measure(recipe.evaluation.classification, partial(zero_shot, embedder), console=console, watch=watch)
        evaluate_pairs(embedder, some, output_dir=folder, console=console, watch=watch, more=more)
    processes.wait_for_everyone()


def _kept(
    recipe: Recipe,
    stage: Stage,
    groups: tuple[Sequence[Example], Sequence[Example]],
    model: Any,
    processor: Any,
    args: TrainingArguments,
    log: ProblemLog,
    console: Console,
    stop: StopOnSignal,
) -> tuple[FeatureCache | None, list[Mapping[int, tuple[str, ...]] | None]]:
    """What a locked vision encoder pools (LiT, arXiv 2111.07991), kept on disk if it is worth while."""
    if trains_vision(stage.learning_rates) or not recipe.data.cache_features:
        return None, [None, None]
    if recipe.data.augmentation:
        why = "not kept on disk, since data.augmentation shows the encoder other images in each epoch"
        console.print(f"features: {why}", highlight=False, soft_wrap=True)
        return None, [None, None]
    images = Embedder(recipe.name, model, processor.image_processor, processor.tokenizer)
    pixel_values = images.prepare_images([Image.new("RGB", (64, 64), "teal")])["pixel_values"]
    if not can_keep(model.to(args.device).eval(), pixel_values.to(args.device)):
        kind = type(model).__name__
        console.print(f"features: not kept on disk, since {kind} does not say what it pools", highlight=False)
        return None, [None, None]
    cache, keys = kept_features(recipe, groups, _Pooling(model), images, args, log, console, stop)
    return cache, [*keys]


class _Pooling:
    """A dual encoder's vision encoder in the words of a vision-language model's."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = SimpleNamespace(
            vision_feature_layer="pooled", vision_feature_select_strategy="default", tiling=None
        )

    def get_encoder(self, modality: str) -> Any:
        return self.model.vision_model

    def get_vision_features(self, pixel_values: Tensor) -> tuple[Tensor | None, tuple[int, int]]:
        return pooled_features(self.model, pixel_values), (1, 1)


def _pairs(
    examples: Sequence[Example],
    model: PreTrainedModel,
    processor: Any,
    features: Mapping[int, tuple[str, ...]] | None,
    log: ProblemLog,
    console: Console,
    stop: StopOnSignal,
    name: str,
) -> list[PairItem]:
    """Examples as pairs, their images' `features` kept; what is broken is counted and named, and texts that are cut."""
    if not examples:
        return []
    items, cut = make_pairs(
        examples,
        processor,
        model.config,
        report=log.add,
        features=features,
        progress=lambda it, total: stop.until_told(
            track(it, f"tokenizing ({name})", total, console=console, transient=True)
        ),
    )
    stop.check_all("reading the data")
    if cut.count:
        console.print(f"{name}: {cut}", highlight=False, soft_wrap=True)
    if not items:
        raise UserError(f"no example is left ({name}): every one is broken, or has no text, or not one image")
    return items


def _run_stage(
    recipe: Recipe,
    stage: Stage,
    model: PreTrainedModel,
    train: list[PairItem],
    validation: list[PairItem],
    collator: PairCollator,
    folder: Path,
    *,
    dry_run: bool,
    resume: bool,
    stop: StopOnSignal,
    console: Console,
) -> tuple[PreTrainedModel, PeftModel | None]:
    """Train `model` as `stage` says. Gives the model, LoRA not merged, and the same as adapter if it has any."""
    contrastive, rates = recipe.contrastive or Contrastive(), stage.learning_rates
    set_seed(recipe.seed)  # so that LoRA begins alike in a stage that begins after a resume
    trained: Any = add_lora(model, stage.lora.model_dump(), rates) if stage.lora else model
    set_trainable(trained, rates)
    # Trainer makes its folder as it is made itself, and a dry run is to leave none.
    checkpoints = Path(tempfile.mkdtemp()) if dry_run else folder / "checkpoints" / stage.name
    args = training_arguments(recipe, stage, checkpoints)
    data = fingerprint(train)
    checkpoint = checkpoint_to_resume(args, data, console) if resume and not dry_run else None
    require_finite(model, "the model that this stage starts from")
    rows = PairDataset(train, recipe.seed, recipe.data.augmentation)
    with embedding_pairs(model, contrastive.chunk_size):
        trainer = ContrastiveTrainer(
            model=trained,
            args=args,
            train_dataset=rows,
            eval_dataset=PairDataset(validation) if validation else None,
            data_collator=collator,
            loss=contrastive.loss,
            held_out=validation,
            rates=rates,
            skipped=SkippedSteps(folder / "skipped_steps.jsonl", stage.name),
            data_fingerprint=data,
        )
        watch(trainer, stage, rows, folder, stop)
        memory = estimate(trainer, rows)
        steps = steps_to_train(trainer)
        seconds = seconds_per_step(trainer, rows)
        precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        console.print(
            parts_table(
                trained,
                rates,
                {
                    "images": f"{len(train):,}",
                    "texts": f"{sum(item.answers for item in train):,}",
                    "steps": f"{steps:,}",
                    "precision": precision,
                    "device": str(args.device),
                    "batch": str(GlobalBatch.of(trainer)),
                    "memory": str(memory),
                    "expected time": f"{duration(steps * seconds)} ({seconds:.1f} s a step)",
                },
            )
        )
        if dry_run:
            checkpoints.rmdir()
            return trained, None
        if checkpoint and (note := what_differs(checkpoint, GlobalBatch.of(trainer))):
            console.print(note, style="yellow", highlight=False)
        train_to_end(trainer, checkpoint, checkpoints, memory, console)
        say_how_it_ended(trainer, rows, checkpoint, stop, console)
    return trained, trained if stage.lora else None
