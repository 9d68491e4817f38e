"""Texts that make a regular expression try again and again, made from the expression itself; see `test_linear_time`."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]

CATEGORIES = {op.CATEGORY_DIGIT: "7", op.CATEGORY_WORD: "aZ_7", op.CATEGORY_SPACE: " \n"}
NOT_IN_CATEGORIES = {op.CATEGORY_NOT_DIGIT: "a.", op.CATEGORY_NOT_WORD: ".-@", op.CATEGORY_NOT_SPACE: "a.<"}
ANYTHING = "a7 .<@"


def match_of(pattern: re.Pattern[str], rng: random.Random) -> str:
    """A text that the pattern, or all of it but its look-arounds, matches."""
    return "".join(_match(parser.parse(pattern.pattern, pattern.flags), rng))


def _match(parsed: object, rng: random.Random) -> Iterator[str]:
    for kind, value in parsed:  # type: ignore[attr-defined]
        if kind is op.LITERAL:
            yield chr(value)
        elif kind in (op.ANY, op.NOT_LITERAL):
            yield rng.choice([c for c in ANYTHING if kind is op.ANY or ord(c) != value])
        elif kind is op.IN:
            yield _one_of(value, rng)
        elif kind is op.BRANCH:
            yield from _match(rng.choice(value[1]), rng)
        elif kind is op.SUBPATTERN:
            yield from _match(value[-1], rng)
        elif kind is op.ATOMIC_GROUP:
            yield from _match(value, rng)
        elif kind in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
            least, most, inside = value
            for _ in range(min(most, least + rng.randrange(3))):
                yield from _match(inside, rng)
        elif kind not in (op.AT, op.ASSERT, op.ASSERT_NOT):
            raise NotImplementedError(f"{kind} in a pattern: say here what it matches")


def _one_of(items: list, rng: random.Random) -> str:
    if items[0][0] is op.NEGATE:
        excluded = re.compile("[" + "".join(_written(*item) for item in items[1:]) + "]")
        return rng.choice([c for c in ANYTHING + "%{" if not excluded.match(c)])
    kind, value = rng.choice(items)
    if kind is op.LITERAL:
        return chr(value)
    if kind is op.RANGE:
        return chr(rng.choice(value))
    return rng.choice((CATEGORIES | NOT_IN_CATEGORIES)[value])


def _written(kind: object, value: object) -> str:
    if kind is op.LITERAL:
        return re.escape(chr(value))  # type: ignore[arg-type]
    if kind is op.RANGE:
        return f"{re.escape(chr(value[0]))}-{re.escape(chr(value[1]))}"  # type: ignore[index]
    letters = {op.CATEGORY_DIGIT: "d", op.CATEGORY_WORD: "w", op.CATEGORY_SPACE: "s"}
    others = {op.CATEGORY_NOT_DIGIT: "D", op.CATEGORY_NOT_WORD: "W", op.CATEGORY_NOT_SPACE: "S"}
    return "\\" + (letters | others)[value]  # type: ignore[index]


def attacks(pattern: re.Pattern[str], length: int, *, seed: int = 0, examples: int = 6) -> Iterator[str]:
    """Texts of `length` characters: parts of matches again and again, and parts with one character again and again,
    with an end that does not match."""
    rng = random.Random(seed)
    for _ in range(examples):
        text = match_of(pattern, rng)
        for cut in sorted({*rng.sample(range(1, len(text) + 1), min(4, len(text)))}):
            part = text[:cut]
            yield part * (length // len(part))
            yield part + text[cut - 1] * length + "\0"
            yield text[cut - 1 :] * (length // len(text[cut - 1 :])) + "\0"
