"""One stage: the parts that learn, the batches, the Trainer, and the model merged again at its end."""

from __future__ import annotations

import copy
import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback

from vlm.data.batches import RowSampler, padding
from vlm.data.dataset import TreeCollator, TreeDataset, TreeItem, one_row_an_answer, supervised_tokens
from vlm.data.image_inputs import processed_once
from vlm.data.pairs import PairDataset
from vlm.data.stream import StreamDataset
from vlm.data.tree_masks import NotATree
from vlm.errors import UserError
from vlm.recipe import Recipe, Stage
from vlm.recipe_train import STOPPING
from vlm.training.arguments import training_arguments
from vlm.training.blind import BlindLoss
from vlm.training.callbacks import EvaluationStopped, MetricsLog, NewRows, PartCheck, StopOnSignal, Stopped
from vlm.training.checkpoints import fingerprint, has_hashes, newest, require_same_data
from vlm.training.checks import why_not_trees
from vlm.training.ending import require_trained, steps_to_train
from vlm.training.faults import in_words as fault_in_words
from vlm.training.finite import require_finite
from vlm.training.history import duration
from vlm.training.memory import Memory, estimate, gigabytes
from vlm.training.part_trainer import NonFiniteGradients, PartTrainer, precision_of
from vlm.training.parts import add_lora, set_trainable
from vlm.training.peak import peak_flops
from vlm.training.processes import GlobalBatch, of_first, sharded, units, what_differs
from vlm.training.quantization import tokens_apart
from vlm.training.report import parts_table
from vlm.training.sampling import Samples
from vlm.training.skipped import SkippedSteps
from vlm.training.step import flops_per_token, seconds_per_step
from vlm.training.streams import Stream, report
from vlm.training.throughput import in_words
from vlm.training.tracking import Progress, into_run_folder, outlive_trackers
from vlm.training.trainer import VLMTrainer, stream_file
from vlm.training.unused import blank_image_row, every_part_must_run, freeze_unread

INITIALIZATION_IMAGES = 256
"""So many, or tiles, are enough for a mean and a deviation per channel: an image has hundreds of patches."""


@dataclass
class Batches:
    """What a stage trains on, and the way it is made into batches; of a `stream`, `train` is a sample."""

    train: list[TreeItem]
    validation: list[TreeItem]
    collator: TreeCollator
    stream: Stream | None = None

    def one_row_an_answer(self) -> Batches:
        """The same without trees."""
        return replace(
            self,
            train=one_row_an_answer(self.train),
            validation=one_row_an_answer(self.validation),
            collator=replace(self.collator, plain=True),
            stream=self.stream.one_row_an_answer() if self.stream else None,
        )

    def first(self) -> dict[str, Any]:
        """A batch of the first example."""
        try:
            return self.collator([[self.train[0]]])
        except NotATree:
            plain = self.one_row_an_answer()
            return plain.collator([[plain.train[0]]])

    def held_out(self, max_tokens: int) -> TreeDataset:
        """The rows that the loss is taken over; when there are no trees an index has one answer, since Trainer gathers
        by index and no process may have more rows in a batch than another."""
        return TreeDataset(self.validation, 1 if self.collator.plain else max_tokens)


def run_stage(
    recipe: Recipe,
    stage: Stage,
    model: PreTrainedModel,
    batches: Batches,
    folder: Path,
    *,
    dry_run: bool,
    resume: bool,
    stop: StopOnSignal,
    console: Console,
) -> tuple[PreTrainedModel, PeftModel | None]:
    """Train `model` as `stage` says. Gives the model, LoRA merged into it, and the unmerged adapter if there is one."""
    rates = stage.learning_rates
    set_seed(recipe.seed)  # so that LoRA begins alike in a stage that begins after a resume
    trained: Any = add_lora(model, stage.lora.model_dump(), rates) if stage.lora else model
    set_trainable(trained, rates)
    # Trainer makes its folder as it is made itself, and a dry run is to leave none.
    checkpoints = Path(tempfile.mkdtemp()) if dry_run else folder / "checkpoints" / stage.name
    args = training_arguments(recipe, stage, checkpoints)
    wants_loss = args.eval_strategy != "no"
    sources = batches.stream.mixture.sources if batches.stream else []
    data = fingerprint(batches.train, [source.outline for source in sources])
    checkpoint = checkpoint_to_resume(args, data, console) if resume and not dry_run else None
    require_finite(model, "the model that this stage starts from")
    in_parts = sharded(args)  # what is tried before training is tried on whole models, for which a GPU may be too small
    with tokens_apart(trained):
        device = torch.device("cpu") if in_parts else args.device
        why = why_not_trees(trained, batches.collator, batches.train, device)
    if why:
        head = getattr(model, "language_head", None)
        language_model = head.causal_lm if head else getattr(model, "language_model", model)
        console.print(
            f"no trees for {type(language_model).__name__}, a row for each answer: {why}",
            markup=False,
            highlight=False,
        )
        batches = batches.one_row_an_answer()
    if checkpoint is None or has_hashes(checkpoint):
        with tokens_apart(trained):
            if unread := freeze_unread(trained, batches.collator, batches.train, device):
                console.print(
                    f"vision encoder: {unread:,} weights frozen, since they come after the layers that are read",
                    highlight=False,
                )
    if every_part_must_run(args):
        batches.collator.blank = blank_image_row(batches.train)
    tried = TreeDataset(batches.train, recipe.data.max_tokens_per_row, recipe.seed, recipe.data.augmentation)
    rows = batches.stream.rows(args) if batches.stream else tried
    trainer = VLMTrainer(
        model=trained,
        args=args,
        train_dataset=rows,
        eval_dataset=batches.held_out(recipe.data.max_tokens_per_row) if wants_loss else None,
        data_collator=batches.collator,
        rates=rates,
        skipped=SkippedSteps(folder / "skipped_steps.jsonl", stage.name),
        data_fingerprint=data,
    )
    watch(trainer, stage, rows, folder, stop)
    if wants_loss:
        trainer.measures = measures(recipe, trainer, batches, folder / "samples" / stage.name)
    if in_parts:
        trained._no_split_modules = units(trained)
    memory = None if in_parts else estimate(trainer, tried)
    size = trainer._train_batch_size  # auto_find_batch_size may have lowered it
    steps = steps_to_train(trainer)
    timed = {}
    if memory:
        with processed_once(batches.collator.processor):  # what images show does not matter here
            trainer.throughput.flops_per_token = flops_per_token(trainer, tried)
            seconds = seconds_per_step(trainer, tried) * args.gradient_accumulation_steps
        timed = {
            "memory": str(memory),
            "expected time": f"{duration(steps * seconds)} ({seconds:.1f} s a step)",
        }
    lengths = [tried.row_lengths[row] for row in RowSampler(tried, trainer.get_total_train_batch_size(args))]
    precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    console.print(
        parts_table(
            trained,
            rates,
            {
                **(batches.stream.table() if batches.stream else {}),
                "examples": f"{len({id(item.example) for item in batches.train}):,}",
                "rows": f"{len(tried):,}",
                "answers": f"{sum(item.answers for item in batches.train):,}",
                "tokens": f"{sum(lengths):,}, of them supervised {supervised_tokens(batches.train):,}",
                "padding": f"{padding(lengths, size):.1%} of the token places",
                "steps": f"{steps:,}",
                "precision": str(precision).removeprefix("torch."),
                "device": str(args.device),
                "batch": str(GlobalBatch.of(trainer)),
                **timed,
            },
        )
    )
    if dry_run:
        checkpoints.rmdir()
        return trained, None
    trainer.throughput.peak_flops = peak_flops(args.device, precision)
    if checkpoint and (note := what_differs(checkpoint, GlobalBatch.of(trainer))):
        console.print(note, style="yellow", highlight=False)
    if checkpoint and isinstance(rows, StreamDataset):
        rows.restore(Path(checkpoint) / stream_file(args.process_index))
    whole = copy.deepcopy(trained) if in_parts and args.process_index == 0 else trained
    train_to_end(trainer, checkpoint, checkpoints, memory, console)
    if isinstance(rows, StreamDataset):
        report(rows, recipe.data.max_length, console)
    say_how_it_ended(trainer, tried, checkpoint, stop, console)
    if in_parts:
        trained = put_together(trainer, whole)
    return trained, trained if stage.lora else None


def watch(
    trainer: PartTrainer,
    stage: Stage,
    rows: TreeDataset | StreamDataset | PairDataset,
    folder: Path,
    stop: StopOnSignal,
) -> None:
    """Add what watches a run as it trains: the deal of each epoch, the log, signals, early stopping, the bar, and the
    check of parts."""
    for callback in (NewRows(rows), MetricsLog(folder / "metrics.jsonl", stage.name), stop, *early_stopping(stage)):
        trainer.add_callback(callback)
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress(stage.name))
    into_run_folder(trainer.callback_handler.callbacks, folder / "tensorboard" / stage.name)
    outlive_trackers(trainer.callback_handler.callbacks)
    if not trainer.is_deepspeed_enabled:  # which keeps gradients, and with ZeRO-3 weights too, out of sight
        model = trainer.accelerator.unwrap_model(trainer.model)
        trainer.add_callback(PartCheck(model, trainer.rates, trainer.why_no_gradient))


def checkpoint_to_resume(args: TrainingArguments, data: dict[str, Any], console: Console) -> Path | None:
    """The newest whole checkpoint, if there is one; raises UserError if the data were others then. The first process
    looks for it."""
    folder = Path(args.output_dir or ".")
    checkpoint = of_first(
        lambda: newest(
            folder,
            lambda line: console.print(line, style="yellow", markup=False, soft_wrap=True),
            precision=precision_of(args),
        )
    )
    if checkpoint:
        require_same_data(checkpoint, data)
    return checkpoint


def train_to_end(
    trainer: PartTrainer, checkpoint: Path | None, checkpoints: Path, memory: Memory | None, console: Console
) -> None:
    """Train from `checkpoint` on, or from the start, and say how fast it was, and how much memory it took, of which
    `memory` was expected."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except EvaluationStopped:  # before the first step, so that there is nothing to save
        pass
    except Exception as error:
        if (fault := fault_in_words(error, trainer, checkpoints)) is error:
            raise
        raise fault from error
    if speed := trainer.throughput.whole(trainer.accelerator):
        console.print(in_words(speed), highlight=False)
        expected = f", and {gigabytes(memory.total)} GB expected" if memory else ""
        console.print(f"memory: {gigabytes(trainer.throughput.memory)} GB at most{expected}", highlight=False)


def say_how_it_ended(
    trainer: PartTrainer,
    rows: TreeDataset | PairDataset,
    checkpoint: Path | None,
    stop: StopOnSignal,
    console: Console,
) -> None:
    """Raise Stopped if the run was told to stop, TrainingError if it has trained nothing or diverged, and name the
    steps that were skipped."""
    checkpoints = Path(trainer.args.output_dir or ".")
    if stop.stopped:
        raise Stopped(_where_to_go_on(trainer, checkpoints), stop.told or 0)
    try:
        require_trained(trainer, rows, resumed=checkpoint is not None)
    except NonFiniteGradients as error:
        raise fault_in_words(error, trainer, checkpoints) from error
    if trainer.skipped.count:
        console.print(
            f"{trainer.skipped.count} steps were skipped: their gradients were not finite; their examples are named in "
            f"{trainer.skipped.path}",
            highlight=False,
            soft_wrap=True,
        )


def put_together(trainer: VLMTrainer, whole: Any) -> Any:
    """The weights of a sharded model in `whole`, a copy from before they were sharded, on the first process. The others
    get their parts back, which are of no use alone."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.is_world_process_zero():
        whole.load_state_dict(state)
    return whole


def early_stopping(stage: Stage) -> list[EarlyStoppingCallback]:
    """transformers' own callback, if the stage asks for it."""
    options = {key: value for key, value in stage.train.items() if key in STOPPING}
    return [EarlyStoppingCallback(**options)] if options else []


def measures(recipe: Recipe, trainer: VLMTrainer, batches: Batches, folder: Path) -> list[Any]:
    """What an evaluation during training gives beside the held-out loss."""
    processor = batches.collator.processor
    found: list[Any] = []
    if getattr(processor, "fixed_image_tokens", False):  # otherwise another image may take another number of tokens
        found.append(BlindLoss(trainer, batches.held_out(recipe.data.max_tokens_per_row)))
    if recipe.evaluation.samples:
        if sharded(trainer.args):
            raise UserError("evaluation.samples: a model of which each process holds a part cannot answer; set it to 0")
        examples = list({id(item.example): item.example for item in batches.validation}.values())
        chosen = examples[: recipe.evaluation.samples]
        found.append(Samples(trainer, processor, chosen, recipe.evaluation, folder))
    return found


def _where_to_go_on(trainer: PartTrainer, checkpoints: Path) -> str:
    """What is said at the end of a run that was told to stop."""
    step = f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}"
    lost = f", whose checkpoint could not be saved: {trainer.unsaved}. Make room" if trainer.unsaved else ""
    last = newest(checkpoints, lambda line: None, contents=False)
    return f"{step}{lost}; go on with --resume{f' from {last}' if last else ': it begins anew'}"


@torch.no_grad()
def initialize_projector(model: Any, batches: Batches, device: torch.device, seed: int) -> None:
    """Fit a new model's projector to a random sample of the training images, and to the size of its words."""
    items = random.Random(seed).sample(batches.train, min(len(batches.train), INITIALIZATION_IMAGES))
    model.to(device).eval()
    features: list[torch.Tensor] = []
    grid = (0, 0)
    for start in range(0, len(items), 16):
        if sum(map(len, features)) >= INITIALIZATION_IMAGES:
            break
        images = batches.collator.images(items[start : start + 16])
        if "pixel_values" in images:
            seen, grid = model.get_vision_features(images["pixel_values"].to(device))
            features.append(seen)
        elif images:
            grid = images["vision_grid"]
            features.append(images["vision_features"].to(device))
    if features:
        projector = model.model.multi_modal_projector
        projector.initialize(torch.cat(features).float(), grid, word_size(model) if model.config.uses_prefix else 1.0)


@torch.no_grad()
def word_size(model: Any) -> float:
    """The root mean square of word embeddings, as they enter the decoder."""
    embeddings = model.get_input_embeddings()
    some = torch.linspace(0, embeddings.num_embeddings - 1, 4096, device=model.device).long()
    return float(embeddings(some).float().square().mean().sqrt())
