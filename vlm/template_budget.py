"""How much a chat template may do: steps, characters, and what is in a value before it is written or compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

STEPS, STEPS_PER_ITEM = 300_000, 1000
"""Steps of a rendering, and how many more for each text, list and object that the template is given."""
CHARACTERS, TIMES_LONGER = 2**22, 8
"""Characters that may be written, and how many times as many as the template is given besides."""
CHARACTERS_PER_STEP = 256
MAX_DEPTH = 64
"""Lists in lists, and objects in objects."""


class TemplateBoundsError(SecurityError):
    """A chat template that does more than any needs to."""


class Size(NamedTuple):
    """How much is in a value: texts, numbers, lists and objects; the characters of its texts; the deepest nesting."""

    items: int
    characters: int
    depth: int


class Budget:
    """What a rendering may still do.

    Args:
        given: all that the template is given: the conversation, the tools, the options.
    """

    def __init__(self, given: Any) -> None:
        self.steps, self.limit, self.written = 2**62, 2**62, 0
        size = self.measure(given)
        self.steps = self.allowed = STEPS + STEPS_PER_ITEM * size.items
        self.limit = CHARACTERS + TIMES_LONGER * size.characters

    def charge(self, steps: int) -> None:
        """Take `steps` from what is left. Raises TemplateBoundsError if there are not as many."""
        self.steps -= steps
        if self.steps < 0:
            raise TemplateBoundsError(f"it takes more than {self.allowed:,} steps")

    def require(self, characters: int) -> None:
        """Charge for a text that will be made. Raises TemplateBoundsError if it is longer than any may be."""
        if characters > self.limit:
            raise TemplateBoundsError(f"it makes a text of more than {self.limit:,} characters")
        self.charge(1 + characters // CHARACTERS_PER_STEP)

    def write(self, characters: int) -> None:
        """Charge for what is written into the prompt."""
        self.written += characters
        if self.written > self.limit:
            raise TemplateBoundsError(f"it writes more than {self.limit:,} characters")
        self.charge(1 + characters // CHARACTERS_PER_STEP)

    def take(self, value: Any) -> int:
        """Charge for a text, or for the items of a list without what is in them. Returns the length; 0 for others."""
        if isinstance(value, str | bytes):
            self.charge(1 + len(value) // CHARACTERS_PER_STEP)
            return len(value)
        length = len(value) if isinstance(value, list | tuple | dict) else 0
        self.charge(1 + length)
        return length

    def measure(self, value: Any) -> Size:
        """Charge for all that is in a value. What is in it twice counts twice, as it does when it is written."""
        items = characters = deepest = 0
        rest = [(value, 0)]
        while rest:
            item, depth = rest.pop()
            items, deepest = items + 1, max(deepest, depth)
            if isinstance(item, str | bytes):
                characters += len(item)
                self.charge(1 + len(item) // CHARACTERS_PER_STEP)
                continue
            inside = _inside(item)
            self.charge(1 + len(inside))
            rest += [(each, depth + 1) for each in inside]
            if deepest > MAX_DEPTH:
                raise TemplateBoundsError(f"it makes lists or objects that are nested more than {MAX_DEPTH} deep")
        if characters > self.limit:
            self.require(characters)
        return Size(items, characters, deepest)


def _inside(item: Any) -> Collection[Any]:
    """What is in a container; nothing for anything else."""
    if isinstance(item, Namespace):
        item = item._Namespace__attrs
    if isinstance(item, Mapping):
        return [*item, *item.values()]
    return item if isinstance(item, Collection) else ()
