"""`vlm quickstart`: fetch, train, score and ask, each step by the same code as on its own."""

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vlm import recipe
from vlm.data.example import Example


def run(*, console: Console) -> Path:
    """Go the whole way in small and return the run folder. A run that was stopped is gone on with.

    The images of the recipe `easy_vqa` are fetched as well; it takes the place of `quickstart` where the images of that
    one cannot be fetched. Raises SourceError when the models, or the images of both, cannot be.
    """
    from vlm import quickstart

    console.print("1. Two small models and some images", style="bold")
    name = "quickstart" if quickstart.prepare().stamps else "easy_vqa"
    loaded = recipe.load(name)

    console.print(f"2. Training: vlm train {name}", style="bold")
    folder = _trained(loaded, console)

    console.print("3. The score on images that were held out", style="bold")
    from vlm.eval.summary import show

    results = folder / "evaluation"
    show(json.loads((results / "summary.json").read_text(encoding="utf-8")), console)

    console.print("4. A question about one of them", style="bold")
    _ask(folder, loaded, console)

    console.print("\nSee and try", style="bold")
    for text in (
        f"every answer beside its image: {results / 'samples.html'}",
        f"talk about an image of yours:  vlm chat {folder} --image PHOTO",
        f"a recipe of your own:          vlm recipes show {name} > mine.yaml",
    ):
        console.print(Text(f"  {text}"), soft_wrap=True)
    return folder


def _trained(loaded: recipe.Recipe, console: Console) -> Path:
    """The run folder: as it is when training is done, gone on with when it was stopped, else new."""
    from vlm.training.run import train

    folder = Path(loaded.output_dir)
    if (folder / "evaluation" / "summary.json").is_file():
        console.print(Text(f"  done already, in {folder}"), soft_wrap=True)
        return folder
    stopped = any(folder.glob("**/checkpoint-*"))
    return train(loaded, resume=stopped, overwrite=not stopped, console=console)


def _ask(folder: Path, loaded: recipe.Recipe, console: Console) -> None:
    from vlm import chat, generation
    from vlm.data.images import open_image
    from vlm.session import Session

    example = _held_out(loaded)
    branch = example.branches[0]
    session = Session(*generation.load(str(folder)))

    def stream(request: chat.Request) -> Iterator[str]:
        return session.stream(request, max_new_tokens=loaded.evaluation.max_new_tokens)

    image = example.images[0]
    for text in (f"image:   {example.where}", f"asked:   {branch.question}", f"correct: {branch.all_references[0]}"):
        console.print(Text(f"  {text}"), soft_wrap=True, highlight=False)
    console.print("  answer:  ", end="")
    chat.chat(stream, console, image=open_image(image), question=branch.question, lines=())


def _held_out(loaded: recipe.Recipe) -> Example:
    from vlm.data.readers import read

    source = loaded.data.validation or loaded.data.sources[0]
    return read(source, base_dir=Path(loaded.data.base_dir)).examples[0]
