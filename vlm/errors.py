"""Errors that are meant for the person at the keyboard, and the "did you mean" that goes with them."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can put right. The command line prints its message alone, without a traceback, and exits with
    `exit_code`."""

    exit_code = 2


def cut(text: str, most: int = 80) -> str:
    """Return `text` for a message, of at most `most` characters."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def shown(value: object, most: int = 80) -> str:
    """Return `repr(value)` for a message, of at most `most` characters."""
    return cut(repr(value), most)


def nearest(word: object, known: Iterable[str]) -> str:
    """Return a clause to end a message with: the closest of the `known` names, or all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}"
