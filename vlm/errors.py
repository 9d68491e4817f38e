"""Errors that are meant for the person at the keyboard, and the "did you mean" that goes with them."""

import difflib
import reprlib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can put right. The command line prints its message alone, without a traceback, and exits with
    `exit_code`."""

    exit_code = 2


def cut(text: str, most: int = 80) -> str:
    """Return `text` for a message, of at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def shown(value: object, most: int = 80) -> str:
    """Return `repr(value)` for a message, of at most `most` characters. Values of any size and depth are fine."""
    if isinstance(value, str | bytes):
        return cut(repr(value[:most]) if len(value) > most else repr(value), most)
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxlist, brief.maxdict, brief.maxstring, brief.maxother = 3, 8, 8, most, most
    return cut(brief.repr(value), most)


def some(values: Iterable[object], most: int = 8) -> str:
    """Return the first of many values for a message, and how many more there are; `nothing` for none."""
    values = list(values)
    first = ", ".join(shown(value) for value in values[:most]) or "nothing"
    return f"{first} and {len(values) - most:,} more" if len(values) > most else first


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the one of the `known` names that a word nearly is, if there is one. No long text is nearly a name."""
    names = [name for name in known if len(name) <= _LONGEST_NAME]
    found = difflib.get_close_matches(word, names, n=1, cutoff=cutoff) if len(word) <= _LONGEST_NAME else []
    return found[0] if found else None


def nearest(word: object, known: Iterable[str]) -> str:
    """Return a clause to end a message with: the closest of the `known` names, or all of them when none is close."""
    names = sorted(known)
    if close := closest(str(word), names):
        return f"did you mean '{close}'?"
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return f"known: {', '.join(cut(name) for name in names[:_MOST_NAMES])}{more}"


_MOST_NAMES = 40
_LONGEST_NAME = 100
"""Characters. Comparing takes the square of their number."""
