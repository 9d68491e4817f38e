"""What pydantic found, said in words: file and line, key, what is wrong, and the nearest key that exists."""

import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from vlm.errors import nearest, shown
from vlm.recipe_source import Key, KeyPath, Places, RecipeError


class FoundError(ValueError):
    """Raised by a validator that found several problems, each at a key inside the section it looks at."""

    def __init__(self, found: Sequence[tuple[KeyPath, str]]) -> None:
        super().__init__("; ".join(what for _, what in found))
        self.found = tuple(found)


def findings(error: ValidationError, model: type[BaseModel]) -> list[tuple[KeyPath, str]]:
    """Return (key, what is wrong) for every problem that pydantic found in a section of type `model`."""
    found: list[tuple[KeyPath, str]] = []
    for problem in error.errors(include_url=False):
        path = tuple(problem["loc"])
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, FoundError):
            found += [((*path, *inside), what) for inside, what in cause.found]
        elif several := _several_forms(model, path):
            # pydantic says of each form why it is not that, which only one of them may be about.
            field, forms = several
            if field not in [earlier for earlier, _ in found]:
                found.append((field, f"must be {' or '.join(forms)}, not {shown(_at(error, field))}"))
        else:
            found.append((path, _say(problem, model)))
    return found


MOST = 20
"""Problems that one message lists."""

_WORDS = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller whole number",
    "float_parsing": "must be a number",
    "bool_parsing": "must be true or false",
    "dict_type": "must be a section of `key: value` lines",
    "model_type": "must be a section of `key: value` lines",
    "model_attributes_type": "must be a section of `key: value` lines",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be letters, digits, `.`, `-` and `_`, and begin with a letter or a digit",
}
_SECTIONS = ("dict_type", "model_type", "model_attributes_type")
_FORMS = {str: "text", int: "a whole number", float: "a number", dict: "a section of `key: value` lines"}
_PLURALS = {str: "texts", int: "whole numbers", float: "numbers", dict: "sections"}
_LIMITS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def to_recipe_error(
    error: ValidationError, root: type[BaseModel], places: Places, name: str, *, hidden: KeyPath = ()
) -> RecipeError:
    """Turn a pydantic error on `root` into one RecipeError that lists every problem.

    `hidden` is a start of keys that the user did not write: with one stage at the top level, `stages.0.lora` is `lora`.
    """
    found = [(_written(path, hidden), what) for path, what in findings(error, root)]
    return listed(found, places, name)


def listed(found: Sequence[tuple[KeyPath, str]], places: Places, name: str) -> RecipeError:
    """Return one RecipeError for all the problems `found`, each a key and what is wrong with its value."""
    lines = []
    for path, what in found[:MOST]:
        dotted = ".".join(map(str, path))
        lines.append(f"{_place(path, places, name)}  {dotted + ': ' if dotted else ''}{what}")
    if len(found) > MOST:
        lines.append(f"and {len(found) - MOST:,} more")
    count = f"{len(found):,} problems" if len(found) > 1 else "a problem"
    return RecipeError(f"{name} has {count}:\n  " + "\n  ".join(lines))


def impossible(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield each value in a recipe that no key can have: a number that is not finite, or beyond 64 bits, and text that
    is no Unicode (half of a surrogate pair)."""
    inner: Iterable[tuple[Key, Any]] = ()
    if isinstance(value, dict):
        inner = value.items()
        for key in value:
            if not _is_unicode(key):
                yield path, f"has the key {shown(key)}, which is not valid Unicode"
    elif isinstance(value, list):
        inner = enumerate(value)
    elif isinstance(value, float) and not math.isfinite(value):
        yield path, f"must be a finite number, not {value}"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield path, f"must be a smaller number, not {shown(value)}"
    elif not _is_unicode(value):
        yield path, f"must be valid Unicode, not {shown(value)}"
    for key, item in inner:
        yield from impossible(item, (*path, key))


def _is_unicode(value: Any) -> bool:
    return not isinstance(value, str) or not any("\ud800" <= character <= "\udfff" for character in value)


def _written(path: KeyPath, hidden: KeyPath) -> KeyPath:
    return path[len(hidden) :] if path[: len(hidden)] == hidden else path


def _place(path: KeyPath, places: Places, name: str) -> str:
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    return name


def _say(problem: Any, root: type[BaseModel]) -> str:
    kind, given, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {_suggest(problem['loc'], root)}"
    if kind == "missing":
        return _WORDS[kind]
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        choices = context["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"'{given}' is not one of its values; {nearest(given, choices)}"
    if kind in _LIMITS:
        words, limit = _LIMITS[kind]
        return f"must be {words} {context[limit]:.10g}, not {shown(given)}"
    if kind in ("too_short", "string_too_short") and context["min_length"] > 1:
        return f"must have at least {context['min_length']} items, not {len(given)}"
    if kind in ("too_long", "string_too_long"):
        return f"must have at most {context['max_length']} items, not {len(given)}"
    hint = "; put a space after each colon" if kind in _SECTIONS and re.match(r"\w+:\S", str(given)) else ""
    said = f"{_WORDS[kind]}, not {shown(given)}" if kind in _WORDS else f"{shown(given)} cannot be used"
    return said + hint


def _several_forms(root: type[BaseModel], path: KeyPath) -> tuple[KeyPath, list[str]] | None:
    """Return the first field of several forms that `path` goes into, with the forms in words; None if there is none."""
    model: type[BaseModel] | None = root
    for place, key in enumerate(path[:-1], start=1):
        if model is None or key not in model.model_fields:  # the number of an item, or a name of the user's
            continue
        annotation = model.model_fields[str(key)].annotation
        forms = [form for form in typing.get_args(annotation) if form is not type(None)]
        if typing.get_origin(annotation) in (types.UnionType, typing.Union) and len(forms) > 1:
            return path[:place], [_form(form) for form in forms]
        model = _model_in(annotation)
    return None


def _form(annotation: Any) -> str:
    """Return a type in words."""
    kind = typing.get_origin(annotation) or annotation
    if kind is typing.Literal:
        return " or ".join(map(str, typing.get_args(annotation)))
    if kind is list:
        (item,) = typing.get_args(annotation)
        return f"a list of {_PLURALS[typing.get_origin(item) or item]}"
    return _FORMS[kind]


def _at(error: ValidationError, field: KeyPath) -> Any:
    """Return the value of a field of several forms."""
    of_field = [each for each in error.errors(include_url=False) if tuple(each["loc"][: len(field)]) == field]
    return min(of_field, key=lambda each: len(each["loc"]))["input"]


def _suggest(path: KeyPath, root: type[BaseModel]) -> str:
    *parents, key = path
    section = _section(root, parents)
    close = nearest(key, section)
    if close.startswith("did"):
        return close
    if not hasattr(root, "shorthand"):  # a data source, whose options belong nowhere else
        return close
    owners = [dotted for dotted, keys in _all_sections(root).items() if key in keys]
    return f"it belongs in `{owners[0]}:`" if owners else close


def _section(root: type[BaseModel], parents: Sequence[Key]) -> list[str]:
    model = root
    for key in parents:
        if key in model.model_fields:  # a list has numbers, and tasks of `classification` have names of their own
            model = _model_in(model.model_fields[str(key)].annotation) or model
    return [*model.model_fields, *getattr(model, "shorthand", ())]


def _all_sections(root: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    from vlm.recipe_train import training_fields

    sections: dict[str, list[str]] = {}
    for key, field in root.model_fields.items():
        dotted = f"{prefix}{key}"
        if model := _model_in(field.annotation):
            sections[dotted] = list(model.model_fields)
            sections |= _all_sections(model, "" if key == "stages" else f"{dotted}.")
    return sections if prefix else {"train": list(training_fields())} | sections


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in typing.get_args(annotation) if (model := _model_in(arg))), None)
