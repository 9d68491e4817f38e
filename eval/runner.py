"""Score a model on examples, and beside that score the one it gets when it is shown the wrong images.

The blind score asks the same prompts with the images dealt to other examples. A model that scores as well blind as it
does seeing has learnt the answers' statistics, not to look.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from rich.progress import track

from vlm.disk_faults import going_on
from vlm.eval.metrics import Scores, bootstrap_interval, get_metric
from vlm.eval.samples import write_samples
from vlm.files import replacing_files
from vlm.printing import json_text

if TYPE_CHECKING:
    from vlm.data.example import Example

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Request = tuple[list[Image.Image], list[Message]]
Predict = Callable[[list[Request]], list[str]]
Check = Callable[[list[Image.Image]], None]
CheckPrompt = Callable[[Request], str]


@dataclass(frozen=True)
class Processes:
    """Those that evaluate together: which of how many this one is, and what makes one list of the lists of all."""

    index: int = 0
    count: int = 1
    gather: Callable[[list[Any]], list[Any]] = list

    def share(self, work: Sequence[Any]) -> Sequence[Any]:
        """What of `work` this process does."""
        return work[self.index :: self.count]


@dataclass
class Item:
    """One question about one image: what is asked, and every acceptable answer.

    Attributes:
        example: position of the example in the evaluated list, which has the images.
        image_id: id of the image group.
        where: place of the (first) branch in the data, for messages.
        messages: the prompt, ending with a user message.
        references: all acceptable answers.
        question_id: that of the branch; None for captions.
    """

    example: int
    image_id: str
    where: str
    messages: list[Message]
    references: list[str] = field(default_factory=list)
    question_id: str | None = None


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
    Branches of one example with the same prompt and no question id (five captions) become one item with all their
    references. Questions are one item for each question id, also where they are of the same words.

    Raises:
        ValueError: a branch does not end with an assistant message, or has no answer.
    """
    items: dict[tuple[int, str | None, str], Item] = {}
    shared: set[int] = set()  # references that several branches have in common
    for position, example in enumerate(examples):
        for branch in example.branches:
            where = branch.where or example.where
            if not branch.messages or branch.messages[-1]["role"] != "assistant":
                raise ValueError(f"{where}: the conversation does not end with an assistant message: nothing to score")
            if len(branch.messages) == 1:
                raise ValueError(f"{where}: the conversation has an answer but no prompt before it")
            messages: list[Message] = list(branch.messages[:-1])
            key = (position, branch.question_id, json.dumps(messages, sort_keys=True, default=str))
            new = Item(position, example.image_id, where, messages, question_id=branch.question_id)
            item = items.setdefault(key, new)
            if not branch.references or id(branch.references) not in shared:
                item.references += branch.all_references
            shared.add(id(branch.references))
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


def _find_broken(examples: Sequence[Example], processes: Processes, check: Check) -> dict[int, str]:
    """Positions of the examples whose images do not open, or cannot be used, and why."""
    broken: list[tuple[int, str]] = []
    mine = processes.share(range(len(examples)))
    for position in track(mine, description="Opening images", disable=processes.index > 0):
        try:
            check(_open(examples[position]))
        except (OSError, ValueError) as error:
            broken.append((position, str(error)))
    return dict(sorted(processes.gather(broken)))


def _find_refused(
    asked: Sequence[tuple[Item, Example]], processes: Processes, check_prompt: CheckPrompt
) -> dict[int, str]:
    """Positions of the items whose prompts cannot be asked with the images of the example next to them, and why."""
    refused: list[tuple[int, str]] = []
    of_example: dict[int, list[int]] = {}
    for i, (_, shown) in enumerate(asked):
        of_example.setdefault(id(shown), []).append(i)
    for group in processes.share([*of_example.values()]):
        images = _open(asked[group[0]][1])
        refused += [(i, why) for i in group if (why := check_prompt((images, asked[i][0].messages)))]
    return dict(sorted(processes.gather(refused)))


def _askable(
    examples: Sequence[Example],
    items: Sequence[Item],
    sources: Sequence[Example] | None,
    processes: Processes,
    check_prompt: CheckPrompt,
) -> tuple[list[int], list[dict[str, str]]]:
    """Positions of the items whose prompts can be asked, and the others in the form of `broken_images`. Images take
    different numbers of tokens: a prompt may be too long with the images that it is shown blind alone, `sources`."""
    refused = _find_refused([(item, examples[item.example]) for item in items], processes, check_prompt)
    rest = [i for i in range(len(items)) if i not in refused]
    if sources is not None:
        blind = _find_refused([(items[i], sources[i]) for i in rest], processes, check_prompt)
        refused |= {rest[place]: f"with the images of another example, {why}" for place, why in blind.items()}
    left_out = [{"image_id": items[i].image_id, "where": items[i].where, "why": refused[i]} for i in sorted(refused)]
    return [i for i in range(len(items)) if i not in refused], left_out


def _predict(asked: Sequence[tuple[Item, Example]], predict: Predict, processes: Processes) -> list[str]:
    """The answer to each item when it is shown the images of the example beside it. Each process finds its share, and
    gets those of all.

    Requests about the same images stand side by side, so that whoever predicts can encode them once.
    """
    from vlm.data.images import chunks

    groups: dict[int, list[int]] = {}
    for i, (_, shown) in enumerate(asked):
        groups.setdefault(id(shown), []).append(i)
    answers: list[tuple[int, str]] = []
    mine = track(processes.share([*groups.values()]), description="Predicting", disable=processes.index > 0)
    for chunk in chunks((group, _open(asked[group[0]][1])) for group in mine):
        requests: list[Request] = [(images, asked[i][0].messages) for group, images in chunk for i in group]
        texts = predict(requests)
        if len(texts) != len(requests):
            raise ValueError(f"predict gave {len(texts)} texts for {len(requests)} requests; it must give one for each")
        answers += zip([i for group, _ in chunk for i in group], texts, strict=True)
    return [text for _, text in sorted(processes.gather(answers))]


def _score(metrics: Sequence[str], predictions: list[str], items: Sequence[Item]) -> dict[str, Scores]:
    references = [item.references for item in items]
    return {name: get_metric(name)(predictions, references) for name in metrics}


def _blind_sources(examples: Sequence[Example], items: Sequence[Item], seed: int) -> tuple[list[Example] | None, str]:
    """For each item the example whose images it is shown blind, or None and the reason why there is none.

    The images are those of an example with as many; one without images is asked as it is.
    """
    first = {item.image_id: item.example for item in reversed(items)}
    by_count: dict[int, list[str]] = {}
    for image_id, position in first.items():
        by_count.setdefault(len(examples[position].images), []).append(image_id)
    other = {image_id: image_id for image_id in by_count.pop(0, [])}
    if not by_count:
        return None, "the examples have no images"
    for count, image_ids in sorted(by_count.items()):
        if len(image_ids) < 2:
            alone = "only one image" if len(first) == 1 else f"only one example has {count} image{'s' * (count > 1)}"
            return None, f"{alone}: there is no other to show instead"
        other |= derangement(image_ids, seed)
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
    processes: Processes = Processes(),
    more: Mapping[str, dict[str, Any]] | None = None,
    about: Mapping[str, Any] | None = None,
    may_fail_to_write: bool = False,
    check: Check = lambda images: None,
    check_prompt: CheckPrompt | None = None,
) -> dict[str, Any]:
    """Predict, score, and write `predictions.jsonl`, `summary.json` and `samples.html` into `output_dir`.

    Of several `processes` all call it with the same arguments. Each predicts its share, every item is scored once, over
    all of them, and the first process writes.

    Args:
        examples: what to evaluate on.
        predict: answers a list of requests (opened images, messages that end with a user message) with a list of texts.
        metrics: names from `vlm.eval.METRICS`.
        output_dir: folder for the files; made if missing.
        seed: of the image shuffle, the bootstrap and the choice of samples.
        blind: also ask every prompt with another example's images.
        bootstrap: resamples for the 95 % intervals, over images; 0 for none.
        num_samples: items on the page.
        processes: those that evaluate together; by default this one alone.
        more: what was measured otherwise, in the form of `metrics` of the summary, where it comes last.
        about: what was evaluated, the first keys of the summary.
        may_fail_to_write: only log a warning if the files cannot be written, as on a full disk.
        check: raises UserError for images that the model cannot be shown; they are left out as those that do not open.
        check_prompt: says why a prompt cannot be asked, or nothing if it can; those are left out and counted alike.

    Returns:
        The summary: `n_items`, `n_images`, `n_broken`, `broken_images` (image_id, where, why; also of prompts),
        `blind_missing` (the reason, or None), `seed`, and `metrics`: name -> score, interval, blind_score,
        blind_interval, n_items, n_images, sees. `sees` is true when the score's interval lies wholly above the blind
        one's, None when either is missing. Scores are on the metric's own scale: 0 to 1, CIDEr-D 0 to 10.

    Raises:
        ValueError: an unknown metric, nothing left to evaluate, or `predict` returned the wrong number of texts.
        DiskError: the files cannot be written. Those that were there before are unchanged.
    """
    for name in metrics:
        get_metric(name)
    if not metrics:
        raise ValueError("No metric named: nothing to score")
    broken = _find_broken(examples, processes, check)
    # One line for each example: its items share the images.
    broken_images = [{"image_id": examples[e].image_id, "where": examples[e].where, "why": broken[e]} for e in broken]
    if broken and processes.index == 0:
        logger.warning(
            "%d of %d examples left out: their images cannot be used (see summary.json)", len(broken), len(examples)
        )
    items = [item for item in items_of(examples) if item.example not in broken]
    sources, blind_missing = _blind_sources(examples, items, seed) if blind else (None, "not asked for")
    left_out: list[dict[str, str]] = []
    total = len(items)
    if check_prompt:
        kept, left_out = _askable(examples, items, sources, processes, check_prompt)
        items = [items[i] for i in kept]
        sources = None if sources is None else [sources[i] for i in kept]
    if left_out and processes.index == 0:
        logger.warning(
            "%d of %d prompts left out, the first in %s: %s (all are in summary.json)",
            len(left_out), total, left_out[0]["where"], left_out[0]["why"],
        )  # fmt: skip
    if not items:
        found = (broken_images + left_out)[0]["why"] if broken_images or left_out else ""
        reason = f"all {len(broken)} images are broken, the first: {found}" if broken else "no examples"
        reason = f"no prompt can be asked, the first: {found}" if left_out else reason
        raise ValueError(f"Nothing to evaluate: {reason}")

    groups = [item.image_id for item in items]
    asked = [(item, examples[item.example]) for item in items]
    if sources is not None:
        asked += zip(items, sources, strict=True)
    answers = _predict(asked, predict, processes)
    predictions, blind_predictions = answers[: len(items)], answers[len(items) :]
    scores = _score(metrics, predictions, items)
    blind_scores = _score(metrics, blind_predictions, items) if blind_predictions else {}

    def interval(found: Scores | None) -> list[float] | None:
        return list(bootstrap_interval(found, groups, resamples=bootstrap, seed=seed)) if found and bootstrap else None

    summary: dict[str, Any] = {
        **(about or {}),
        "metrics": {},
        "n_items": len(items),
        "n_images": len(set(groups)),
        "n_broken": len(broken_images) + len(left_out),
        "broken_images": broken_images + left_out,
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
    summary["metrics"] |= more or {}
    if processes.index > 0:
        return summary

    rows = []
    for i, item in enumerate(items):
        row: dict[str, Any] = {
            "image_id": item.image_id,
            **({} if item.question_id is None else {"question_id": item.question_id}),
            "where": item.where,
            "prompt": prompt_text(item.messages),
            "prediction": predictions[i],
            "references": item.references,
            "scores": {name: float(scores[name].per_item[i]) for name in metrics},
        }
        if sources is not None:
            row["blind_image_id"] = sources[i].image_id
            row["blind_prediction"] = blind_predictions[i]
            row["blind_scores"] = {name: float(blind_scores[name].per_item[i]) for name in metrics}
        rows.append(row)

    output_dir = Path(output_dir)
    may_fail = going_on(output_dir) if may_fail_to_write else nullcontext()
    with may_fail, replacing_files(output_dir, "summary.json") as folder:
        with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json_text(row) + "\n" for row in rows)
        chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:num_samples])
        write_samples(
            folder / "samples.html",
            [rows[i] for i in chosen],
            images=[partial(_open, examples[items[i].example]) for i in chosen],
            summary=summary,
        )
        (folder / "summary.json").write_text(json_text(summary, indent=2) + "\n", encoding="utf-8")
    return summary
