"""Seeded cases for the fuzz tests: values that belong nowhere, and small changes to trees of values, text and bytes.

A case is a number: `random_of(suite, number)` draws all of it, so that a failure is repeated by its number alone.
"""

import copy
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

WORDS = (
    "", " ", "x", "~", "~no-one/x", "/", "..", "null", "true", "yes", "off", "1e-4", "010", "0x1f", "12:30",
    "2024-01-01", "1_000", "-1", "nan", ".nan", "inf", "image", "<image>", "</s>", "What is this?", "a: b", "- a", "{",
    "[", "%d", "\\", "\x00", "\x1b[2J", "\ud800", "\ufeff", "\u2028", "é", "🙂", "a\nb", "a\tb", "'", '"', "`", "*",
    "**/*", "&a", "!!int x", "x" * 300, "/" + "y" * 5000, "${VLM_HOME}/x", "file:///etc/passwd", "http://127.0.0.1:1/x",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 256, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, -0.5, 1.5,
    1e-320, 1e-4, 1e308, -1e308,
)  # fmt: skip
SHOWN = 5
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def random_of(suite: str, number: int) -> random.Random:
    return random.Random(f"{suite} {number}")


def parts(fast: int, slow: int) -> Any:
    """Parametrize a test with its `numbers`: the first `fast` cases, and in the slow suite all up to `slow`."""
    rest = pytest.param(range(fast, slow), id="rest", marks=pytest.mark.slow)
    return pytest.mark.parametrize("numbers", [pytest.param(range(fast), id="first"), rest])


def run(suite: str, numbers: Sequence[int], case: Callable[[random.Random], Any]) -> list[Any]:
    """Run `case` for each of the `numbers`, and return what it returned. Fails with the first errors, and how many."""
    results, failed = [], []
    for number in numbers:
        try:
            results.append(case(random_of(suite, number)))
        except Exception as error:
            lines = traceback.format_exception(error)
            failed.append((number, "".join(lines[-3:]), getattr(error, "__notes__", [])))
    shown = "\n".join(f"case {number}: {notes} {text}" for number, text, notes in failed[:SHOWN])
    assert not failed, f"{len(failed)} of {len(numbers)} cases failed:\n{shown}"
    return results


@contextmanager
def told(what: object) -> Iterator[None]:
    """Adds to an error raised within it what the case was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{what!r:.500}")
        raise


def odd_value(draw: random.Random, depth: int = 0) -> Any:
    """A value that is rarely the right one."""
    kind = draw.randrange(9 if depth < 2 else 6)
    if kind < 2:
        return draw.choice(WORDS)
    if kind < 4:
        return draw.choice(NUMBERS)
    if kind == 4:
        return draw.choice((None, True, False))
    if kind == 5:
        return draw.choice(NOT_FINITE)
    if kind == 6:
        return [odd_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == 7:
        return {draw.choice(WORDS): odd_value(draw, depth + 1) for _ in range(draw.randrange(3))}
    return {}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def changed(values: Any, draw: random.Random) -> tuple[Any, str]:
    """A copy of `values` with one change, and what that was."""
    made = copy.deepcopy(values)
    path = draw.choice(list(places(made)))
    holder, key = at(made, path[:-1]), path[-1]
    kind = draw.randrange(6)
    if kind == 0:
        del holder[key]
        return made, f"{path} removed"
    if kind == 1 and isinstance(holder, dict):
        name = draw.choice([str(key) + "s", str(key)[:-1] or "x", str(key).upper(), draw.choice(WORDS)])
        holder[name] = holder.pop(key)
        return made, f"{path} called {name!r}"
    if kind == 2:
        holder[key] = draw.choice(([holder[key]], {"x": holder[key]}, [holder[key]] * 3, str(holder[key])))
        return made, f"{path} wrapped"
    holder[key] = odd_value(draw)
    return made, f"{path} = {holder[key]!r:.200}"


def changed_text(text: str, draw: random.Random) -> str:
    """`text` with some characters removed, repeated or put in."""
    for _ in range(draw.randrange(1, 4)):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice((0, 1, 1, 2, 10, 100)))
        what = draw.choice((draw.choice(WORDS), draw.choice("{}[]:,?!&*#|>-'\"%@`\n\t 0e."), text[start:end] * 2, ""))
        text = text[:start] + what + text[end:]
    return text


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    """`data` cut, or with some bytes changed, put in or repeated."""
    for _ in range(draw.randrange(1, 5)):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice((0, 1, 1, 4, 64)))
        kind = draw.randrange(4)
        if kind == 0 and draw.randrange(3) == 0:
            data = data[:start]
        elif kind == 1:
            data = data[:start] + draw.randbytes(draw.choice((1, 2, 4, 16))) + data[end:]
        elif kind == 2:
            data = data[:start] + draw.choice((b"\x00", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff")) + data[end:]
        else:
            data = data[:start] + data[start:end] * 2 + data[end:]
    return data
