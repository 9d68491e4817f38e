"""Score a model on examples, and beside that score the one it gets when it is shown the wrong images.

The blind score asks the same prompts with the images dealt to other examples. A model that scores as well blind as it
does seeing has learnt the answers' statistics, not to look.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.progress import track

from vlm.eval.metrics import Scores, bootstrap_interval, get_metric
from vlm.eval.samples import write_samples

if TYPE_CHECKING:
    from vlm.data.example import Example

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Request = tuple[list[Image.Image], list[Message]]
Predict = Callable[[list[Request]], list[str]]

CHUNK = 64  # requests handed to `predict` at once: bounds the opened images in memory


@dataclass
class Item:
    """One question about one image: what is asked, and every acceptable answer.

    Attributes:
        example: position of the example in the evaluated list, which has the images.
        image_id: id of the image group.
        where: place of the (first) branch in the data, for messages.
        messages: the prompt, ending with a user message.
        references: all acceptable answers.
    """

    example: int
    image_id: str
    where: str
    messages: list[Message]
    references: list[str] = field(default_factory=list)


def _text(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if part.get("type") == "text")


def prompt_text(messages: Sequence[Message]) -> str:
    """The prompt for a reader: the text of the only user turn, or all turns with their roles."""
    if len(messages) == 1:
        return _text(messages[0]).strip()
    return "\n".join(f"{message['role']}: {_text(message).strip()}" for message in messages)


def items_of(examples: Sequence[Example]) -> list[Item]:
    """The items of examples, in order: one for each prompt about an image.

    The prompt of a branch is what stands before its last assistant message; earlier assistant turns are kept as given.
    Branches of one image with the same prompt (five captions) become one item with all their references.

    Raises:
        ValueError: a branch does not end with an assistant message, or has no answer.
    """
    items: dict[tuple[str, str], Item] = {}
    for position, example in enumerate(examples):
        for branch in example.branches:
            where = branch.where or example.where
            if not branch.messages or branch.messages[-1]["role"] != "assistant":
                raise ValueError(f"{where}: the conversation does not end with an assistant message: nothing to score")
            if len(branch.messages) == 1:
                raise ValueError(f"{where}: the conversation has an answer but no prompt before it")
            messages: list[Message] = list(branch.messages[:-1])
            key = (example.image_id, json.dumps(messages, sort_keys=True, default=str))
            item = items.setdefault(key, Item(position, example.image_id, where, messages))
            item.references += branch.all_references
    return list(items.values())


def derangement(groups: Sequence[str], seed: int) -> dict[str, str]:
    """For each distinct id another id, each used once; the same for the same seed. Needs at least two ids.

    A random cyclic shift of a random order: nobody gets its own image.
    """
    ids = sorted(set(groups))
    if len(ids) < 2:
        raise ValueError("Images can only be shuffled among at least two")
    order = np.random.default_rng(seed).permutation(len(ids))
    return {ids[a]: ids[b] for a, b in zip(order, np.roll(order, -1), strict=True)}


def _open(example: Example) -> list[Image.Image]:
    from vlm.data.images import open_image

    return [open_image(source) for source in example.images]


def _predict(
    items: Sequence[Item], source: Sequence[Example], predict: Predict, description: str
) -> tuple[list[str], dict[int, str]]:
    """Answers to items, and why the images of some do not open.

    `source[i]` is the example whose images item i is shown.

    Returns:
        The texts, [items], and for the items that have none (an empty text stands in for it): position -> why.
    """
    # Requests about one image stand side by side, so that whoever predicts can encode it once.
    order = sorted(range(len(items)), key=lambda i: (items[i].example, i))
    answers = [""] * len(items)
    broken: dict[int, str] = {}
    for start in track(range(0, len(order), CHUNK), description=description):
        opened: dict[int, list[Image.Image] | str] = {}
        asked: list[int] = []
        requests: list[Request] = []
        for i in order[start : start + CHUNK]:
            key = id(source[i])
            if key not in opened:
                try:
                    opened[key] = _open(source[i])
                except (OSError, ValueError) as error:
                    opened[key] = str(error)
            images = opened[key]
            if isinstance(images, str):
                broken[i] = images
            else:
                asked.append(i)
                requests.append((images, items[i].messages))
        texts = predict(requests) if requests else []
        if len(texts) != len(requests):
            raise ValueError(f"predict gave {len(texts)} texts for {len(requests)} requests; it must give one for each")
        for i, text in zip(asked, texts, strict=True):
            answers[i] = text
    return answers, broken


def _score(metrics: Sequence[str], predictions: list[str], items: Sequence[Item]) -> dict[str, Scores]:
    references = [item.references for item in items]
    return {name: get_metric(name)(predictions, references) for name in metrics}


def _blind_sources(examples: Sequence[Example], items: Sequence[Item], seed: int) -> tuple[list[Example] | None, str]:
    """For each item the example whose images it is shown blind, or None and the reason why there is none."""
    first = {item.image_id: item.example for item in reversed(items)}
    if len(first) < 2:
        return None, "only one image: there is no other image to show instead"
    counts = {len(examples[item.example].images) for item in items}
    if len(counts) > 1:
        return None, f"examples differ in their number of images ({sorted(counts)}): they cannot be swapped"
    if counts == {0}:
        return None, "the examples have no images"
    other = derangement([item.image_id for item in items], seed)
    return [examples[first[other[item.image_id]]] for item in items], ""


def evaluate(
    examples: Sequence[Example],
    predict: Predict,
    metrics: Sequence[str],
    *,
    output_dir: str | Path,
    seed: int = 0,
    blind: bool = True,
    bootstrap: int = 1000,
    num_samples: int = 48,
) -> dict[str, Any]:
    """Predict, score, and write `predictions.jsonl`, `summary.json` and `samples.html` into `output_dir`.

    Args:
        examples: what to evaluate on.
        predict: answers a list of requests (opened images, messages that end with a user message) with a list of texts.
        metrics: names from `vlm.eval.METRICS`.
        output_dir: folder for the files; made if missing.
        seed: of the image shuffle, the bootstrap and the choice of samples.
        blind: also ask every prompt with another example's images.
        bootstrap: resamples for the 95 % intervals, over images; 0 for none.
        num_samples: items on the page.

    Returns:
        The summary: `n_items`, `n_images`, `n_broken`, `broken_images` (image_id, where, why), `blind_missing` (the
        reason, or None), `seed`, and `metrics`: name -> score, interval, blind_score, blind_interval, n_items,
        n_images, sees. `sees` is true when the score's interval lies wholly above the blind one's, None when either is
        missing. Scores are on the metric's own scale: 0 to 1, CIDEr-D 0 to 10.

    Raises:
        ValueError: an unknown metric, nothing left to evaluate, or `predict` returned the wrong number of texts.
    """
    for name in metrics:
        get_metric(name)
    if not metrics:
        raise ValueError("No metric named: nothing to score")
    items = items_of(examples)
    predictions, broken = _predict(items, [examples[item.example] for item in items], predict, "Predicting")
    # One line for each example: its items share the images.
    why = {items[i].example: reason for i, reason in broken.items()}
    broken_images = [{"image_id": examples[e].image_id, "where": examples[e].where, "why": why[e]} for e in sorted(why)]
    if broken:
        logger.warning(
            "%d of %d examples left out: their images do not open (see summary.json)", len(why), len(examples)
        )
    predictions = [text for i, text in enumerate(predictions) if i not in broken]
    items = [item for i, item in enumerate(items) if i not in broken]
    if not items:
        reason = f"all {len(why)} images are broken, the first: {broken_images[0]['why']}" if why else "no examples"
        raise ValueError(f"Nothing to evaluate: {reason}")

    groups = [item.image_id for item in items]
    scores = _score(metrics, predictions, items)

    sources, blind_missing = _blind_sources(examples, items, seed) if blind else (None, "not asked for")
    blind_predictions: list[str] | None = None
    blind_scores: dict[str, Scores] = {}
    if sources is not None:
        blind_predictions, lost = _predict(items, sources, predict, "Predicting blind")
        if lost:  # they opened a minute ago
            raise OSError(f"An image that opened before does not any more: {next(iter(lost.values()))}")
        blind_scores = _score(metrics, blind_predictions, items)

    def interval(found: Scores | None) -> list[float] | None:
        return list(bootstrap_interval(found, groups, resamples=bootstrap, seed=seed)) if found and bootstrap else None

    summary: dict[str, Any] = {
        "metrics": {},
        "n_items": len(items),
        "n_images": len(set(groups)),
        "n_broken": len(broken_images),
        "broken_images": broken_images,
        "blind_missing": None if sources is not None else blind_missing,
        "seed": seed,
    }
    for name in metrics:
        seen, unseen = interval(scores[name]), interval(blind_scores.get(name))
        summary["metrics"][name] = {
            "score": scores[name].score,
            "interval": seen,
            "blind_score": blind_scores[name].score if name in blind_scores else None,
            "blind_interval": unseen,
            "n_items": len(items),
            "n_images": len(set(groups)),
            "sees": None if seen is None or unseen is None else seen[0] > unseen[1],
        }

    rows = []
    for i, item in enumerate(items):
        row: dict[str, Any] = {
            "image_id": item.image_id,
            "where": item.where,
            "prompt": prompt_text(item.messages),
            "prediction": predictions[i],
            "references": item.references,
            "scores": {name: float(scores[name].per_item[i]) for name in metrics},
        }
        if sources is not None and blind_predictions is not None:
            row["blind_image_id"] = sources[i].image_id
            row["blind_prediction"] = blind_predictions[i]
            row["blind_scores"] = {name: float(blind_scores[name].per_item[i]) for name in metrics}
        rows.append(row)

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "predictions.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:num_samples])
    write_samples(
        output_dir / "samples.html",
        [rows[i] for i in chosen],
        images=[partial(_open, examples[items[i].example]) for i in chosen],
        summary=summary,
    )
    return summary
