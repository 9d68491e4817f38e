"""The command `vlm`. Each command hands its arguments to the module that does the work, and imports it only then."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlm.batches import MAX_BATCH_TOKENS
from vlm.disk_faults import NOT_WRITTEN, DiskError, reason
from vlm.errors import UserError
from vlm.printing import SafeConsole, printable
from vlm.standard_streams import lasting_streams
from vlm.threads import share_processors

share_processors()

FIRST_PROCESS = os.environ.get("RANK", "0") == "0"
console = SafeConsole(quiet=not FIRST_PROCESS)  # of several training processes, the first one speaks


class _Commands(TyperGroup):
    """A group whose commands end with one clear message where the user can put things right."""

    def invoke(self, ctx: Any) -> Any:
        with lasting_streams():
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        # peft imports it, and it warns of a kernel for 4-bit weights that it may do without
        logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if getattr(error, "errno", None) in NOT_WRITTEN and not isinstance(error, DiskError):
                place = getattr(error, "filename", None) or "a file"
                advice = "Make room, and run the command again (vlm train: with --resume)"
                _complain(f"{place} could not be written: {reason(error)}. {advice}")
                raise typer.Exit(2) from None
            # Errors that we define are for people. All others are bugs, here or in a library, and keep their traceback.
            if not type(error).__module__.startswith("vlm."):
                raise
            _complain(error)
            raise typer.Exit(getattr(error, "exit_code", 2)) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1" and ctx.parent is None and found[0] != "train":
            raise UserError(
                f"vlm {found[0]} runs in one process, and {processes} were started: each would do all of the work. "
                "Start it without torchrun or accelerate launch. To use several GPUs, start one process for each (with "
                "CUDA_VISIBLE_DEVICES), give each a part of the images and an --output of its own"
            )
        return found


def _complain(message: object) -> None:
    """Say what was wrong. Of the processes of a run those of one machine find the same until they have met, and one of
    them says it; later each may fail alone."""
    torch = sys.modules.get("torch")
    met = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    if met or os.environ.get("LOCAL_RANK", "0") == "0":
        process = "" if FIRST_PROCESS else f" (process {os.environ['RANK']})"
        typer.echo(printable(f"vlm{process}: {message}"), err=True)


class _ListsByDefault(TyperGroup):
    """A group whose command `list` may be left out: its arguments are no commands."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["list", *args])


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
recipes_app = typer.Typer(invoke_without_command=True)
data_app = typer.Typer(no_args_is_help=True)
cache_app = typer.Typer(no_args_is_help=True)
runs_app = typer.Typer(cls=_ListsByDefault, invoke_without_command=True)
app.add_typer(recipes_app, name="recipes", help="List the recipes that come with vlm.")
app.add_typer(runs_app, name="runs", help="List the runs in a folder, or compare two.")
app.add_typer(data_app, name="data", help="Look at data before training on it.")
app.add_typer(cache_app, name="cache", help="Features of frozen encoders that are kept on disk.")

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Run folder, checkpoint folder, or Hub name.")]
ImagesArgument = Annotated[list[str], typer.Argument(help="Files, folders, or globs in quotes.")]
MaxBatchTokens = Annotated[
    int, typer.Option(min=1, help="Tokens at a time, prompts and answers together; lower it if memory runs out.")
]
DeviceMap = Annotated[
    str | None, typer.Option(help="Where the weights go: auto (all GPUs, then memory and disk), cpu, cuda:1 and so on.")
]
Dtype = Annotated[str | None, typer.Option(help="Number format of the weights: auto, float32, bfloat16 or float16.")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with vlm.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes to it, such as train.max_steps=100.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load everything, train nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of the run folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the run folder.")] = False,
) -> None:
    """Train a model as a recipe says."""
    from vlm import recipe as recipes

    loaded = recipes.load(recipe, overrides or [])
    recipes.require_models(loaded)  # before the seconds that the next import takes
    from vlm.paths import existing_file
    from vlm.training import run

    file = existing_file(recipe)
    run.train(loaded, recipe_file=file, dry_run=dry_run, resume=resume, overwrite=overwrite, console=console)


@recipes_app.callback()
def list_recipes(ctx: typer.Context) -> None:
    """List the recipes that come with vlm."""
    from vlm import recipe as recipes

    if ctx.invoked_subcommand is None:
        for name, about in recipes.packaged().items():
            typer.echo(f"{name:12} {about}")


@recipes_app.command("show")
def show_recipe(name: str) -> None:
    """Print a recipe, to read it or to start one of your own: vlm recipes show quickstart > mine.yaml

    So are configurations for `accelerate launch`: accelerate/ddp, accelerate/fsdp2, accelerate/zero2, accelerate/zero3.
    """
    from vlm import recipe as recipes

    typer.echo(recipes.packaged_text(name), nl=False)


RUNS = Path("runs")


@runs_app.callback()
def runs(ctx: typer.Context) -> None:
    """List the runs in a folder, or compare two: vlm runs [FOLDER], vlm runs compare A B"""
    if ctx.invoked_subcommand is None:
        list_runs(RUNS)


@runs_app.command("list")
def list_runs(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Default: runs.")] = RUNS) -> None:
    """List the runs in a folder: how far they have come, and how well."""
    from vlm import runs as comparing

    comparing.ls(folder, console)


@runs_app.command("compare")
def compare_runs(
    first: Annotated[Path, typer.Argument(metavar="A")],
    second: Annotated[Path, typer.Argument(metavar="B")],
    output: Annotated[Path, typer.Option(help="The picture of both losses.")] = Path("comparison.png"),
) -> None:
    """Say in what the recipes of two runs differ and what they came to, and draw their losses."""
    from vlm import runs as comparing

    comparing.compare(first, second, output, console)


@data_app.command("check")
def check_data(
    source: Annotated[
        list[str], typer.Argument(help="A recipe, or one source: format=coco_captions annotations=... images=...")
    ],
    model: Annotated[str | None, typer.Option(help="Count tokens as this model would: folder or Hub name.")] = None,
) -> None:
    """Read data whole and say what is in it, what is wrong with it, and where."""
    from vlm import data_check

    if not data_check.run(source, model=model, console=console):
        raise typer.Exit(1)


@cache_app.command("ls")
def list_cache() -> None:
    """Say which encoders' features are kept, and how much room they take."""
    from vlm import cache

    cache.ls(console)


@cache_app.command("clear")
def clear_cache(
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY", help="As listed, or how they start.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove all without asking.")] = False,
) -> None:
    """Remove kept features: those of the given keys, or all."""
    from vlm import cache

    cache.clear(keys or [], yes=yes, console=console)


@app.command()
def encoders() -> None:
    """List families of vision encoders, with their tokens an image and their sizes."""
    from vlm import encoders as families

    families.run(console)


@app.command()
def encode(
    images: ImagesArgument,
    encoder: Annotated[str, typer.Option(help="The vision encoder: Hub name (timm/... too) or folder.")],
    output: Annotated[Path, typer.Option(help="A .safetensors file that is not there yet.")],
    patches: Annotated[
        bool, typer.Option("--patches", help="All patch embeddings of an image, in place of one pooled vector.")
    ] = False,
    vision_feature_layer: Annotated[
        list[int] | None,
        typer.Option(help="With --patches: which hidden state, such as -2; several are concatenated on channels."),
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side in pixels. Default: the encoder's own.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: computed and written in it.")] = "float32",
) -> None:
    """Write what a vision encoder sees in many images into one file."""
    from vlm import encode as encoding

    encoding.run(
        images,
        encoder=encoder,
        output=output,
        patches=patches,
        vision_feature_layer=vision_feature_layer,
        image_size=image_size,
        dtype=dtype,
        console=console,
    )


@app.command()
def classify(
    model: ModelArgument,
    images: Annotated[list[str] | None, typer.Argument(help="Files, folders, or globs in quotes.")] = None,
    labels: Annotated[str | None, typer.Option(help="a,b,c, a text file with one a line, or a CSV file.")] = None,
    data: Annotated[
        str | None, typer.Option(help="In place of images and labels: a folder of folders, or rows with a label.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="With --data. Default: label.")] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="What is made of a label, such as 'a photo of a {}.'.")
    ] = None,
    templates: Annotated[str | None, typer.Option(help="imagenet, or a text file with one a line.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What a vision-language model is asked.")] = None,
    output: Annotated[Path | None, typer.Option(help="A .jsonl file with the probability of each label.")] = None,
    max_batch_tokens: MaxBatchTokens = MAX_BATCH_TOKENS,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
) -> None:
    """Say which of some labels is in an image, with a model that was not trained on them."""
    from vlm import classify as classifying
    from vlm.loading import Placement

    classifying.run(
        model,
        images or [],
        labels=labels,
        data=data,
        label_column=label_column,
        template=template or [],
        templates=templates,
        prompt=prompt,
        output=output,
        max_batch_tokens=max_batch_tokens,
        placement=Placement(device_map, dtype),
        console=console,
    )


@app.command()
def probe(
    encoders: Annotated[
        list[str], typer.Argument(metavar="ENCODER...", help="Hub names (timm/... too), folders or runs; side by side.")
    ],
    data: Annotated[str, typer.Option(help="A folder of folders, or rows with a label.")],
    label_column: Annotated[str | None, typer.Option(help="Default: label.")] = None,
    test: Annotated[str | None, typer.Option(help="Like --data: test on it, in place of a part of --data.")] = None,
    test_size: Annotated[
        float | None, typer.Option(min=0.01, max=0.99, help="The share of each label to test on. Default: 0.2.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws that part.")] = 0,
    k: Annotated[list[int], typer.Option(min=1, help="How many nearest neighbours vote; several are compared.")] = [20],  # noqa: B006
    output: Annotated[Path | None, typer.Option(help="A .json file with all scores and predictions.")] = None,
) -> None:
    """Learn labels from an encoder's features, by a linear probe and by nearest neighbours, and test how well."""
    from vlm import probe as probing

    probing.run(
        encoders,
        data=data,
        label_column=label_column,
        test=test,
        test_size=test_size,
        seed=seed,
        k=k,
        output=output,
        console=console,
    )


INDEX = Path("index")


@app.command()
def index(
    images: ImagesArgument,
    encoder: Annotated[
        str | None, typer.Option(help="Run folder, checkpoint folder or Hub name. Default: the index's own.")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="INDEX", help="The index: a folder, new or to be updated.")] = INDEX,
) -> None:
    """Make an index of images for vlm search, or bring one up to date: only what has changed is encoded."""
    from vlm import index as indexing

    indexing.run(images, encoder=encoder, output=output, console=console)


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="An image file, or else words.")],
    index: Annotated[Path, typer.Option(help="What vlm index has made.")] = INDEX,
    k: Annotated[int, typer.Option(min=1, help="How many images.")] = 10,
    html: Annotated[Path | None, typer.Option(help="A page of them, to look at.")] = None,
) -> None:
    """Find the images of an index that are most like a photo, or like words."""
    from vlm import search as searching

    searching.run(query, index=index, k=k, html=html, console=console)


@app.command("eval")
def evaluate(
    model: ModelArgument,
    data: Annotated[str, typer.Option(help="A recipe (its validation data), or 'format=... key=value'.")],
    metrics: Annotated[
        str | None, typer.Option(help="For example cider_d,rouge_l. Default: those of the recipe.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results. Default: evaluation-DATA in the run.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many images.")] = None,
    max_batch_tokens: MaxBatchTokens = MAX_BATCH_TOKENS,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
) -> None:
    """Score a model, and also blind: on wrong images.

    The blind score is what the answers' habits alone are worth. A model that scores no better does not look.
    """
    from vlm import evaluate as evaluation
    from vlm.loading import Placement

    names = None if metrics is None else [name for part in metrics.split(",") if (name := part.strip())]
    evaluation.run(
        model,
        data,
        metrics=names,
        output=output,
        limit=limit,
        max_batch_tokens=max_batch_tokens,
        placement=Placement(device_map, dtype),
        console=console,
    )


@app.command()
def chat(
    model: ModelArgument,
    question: Annotated[str | None, typer.Argument(help="Ask this one question and leave.")] = None,
    image: Annotated[str | None, typer.Option(metavar="PHOTO", help="The image to talk about.")] = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
) -> None:
    """Talk with a model about an image."""
    from vlm import chat as chatting
    from vlm.loading import Placement

    placement = Placement(device_map, dtype)
    chatting.run(model, image=image, question=question, console=console, placement=placement)


@app.command()
def predict(
    model: ModelArgument,
    images: ImagesArgument,
    prompt: Annotated[str, typer.Option(help="What to ask about each image.")],
    output: Annotated[Path, typer.Option(help="A .jsonl file; one that is there already is continued.")],
    max_batch_tokens: MaxBatchTokens = MAX_BATCH_TOKENS,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
) -> None:
    """Ask the same about many images."""
    from vlm import predict as predicting
    from vlm.loading import Placement

    predicting.run(
        model,
        images,
        prompt=prompt,
        output=output,
        max_batch_tokens=max_batch_tokens,
        max_new_tokens=max_new_tokens,
        placement=Placement(device_map, dtype),
        console=console,
    )


@app.command()
def push(
    run: Annotated[str, typer.Argument(help="Run folder.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME")],
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora/--keep-lora", help="Merge LoRA into the weights, or push it beside them.")
    ] = True,
    target: Annotated[
        str | None,
        typer.Option("--as", metavar="TYPE", help="Push a transformers model: llava, idefics3, ... as in vlm export."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository private.")] = False,
) -> None:
    """Publish a model on the Hugging Face Hub."""
    from vlm import hub

    hub.run(run, repository, merge_lora=merge_lora, target=target, private=private, console=console)


@app.command()
def export(
    model: ModelArgument,
    to: Annotated[
        str,
        typer.Option(help="A transformers model (llava, llava_next, idefics3, ...), gguf or remote_code."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder for the checkpoint. Default: exported-TYPE in the run folder.")
    ] = None,
) -> None:
    """Write a model so that it loads without vlm: in transformers, or in llama.cpp."""
    from vlm import export as exporting

    exporting.run(model, to, output, console=console)


@app.command()
def fetch(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="Left out: a list of them.")] = None,
) -> None:
    """Get small real weights and data into the cache folder: what the recipes that come with vlm begin with."""
    from vlm import quickstart as parts

    if names:
        parts.get(names)
    else:
        typer.echo("\n".join(parts.KNOWN))


@app.command()
def quickstart() -> None:
    """Fetch, train, score and chat, all in small.

    Two small models and two small sets of images are fetched, once; then the recipe `quickstart` is trained and scored.
    """
    from vlm import tour

    tour.run(console=console)
