"""What is wrong with data: counted before training (`check`), and held to a budget while training (`ProblemLog`).

Nothing bad is left out in silence. A bad row is named with its file, skipped and counted, and the count is reported.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.chat_templates import Refused
from vlm.data.example import Branch, Example, Problem, message_text
from vlm.data.images import ImageError, image_sha256, open_image
from vlm.data.readers import read
from vlm.errors import UserError, cut
from vlm.printing import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

IGNORE_INDEX = -100
_SHOWN = 10  # of each kind of finding, and answers of an example; the counts are always of all
_LONGEST_LINE = 600
_LONGEST_TEXT = 1000
"""Characters of a finding, and of a stretch of an example."""

Tokenize = Callable[[Example], list[tuple[Sequence[int], Sequence[int]]]]
"""`(input_ids, labels)` for each branch of an example, labels -100 where nothing is learned."""
Decode = Callable[[Sequence[int]], str]


class TooManyProblems(UserError):  # noqa: N818 - named for what it says
    """More of the data is bad than `max_bad` allows."""


class ProblemLog:
    """Counts bad data against a budget: more than `max_bad` (a share) of `total` branches stops the run.

    A single problem never stops it, so that one broken image in a set of fifty can be left out; `max_bad=0` allows
    none. The same place may be reported in every epoch and is counted once.
    """

    def __init__(self, total: int, max_bad: float = 0.01) -> None:
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad is a share from 0 to 1, found {max_bad}")
        self.total = total
        self.max_bad = max_bad
        self._problems: dict[tuple[str, str], Problem] = {}

    @property
    def problems(self) -> list[Problem]:
        """All problems so far, each place once."""
        return list(self._problems.values())

    @property
    def bad(self) -> int:
        """How many branches were lost."""
        return sum(problem.lost for problem in self._problems.values())

    def add(self, problem: Problem) -> None:
        """Note one problem.

        Raises:
            TooManyProblems: the budget is spent.
        """
        self.extend([problem])

    def add_image(self, error: ImageError, example: Example) -> None:
        """Note an image that could not be opened, with all branches of its example.

        Raises:
            TooManyProblems: the budget is spent.
        """
        self.add(image_problem(error, example))

    def extend(self, problems: Iterable[Problem]) -> None:
        """Note several problems, such as those met on reading.

        Raises:
            TooManyProblems: the budget is spent. All of them are counted first.
        """
        for problem in problems:
            known = self._problems.get((problem.where, problem.key))
            if known is None or known.lost < problem.lost:
                self._problems[problem.where, problem.key] = problem
        over = self.bad > self.max_bad * self.total
        if over and (len(self._problems) > 1 or self.max_bad == 0):
            advice = "repair the data, or raise data.max_bad to train without them"
            raise TooManyProblems(f"{self.summary()}\nThat is more than max_bad = {self.max_bad:g} allows; {advice}.")

    def summary(self) -> str:
        """Lines for people: how many, of how many, and the first of them by name. Empty when all is well."""
        if not self._problems:
            return ""
        share = f"{self.bad:,} of {self.total:,} answers ({self.bad / max(self.total, 1):.2%})"
        return "\n".join([f"Skipped {share} as bad:", *_listing(self.problems)])


def image_problem(error: ImageError, example: Example) -> Problem:
    """The problem of an example whose image cannot be opened."""
    return Problem(error.where, "image", f"{error.why}; {error.fix}", lost=len(example.branches))


@dataclass(frozen=True)
class Spread:
    """The smallest, middle, mean and largest of some lengths."""

    smallest: int
    median: float
    mean: float
    largest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Spread | None:
        """The spread of lengths; `None` of none."""
        if not lengths:
            return None
        return cls(min(lengths), statistics.median(lengths), statistics.fmean(lengths), max(lengths))

    def __str__(self) -> str:
        return f"{self.smallest} to {self.largest}, median {self.median:g}, mean {self.mean:.1f}"


@dataclass(frozen=True)
class Segment:
    """A stretch of a shown conversation, and whether it is learned."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Sample:
    """One shown branch."""

    where: str
    segments: tuple[Segment, ...]


@dataclass
class Report:
    """What `check` found.

    Attributes:
        images: how many different images there are (by place, not by content), broken ones left out.
        branches: how many conversations can be used.
        problems: bad rows and broken images, by name; `lost` branches were lost with each.
        duplicate_images: pairs of places whose images have the same bytes.
        duplicate_branches: pairs of places with the same image bytes, question and answer.
        answer_words: the spread of the answers' lengths in words.
        tokens: the spread of the branches' lengths in tokens, images included, if they were tokenized.
        truncated: branches longer than `max_length` tokens, or than the `max_positions` of the model.
        unsupervised: branches in which no token is learned.
        samples: three examples, with what is supervised.
    """

    source: str
    images: int = 0
    branches: int = 0
    problems: list[Problem] = field(default_factory=list)
    duplicate_images: list[tuple[str, str]] = field(default_factory=list)
    duplicate_branches: list[tuple[str, str]] = field(default_factory=list)
    answer_words: Spread | None = None
    max_length: int | None = None
    max_positions: int | None = None
    tokens: Spread | None = None
    truncated: list[Problem] = field(default_factory=list)
    unsupervised: list[Problem] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def broken_images(self) -> list[Problem]:
        """The images that are missing or could not be opened."""
        return [problem for problem in self.problems if problem.key == "image"]

    @property
    def lost(self) -> int:
        """How many branches are bad."""
        return sum(problem.lost for problem in self.problems)


def check(
    source: Mapping[str, Any],
    *,
    base_dir: Path | str = ".",
    tokenize: Tokenize | None = None,
    decode: Decode | None = None,
    max_length: int | None = None,
    max_positions: int | None = None,
    num_samples: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read a source whole, open every image, and count what is there and what is bad.

    Args:
        source: the recipe's mapping, as for `vlm.data.readers.read`.
        base_dir: where relative paths start.
        tokenize: gives the tokens and labels of each branch of an example. Without it, lengths in tokens are not known
            and samples show assistant text as supervised.
        decode: turns token ids back into text, for samples. Goes with `tokenize`.
        max_length: the longest row in tokens that training takes. Needs `tokenize`.
        max_positions: how many tokens a model with learned positions reads at the most.
        num_samples: how many examples to show, spread evenly over the source.
        progress: called with (examples done, examples in all).

    Raises:
        SourceError: the source cannot be read at all.
        ValueError: `tokenize`, `decode` and `max_length` do not go together.
    """
    if (tokenize is None) != (decode is None):
        raise ValueError("tokenize and decode go together")
    if max_length is not None and tokenize is None:
        raise ValueError("max_length counts tokens, so it needs tokenize")
    examples, problems = read(source, base_dir=base_dir)
    report = Report(source=str(source.get("format")), problems=list(problems))
    report.max_length, report.max_positions = max_length, max_positions
    digests: dict[Any, str] = {}
    first_image: dict[str, str] = {}
    first_branch: dict[tuple[Any, ...], str] = {}
    words: list[int] = []
    tokens: list[int] = []
    good: list[Example] = []
    for done, example in enumerate(examples, start=1):
        try:
            hashes = _open_all(example, digests, first_image, report)
            rows = tokenize(example) if tokenize is not None else []
        except ImageError as error:
            report.problems.append(image_problem(error, example))
        except Refused as error:
            report.problems.append(Problem(example.where, "", str(error), lost=len(example.branches)))
        else:
            good.append(example)
            for branch in example.branches:
                words.append(len(branch.answer.split()))
                where = branch.where or example.where
                key = (*hashes, json.dumps(branch.messages))
                if (first := first_branch.setdefault(key, where)) != where:
                    report.duplicate_branches.append((first, where))
            if tokenize is not None:
                tokens += _lengths(example, rows, report)
        if progress is not None:
            progress(done, len(examples))
    report.images = len(digests)
    report.branches = sum(len(example.branches) for example in good)
    report.answer_words = Spread.of(words)
    report.tokens = Spread.of(tokens)
    count = min(num_samples, len(good))
    for index in range(count):
        example = good[index * (len(good) - 1) // max(count - 1, 1)]
        report.samples += _samples(example, tokenize, decode)
    return report


def _open_all(example: Example, digests: dict[Any, str], first_image: dict[str, str], report: Report) -> list[str]:
    """The hashes of an example's images, each of which opens. A place met before is not opened again."""
    hashes = []
    for index, source in enumerate(example.images):
        place = source if isinstance(source, str) else (example.image_id, index)
        if place not in digests:
            digest = image_sha256(source, where=example.where)
            open_image(source, where=example.where)
            digests[place] = digest
            if (first := first_image.setdefault(digest, example.where)) != example.where:
                report.duplicate_images.append((first, example.where))
        hashes.append(digests[place])
    return hashes


def _lengths(example: Example, rows: list[tuple[Sequence[int], Sequence[int]]], report: Report) -> list[int]:
    for branch, (input_ids, labels) in zip(example.branches, rows, strict=True):
        where = branch.where or example.where
        length, most, places = len(input_ids), report.max_length, report.max_positions
        if places is not None and length > places:
            why = f"{length} tokens, and the model has {places} positions"
            report.truncated.append(Problem(where, "", why))
        elif most is not None and length > most:
            why = f"{length} tokens, {length - most} more than {most}"
            report.truncated.append(Problem(where, "", why))
        if all(label == IGNORE_INDEX for label in labels):
            report.unsupervised.append(Problem(where, "", "no token of it is learned"))
    return [len(input_ids) for input_ids, _ in rows]


def _samples(example: Example, tokenize: Tokenize | None, decode: Decode | None) -> list[Sample]:
    few = replace(example, branches=example.branches[:_SHOWN])
    if tokenize is None or decode is None:
        segments = [_message_segments(branch) for branch in few.branches]
    else:
        segments = [_token_segments(ids, labels, decode) for ids, labels in tokenize(few)]
    places = [branch.where or example.where for branch in few.branches]
    samples = [Sample(where, tuple(found)) for where, found in zip(places, segments, strict=True)]
    if more := len(example.branches) - len(few.branches):
        samples.append(Sample(example.where, (Segment(f"... and {more:,} more answers about the same images", False),)))
    return samples


def _message_segments(branch: Branch) -> list[Segment]:
    segments = []
    for message in branch.messages:
        segments.append(Segment(f"{message['role']}: ", False))
        if message["role"] == "assistant":
            segments.append(Segment(message_text(message), True))
        else:
            parts = ("<image>" if part["type"] == "image" else part["text"] for part in message["content"])
            segments.append(Segment(" ".join(parts), False))
        segments.append(Segment("\n", False))
    return segments[:-1]


def _token_segments(input_ids: Sequence[int], labels: Sequence[int], decode: Decode) -> list[Segment]:
    """Text by stretches of supervised and other tokens; a run of one token (an image) is written once."""
    segments = []
    pairs = [(int(token), int(label) != IGNORE_INDEX) for token, label in zip(input_ids, labels, strict=True)]
    for supervised, stretch in groupby(pairs, key=lambda pair: pair[1]):
        text, plain = "", list[int]()
        for token, run in groupby(token for token, _ in stretch):
            if (length := len(list(run))) < 4:
                plain += [token] * length
                continue
            text += (decode(plain) if plain else "") + f"{decode([token])} x {length} "
            plain = []
        segments.append(Segment(text + (decode(plain) if plain else ""), supervised))
    return segments


def render(report: Report) -> RenderableType:
    """The report for a terminal, by rich. What is supervised stands in [[ ]], in green where there is colour."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", show_header=False, box=None, pad_edge=False)
    for name, value in _counts(report):
        table.add_row(name, value)
    parts: list[RenderableType] = [table]
    for title, lines in (
        ("Bad, and skipped in training:", _listing(report.problems)),
        ("Same image bytes:", _pairs(report.duplicate_images)),
        ("Same image, question and answer:", _pairs(report.duplicate_branches)),
        (f"Longer than {_limits(report)}:", _listing(report.truncated)),
        ("Nothing is learned from:", _listing(report.unsupervised)),
    ):
        if lines:
            parts += ["", Text(title, style="bold yellow"), *(Text(printable(line)) for line in lines)]
    if report.samples:
        parts += ["", Text("Examples; what is learned stands in [[ ]]:", style="bold")]
    for sample in report.samples:
        text = Text(f"\n{printable(sample.where)}\n", style="dim")
        for segment in sample.segments:
            shown = printable(_brief(segment.text))
            text.append(
                f"[[{shown}]]" if segment.supervised else shown, "bold green" if segment.supervised else "not dim"
            )
        parts.append(text)
    return Group(*parts)


def _counts(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("images", f"{report.images:,}"),
        ("branches (answers)", f"{report.branches:,}"),
        ("bad rows and images", f"{len(report.problems):,} ({report.lost:,} answers lost)"),
        ("  broken or missing images", f"{len(report.broken_images):,}"),
        ("duplicate images", f"{len(report.duplicate_images):,}"),
        ("duplicate answers", f"{len(report.duplicate_branches):,}"),
        ("answer length", f"{report.answer_words} words" if report.answer_words else "no answers"),
    ]
    if report.tokens is not None:
        rows += [("branch length", f"{report.tokens} tokens")]
        rows += [("nothing learned", f"{len(report.unsupervised):,}")]
    if report.max_length is not None:
        rows += [(f"over {_limits(report)}", f"{len(report.truncated):,}")]
    elif report.tokens is None:
        rows += [("truncations", "not counted: they need a processor")]
    return rows


def _limits(report: Report) -> str:
    places = f", or the {report.max_positions} positions of the model" if report.max_positions is not None else ""
    return f"{report.max_length} tokens{places}"


def _brief(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} ... ({len(text):,} characters)"


def _listing(problems: Sequence[Problem]) -> list[str]:
    return _shortened([f"  {problem}" for problem in problems])


def _pairs(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return _shortened([f"  {first}  =  {second}" for first, second in pairs])


def _shortened(lines: list[str]) -> list[str]:
    shown = [cut(line, _LONGEST_LINE) for line in lines[:_SHOWN]]
    return shown if len(lines) <= _SHOWN else [*shown, f"  ... and {len(lines) - _SHOWN:,} more"]
