"""`vlm eval`: a model, data and metrics brought together, and the result as a table."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm import recipe
from vlm.batches import MAX_BATCH_TOKENS
from vlm.errors import UserError, nearest
from vlm.eval.summary import show
from vlm.loading import Placement
from vlm.locks import locked_folder, real_path
from vlm.paths import existing, existing_folder
from vlm.printing import json_text, printable_name
from vlm.recipe_evaluation import Classification
from vlm.recipe_paths import PATH_KEYS

RESULTS = ("predictions.jsonl", "samples.html", "summary.json")
"""The files of an evaluation."""

_SOME_OF = "one or more of {}, joined by commas"


def run(
    model: str,
    data: str,
    *,
    metrics: Sequence[str] | None,
    output: Path | None,
    limit: int | None,
    console: Console,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    max_new_tokens: int = 32,
    placement: Placement = Placement(),
) -> dict[str, Any]:
    """Evaluate `model` (run folder, checkpoint or Hub name) and return the summary of vlm.eval.runner.evaluate.

    Args:
        data: a recipe, whose validation data is used, or one source in the form `format=... key=value`.
        metrics: names; None stands for those of the recipe.
        output: a folder; its files are replaced when all new ones are written, if they are an evaluation of the same
            model on the same data. Default: `evaluation-DATA` in the model's folder, or in the current one for a model
            of the Hub. The run's own `evaluation`, which goes into its model card, stays as it is.

    Raises UserError for wrong names, for data that cannot be read, and if `output` holds other files of these names, or
    another evaluation, and InUse if another process writes `output`.
    """
    from vlm.data.readers import read
    from vlm.dual_encoder import is_dual_encoder
    from vlm.eval import METRICS
    from vlm.eval import evaluate as score
    from vlm.fingerprint import fingerprint
    from vlm.generation import load_config
    from vlm.recognition.tasks import measure

    if metrics is not None and not metrics:
        raise UserError(f"--metrics is empty; give it {_SOME_OF.format(', '.join(METRICS))}")
    asked = metrics
    words = _words(data)
    tasks: dict[str, Classification] = {}
    if len(words) == 1 and "=" not in words[0] and not existing_folder(words[0]):
        loaded = recipe.load(words[0])
        section, label, metrics = loaded.data, loaded.name, metrics or loaded.evaluation.metrics
        max_new_tokens, tasks = loaded.evaluation.max_new_tokens, loaded.evaluation.classification
    else:
        section = recipe.parse_data(words)
        label = section.sources[0]["format"]
    metrics = list(dict.fromkeys(metrics or ()))
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"there is no metric '{name}'; {nearest(name, METRICS)}")
    pairs = is_dual_encoder(load_config(model))
    if pairs and asked:
        raise UserError(f"{model} is a dual encoder, which is measured by recall alone: leave out --metrics")
    if not metrics and not pairs:
        raise UserError(f"say what to measure: --metrics with {_SOME_OF.format(', '.join(METRICS))}")
    if section.validation is None and (section.streams or len(section.sources) > 1):
        raise UserError(f"{label} has no held-out data, and what it trains on is not one source that is read whole")
    source = section.validation or section.sources[0]
    source = source | ({"limit": limit} if limit else {})
    about: dict[str, Any] = {"model": _full_name(model), "data": _whole(source, Path(section.base_dir))}
    folder = output or (Path(model) if existing_folder(model) else Path()) / f"evaluation-{label}"
    examples, problems = read(source, base_dir=Path(section.base_dir))
    for problem in problems[:5]:
        console.print(f"left out: {problem}", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > 5:
        console.print(f"left out: {len(problems) - 5} more; `vlm data check` lists them")

    with locked_folder(folder, "Wait until it ends, or choose another --output."):
        earlier = _require_same(folder, about)
        about["weights"] = fingerprint(model)
        if earlier and earlier.get("weights") != about["weights"]:
            said = f"the model has changed since the evaluation in {folder}, which is replaced"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
        if pairs:
            from vlm.embedding import load_embedder
            from vlm.pair_evaluation import evaluate_pairs
            from vlm.recognition.zero_shot import zero_shot

            with console.status("loading the model"):
                embedder = load_embedder(model, **placement.options())
            more = measure(tasks, partial(zero_shot, embedder), console=console)
            return evaluate_pairs(embedder, examples, output_dir=folder, console=console, more=more, about=about)

        from vlm import generation
        from vlm.data.image_inputs import SizeCheck
        from vlm.precision import generation_in_bfloat16
        from vlm.recognition.likelihood import label_likelihood

        with console.status("loading the model"):
            network, processor = generation.load(model, **placement.options())

        def predict(requests: list[Any]) -> list[str]:
            return generation.generate(
                network, processor, requests, max_new_tokens=max_new_tokens, max_batch_tokens=max_batch_tokens
            )

        with generation_in_bfloat16(network):  # as at the end of training, so that the scores are the same
            more = measure(tasks, partial(label_likelihood, network, processor, max_batch_tokens), console=console)
            summary = score(
                examples,
                predict,
                metrics,
                output_dir=folder,
                more=more,
                about=about,
                check=SizeCheck(processor),
                check_prompt=generation.prompt_check(network, processor),
            )
        show(summary, console)
        console.print(f"every answer: {folder / 'samples.html'}", markup=False, highlight=False, soft_wrap=True)
        return summary


def _words(data: str) -> list[str]:
    """Split `format=... key=value` as a shell does. What names a file or a folder stays whole.

    Raises UserError for a quote that is not closed, and for a value with a space that is not in quotes.
    """
    if existing(data):
        return [data]
    try:
        words = shlex.split(data)
    except ValueError as error:
        why = "a quote is not closed" if "quotation" in str(error) else str(error)
        raise UserError(
            f"--data {printable_name(data)}: {why}. Put a pair with a space or a quote into quotes of the other kind: "
            '"path=/data/Bob\'s photos"'
        ) from None
    for before, word in pairwise(words):
        if "=" in before and "=" not in word:
            quoted = printable_name(shlex.quote(f"{before} {word}"))
            raise UserError(
                f"--data: {printable_name(word)!r} is no key=value pair. A pair with a space needs quotes: {quoted}"
            )
    return words


def _full_name(model: str) -> str:
    folder = existing_folder(model)
    return str(folder.resolve()) if folder else model


def _whole(source: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
    """A source as it is read back from JSON, with whole paths, so that it is the same from any folder."""

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(item) for item in value]
        path = existing(base_dir / value) if isinstance(value, str) and value else None
        return str(path.resolve()) if path else value

    found = {key: whole(value) if key in PATH_KEYS else value for key, value in source.items()}
    return dict(json.loads(json_text(found, default=str)))


def _require_same(folder: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the summary of the evaluation that the folder holds, if there is one.

    Raises UserError if it holds results of another evaluation, or other files of the same names.
    """
    place = real_path(folder)
    found = [name for name in RESULTS if os.path.lexists(place / name)]
    if not found:
        return None
    advice = "choose another folder with --output, or remove them"
    try:
        earlier = json.loads((place / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = None
    if not isinstance(earlier, dict) or not {"metrics", *about} <= earlier.keys():
        raise UserError(
            f"{folder} holds {', '.join(found)}, and no record of `vlm eval` that says what was evaluated; {advice}"
        )
    for key, now in about.items():
        if earlier[key] != now:
            raise UserError(
                f"{folder} holds the results of {key} {json_text(earlier[key])}, and this is {json_text(now)}; {advice}"
            )
    return earlier
