"""A whole run: a recipe becomes a folder with a model, its scores, and all that is needed to see how it came about.

RUN/recipe.yaml         the recipe, resolved            RUN/environment.json   versions and hardware
RUN/metrics.jsonl       losses and rates by step        RUN/loss.png           the same as a picture
RUN/checkpoints/STAGE/  to resume from                  RUN/data_problems.json what was left out, and why
RUN/model/              the model, LoRA merged in       RUN/adapter/           LoRA and trained parts, unmerged
RUN/model_hashes.json   the SHA-256 of its files
RUN/evaluation/         summary.json, predictions.jsonl, samples.html
RUN/samples/STAGE/      the same of a few held-out examples, by step
RUN/skipped_steps.jsonl the examples of steps whose gradients were not finite
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, TrainingArguments, set_seed

from vlm import generation
from vlm.build import build
from vlm.data.check import ProblemLog
from vlm.data.dataset import TreeCollator, TreeItem, make_items
from vlm.data.example import Example, apart
from vlm.data.image_inputs import SizeCheck
from vlm.data.readers import read
from vlm.data.stream import Mixture
from vlm.data.tree_masks import TreeMasks
from vlm.disk_faults import going_on
from vlm.errors import UserError
from vlm.eval import Processes, evaluate
from vlm.eval.summary import show
from vlm.files import write_text
from vlm.generation_config import make_savable
from vlm.loading import checkpoint_of, no_loading_bar, reading, require_all_weights, user_errors
from vlm.positions import learned_positions
from vlm.precision import generation_in_bfloat16
from vlm.printing import json_text
from vlm.recipe import Recipe, Stage, require_models
from vlm.recipe_model import Quantization
from vlm.recipe_source import write_yaml
from vlm.recognition.likelihood import label_likelihood
from vlm.recognition.tasks import measure, read_tasks
from vlm.training import contrastive
from vlm.training.arguments import require_arguments, training_arguments
from vlm.training.callbacks import StopOnSignal
from vlm.training.changes import changes, in_words, recipe_changes
from vlm.training.claim import clear, require_free, require_place, run_lock
from vlm.training.features import Keys, kept_features
from vlm.training.folder import finished_stages, require_unchanged, save_stage, stage_home, unscored_stages
from vlm.training.history import draw_losses
from vlm.training.parts import require_parts, trains_vision
from vlm.training.processes import idle_gpus, join_processes, of_first, sharded
from vlm.training.quantization import merged, quantize
from vlm.training.rehearsal import rehearse
from vlm.training.report import environment
from vlm.training.sampling import report_prompts
from vlm.training.stage import Batches, initialize_projector, run_stage
from vlm.training.streams import Stream, mixture_of, stream_layout
from vlm.training.tracking import require_trackers
from vlm.tree_attention import tree_attention

DEQUANTIZED = (
    "quantized weights are saved and scored as the float32 numbers that they stand for, with LoRA merged in: a model "
    "like any other, as large as before, but a rounded one"
)


def train(
    recipe: Recipe,
    *,
    recipe_file: Path | None = None,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    console: Console,
) -> Path:
    """Train and evaluate as `recipe` says; gives the run folder. `dry_run` does everything but step and write.
    `recipe_file` is where the recipe was read from, which the run does not replace.

    Raises UserError if the folder already holds a run and neither `resume` nor `overwrite` says what to do with it, or
    is in use by another process, and Stopped, with all that was done kept, after Ctrl-C or SIGTERM.
    """
    if resume and overwrite:
        raise UserError("--resume goes on with the run in the folder, and --overwrite removes it; give one of the two")
    require_models(recipe)
    for stage in recipe.stages:
        require_trackers(stage.train.get("report_to"))
    processes = join_processes(recipe)
    if note := idle_gpus(processes):
        console.print(note, style="yellow", highlight=False, soft_wrap=True)
    require_arguments(recipe)
    folder = Path(recipe.output_dir)
    require_place(folder, recipe)
    with nullcontext() if dry_run else run_lock(folder, processes):
        if not dry_run:
            require_free(folder, recipe, recipe_file=recipe_file, resume=resume, overwrite=overwrite)
        return _train(recipe, folder, processes, dry_run=dry_run, resume=resume, overwrite=overwrite, console=console)


def _train(
    recipe: Recipe,
    folder: Path,
    processes: PartialState,
    *,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    console: Console,
) -> Path:
    changed = _changes(folder, recipe) if resume else []
    set_seed(recipe.seed)
    log = ProblemLog(0, recipe.data.max_bad)
    mixture, train_examples = None, []
    if recipe.data.streams:
        mixture = mixture_of(recipe.data, lambda source: _read(recipe, source, log))
    else:
        train_examples = apart([_read(recipe, source, log) for source in recipe.data.sources])
    validation_examples = _read(recipe, recipe.data.validation, log) if recipe.data.validation else []
    read_tasks(recipe.evaluation.classification)  # what is wrong with them is said now
    done = finished_stages(folder, recipe.stage_names) if resume else 0
    model, processor = _start_model(recipe, folder, done)
    if recipe.evaluation.metrics and not recipe.contrastive:
        report_prompts(validation_examples[: recipe.evaluation.limit], model, processor, log)
    if note := make_savable(model):
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    for stage in recipe.stages[done:]:  # the last stage's mistakes too, before the first one trains
        require_parts(model, stage.trainable, stage.lora.model_dump() if stage.lora else None)
    processes.wait_for_everyone()  # so that none looks for a run in the folder when there is one
    if processes.is_main_process and not dry_run:  # only now: a mistake in the recipe or its data changes no folder
        _prepare_folder(folder, recipe, changed, overwrite=overwrite, console=console)
    with nullcontext(StopOnSignal()) if dry_run else StopOnSignal() as stop:
        if recipe.is_scored and resume:
            score = contrastive.score if recipe.contrastive else _score
            for number in unscored_stages(folder, recipe.stage_names):
                score(recipe, number, *_start_model(recipe, folder, number + 1), validation_examples, stop, console)
        how: dict[str, Any] = {"dry_run": dry_run, "resume": resume, "stop": stop, "console": console}
        if recipe.contrastive:
            contrastive.run_stages(recipe, model, processor, train_examples, validation_examples, log, done, **how)
        else:
            _run_stages(recipe, model, processor, train_examples, mixture, validation_examples, log, done, **how)
    if log.problems:
        console.print(log.summary(), highlight=False, markup=False)
        if not dry_run and processes.is_main_process:
            text = json_text([vars(problem) for problem in log.problems], indent=1)
            with going_on(folder / "data_problems.json"):
                write_text(folder / "data_problems.json", text)
    console.print("nothing was trained: this was a dry run" if dry_run else f"done: {folder}", highlight=False)
    return folder


def _run_stages(
    recipe: Recipe,
    model: PreTrainedModel,
    processor: Any,
    train_examples: list[Example],
    mixture: Mixture | None,
    validation_examples: list[Example],
    log: ProblemLog,
    done: int,
    *,
    dry_run: bool,
    resume: bool,
    stop: StopOnSignal,
    console: Console,
) -> None:
    """The stages from `done` on, each from the model that the one before has left; the first from `model`. They are
    trained on `mixture`, if the data are streamed."""
    folder, processes = Path(recipe.output_dir), PartialState()
    for number, stage in enumerate(recipe.stages[done:], start=done):
        console.print(f"stage {number + 1} of {len(recipe.stages)}: {stage.name}", style="bold", highlight=False)
        args = training_arguments(recipe, stage, folder / "checkpoints" / stage.name)
        if recipe.model.quantization_config:
            _quantize(model, recipe.model.quantization_config, args, console)
        frozen = not trains_vision(stage.learning_rates) and hasattr(model, "get_vision_features")
        wants_loss = args.eval_strategy != "no"
        trained_on = [] if mixture else _to_learn_from(train_examples, stage, console)
        held_out = validation_examples if wants_loss else []
        cache, keys, held_out_keys = None, None, None
        if frozen and (mixture or recipe.data.augmentation):
            why = (
                "the data is streamed" if mixture else "data.augmentation shows the encoder other images in each epoch"
            )
            console.print(f"features: not kept on disk, since {why}", highlight=False, soft_wrap=True)
        elif frozen and recipe.data.cache_features:
            cache, (keys, held_out_keys) = kept_features(
                recipe, (trained_on, held_out), model, processor, args, log, console, stop
            )
        places = learned_positions(model)
        stream = Stream(mixture, stream_layout(recipe, stage, processor, places), log) if mixture else None
        made = partial(_items, recipe, processor, places, log, console, stop)
        batches = Batches(
            stream.sample() if stream else made(trained_on, keys, "training"),
            made(held_out, held_out_keys, "held out") if wants_loss else [],
            TreeCollator(processor, cache, TreeMasks(model), answer_weighting=recipe.data.answer_weighting),
            stream,
        )
        if recipe.model.adapter.data_dependent_init and number == 0 and not recipe.model.pretrained:
            device = torch.device("cpu") if sharded(args) else args.device
            initialize_projector(model, batches, device, recipe.seed)
        with tree_attention(model):
            trained, adapter = run_stage(
                recipe, stage, model, batches, folder, dry_run=dry_run, resume=resume, stop=stop, console=console
            )
        if dry_run:
            if processes.is_main_process and number == done:
                wanted = recipe.model.quantization_config
                device = torch.device("cpu") if sharded(args) else args.device
                model, said = rehearse(
                    trained, processor, batches.first(), device, wanted.to_config() if wanted else None
                )
                console.print(said, highlight=False, soft_wrap=True)
            else:
                model = merged(trained)
            processes.wait_for_everyone()
            continue
        home_of_stage = stage_home(folder, recipe.stage_names, number)
        if processes.is_main_process:
            model = save_stage(home_of_stage, trained, adapter, processor)
            with going_on(folder / "loss.png"):
                draw_losses({recipe.name: folder / "metrics.jsonl"}, folder / "loss.png")
        processes.wait_for_everyone()
        if not processes.is_main_process:  # of a model that was sharded the first process alone has the whole
            model, _ = _load(str(home_of_stage / "model"), recipe)
        model.requires_grad_(False)
        if recipe.model.quantization_config:
            console.print(DEQUANTIZED, style="yellow", highlight=False, soft_wrap=True)
        if recipe.evaluation.metrics:
            _score(recipe, number, model, processor, validation_examples, stop, console)


def _changes(folder: Path, recipe: Recipe) -> list[str]:
    """What differs from when the run in `folder` began, a line each."""
    if not (folder / "recipe.yaml").is_file():
        return []
    found = [f"the recipe has changed since this run began: {line}" for line in recipe_changes(folder, recipe)]
    if (folder / "environment.json").is_file():
        before = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["packages"]
        packages = [in_words(*line) for line in changes(before, environment()["packages"])]
        found += [f"another version than this run began with, so that numbers may differ: {line}" for line in packages]
    return found


def _prepare_folder(folder: Path, recipe: Recipe, changed: Sequence[str], *, overwrite: bool, console: Console) -> None:
    if overwrite:
        clear(folder)
    for line in changed:
        console.print(line, style="yellow", markup=False, soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", write_yaml(recipe.resolved()))
    write_text(folder / "environment.json", json.dumps(environment(), indent=1))


def _read(recipe: Recipe, source: dict[str, Any], log: ProblemLog) -> list[Example]:
    result = read(source, base_dir=Path(recipe.data.base_dir))
    if not result.examples:
        reasons = "".join(f"\n  {problem}" for problem in result.problems[:5])
        raise UserError(f"there is not one usable example in {source}{reasons}")
    log.total += result.total
    log.extend(result.problems)
    return result.examples


def _to_learn_from(examples: list[Example], stage: Stage, console: Console) -> list[Example]:
    """Without those of text alone where the language model is frozen: nothing that learns sees them."""
    if {"language", "lora"} & stage.learning_rates.keys():
        return examples
    shown = [example for example in examples if example.images]
    if not shown:
        raise UserError("the examples have no images, and with a frozen language model nothing learns from text alone")
    if left_out := len(examples) - len(shown):
        console.print(
            f"{left_out:,} examples without images left out: with a frozen language model nothing learns from them",
            highlight=False,
        )
    return shown


def _start_model(recipe: Recipe, folder: Path, done: int) -> tuple[PreTrainedModel, Any]:
    """The model that the stage after `done` others starts from: the last one's, a pretrained one, or a new one."""
    spec = recipe.model
    left = None
    if done:
        home = stage_home(folder, recipe.stage_names, done - 1)
        of_first(lambda: require_unchanged(home))
        left = str(home / "model")
    if recipe.contrastive:
        return contrastive.start_model(recipe, left)
    if left:
        source = left
    elif spec.pretrained:
        source = checkpoint_of(spec.pretrained)
    else:
        with user_errors(lambda error: f"model: {error}"):
            return build(
                **spec.model_dump(exclude={"preset", "pretrained", "adapter", "quantization_config"}),
                **spec.adapter.model_dump(exclude={"data_dependent_init"}),
            )
    return _load(source, recipe)


def _load(source: str, recipe: Recipe) -> tuple[PreTrainedModel, Any]:
    trust = recipe.model.trust_remote_code
    with reading(source), no_loading_bar():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype="float32", trust_remote_code=trust, output_loading_info=True
        )
        model, info = loaded
        require_all_weights(source, model, info)
    with reading(source, "processor"):
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust)
    generation.require_supported(model, processor)
    return model, processor


def _quantize(model: PreTrainedModel, section: Quantization, args: TrainingArguments, console: Console) -> None:
    before = model.get_memory_footprint()
    layers, linear = quantize(model, section.to_config(), args.device)
    console.print(
        f"quantized: {layers} of {linear} linear layers of the language model in {4 if section.load_in_4bit else 8} "
        f"bits; the model takes {model.get_memory_footprint() / 1e9:.2g} GB, and took {before / 1e9:.2g} GB",
        highlight=False,
        soft_wrap=True,
    )


def _items(
    recipe: Recipe,
    processor: Any,
    max_positions: int | None,
    log: ProblemLog,
    console: Console,
    stop: StopOnSignal,
    examples: Sequence[Example],
    features: Keys | None,
    name: str,
) -> list[TreeItem]:
    """Examples as trees, their images' `features` kept; what is broken or too long is counted and named."""
    items, left_out = make_items(
        examples,
        processor,
        max_length=recipe.data.max_length,
        max_positions=max_positions,
        too_long=recipe.data.too_long,
        report=log.add,
        features=features,
        progress=lambda it, total: stop.until_told(
            track(it, f"tokenizing ({name})", total, console=console, transient=True)
        ),
    )
    stop.check_all("reading the data")
    if left_out.branches:
        console.print(left_out.in_words(recipe.data.max_length, name), highlight=False)
    if not items:
        over = f"data.max_length or the {left_out.positions} positions of the model"
        over = over if left_out.positions else "data.max_length"
        raise UserError(f"no example is left to train on ({name}): every one is broken or over {over}")
    return items


def _score(
    recipe: Recipe,
    number: int,
    model: PreTrainedModel,
    processor: Any,
    examples: Sequence[Example],
    stop: StopOnSignal,
    console: Console,
) -> None:
    """Score a stage's model by generation, sighted and blind, in the precision that was trained in. All processes share
    the work."""
    folder = Path(recipe.output_dir)
    stage = recipe.stages[number]
    args = training_arguments(recipe, stage, folder / "checkpoints" / stage.name)
    network: Any = model.to(args.device).eval()  # type: ignore[arg-type]  # a device is a device
    doing = "answering the questions held out; the model is saved"

    def predict(requests: list[Any]) -> list[str]:
        stop.check(doing)
        return generation.generate(
            network,
            processor,
            requests,
            max_new_tokens=recipe.evaluation.max_new_tokens,
            max_batch_tokens=recipe.evaluation.max_batch_tokens,
            progress=lambda answers: stop.check(doing),
        )

    processes = Processes(args.process_index, args.world_size, gather_object)
    with generation_in_bfloat16(network, args.bf16):
        tasks = recipe.evaluation.classification
        classifier = partial(label_likelihood, network, processor, recipe.evaluation.max_batch_tokens)
        watch: Any = partial(stop.checked, doing)
        more = measure(tasks, classifier, console=console, processes=processes, watch=watch)
        summary = evaluate(
            examples[: recipe.evaluation.limit],
            predict,
            recipe.evaluation.metrics,
            output_dir=stage_home(folder, recipe.stage_names, number) / "evaluation",
            seed=recipe.seed,
            processes=processes,
            more=more,
            check=SizeCheck(processor),
            check_prompt=generation.prompt_check(network, processor),
        )
    show(summary, console)
