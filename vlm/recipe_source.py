"""Recipe files as plain values that remember where they were written: YAML with line numbers, and overrides."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from vlm.errors import UserError

Key = str | int
KeyPath = tuple[Key, ...]
Places = dict[KeyPath, str]
"""For every key of a recipe, by its path, where it was written: `my.yaml:12` or `command line`."""

COMMAND_LINE = "command line"
MAX_NODES = 20_000  # a few lines of nested YAML aliases can otherwise stand for billions of values


class RecipeError(UserError):
    """A recipe that cannot be used; the message lists every problem with its file and line."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2.

    PyYAML follows YAML 1.1, where `1e-4` is a string, `010` is eight, `12:30` is 750 and `no` is false.
    """

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (the class attribute is PyYAML's own interface)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


class _Reader:
    """Turns YAML nodes into values, filling `places` and `problems` on the way."""

    def __init__(self, text: str, name: str) -> None:
        self.loader = _Loader(text)
        self.name = name
        self.places: Places = {}
        self.problems: list[str] = []
        self.nodes = 0

    def at(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def value(self, node: yaml.Node, path: KeyPath, inside: tuple[yaml.Node, ...] = ()) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or node in inside:
            raise RecipeError(f"{self.at(node)}: too many values, or a YAML alias (*name) that contains itself")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, (*inside, node))
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.places[*path, i] = self.at(item)
            return [self.value(item, (*path, i), (*inside, node)) for i, item in enumerate(node.value)]
        return self.loader.construct_object(node)

    def mapping(self, node: yaml.MappingNode, path: KeyPath, inside: tuple[yaml.Node, ...]) -> dict[str, Any]:
        first: dict[str, str] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{self.at(key)}: a key must be a plain word")
            if key.value in first:
                dotted = ".".join(map(str, (*path, key.value)))
                self.problems.append(f"{self.at(key)}  {dotted}: written twice, first at {first[key.value]}; keep one")
            first.setdefault(key.value, self.at(key))
        self.loader.flatten_mapping(node)  # `<<: *defaults`; what is written beside it wins
        result = {}
        for key, item in node.value:
            self.places[*path, key.value] = self.at(key)
            result[key.value] = self.value(item, (*path, key.value), inside)
        return result


def _explain(error: yaml.YAMLError, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    if "\\t" in what:
        what = "a tab where spaces are wanted; indent with spaces"
    return f"{name}:{mark.line + 1}: not valid YAML: {what}" if mark else f"{name}: not valid YAML: {what}"


def read_yaml(text: str, name: str) -> tuple[dict[str, Any], Places]:
    """Parse a recipe. `name` is how the file is called in messages.

    Raises RecipeError for text that is not YAML, for a key written twice, and for a file that is not a mapping.
    """
    try:
        reader = _Reader(text, name)
        node = reader.loader.get_single_node()
        if node is None:
            raise RecipeError(f"{name}: the file is empty; `vlm recipes show quickstart` prints one to start from")
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{name}: a recipe is a list of `key: value` lines, this is something else")
        values = reader.value(node, ())
    except yaml.YAMLError as error:
        raise RecipeError(_explain(error, name)) from None
    if reader.problems:
        raise RecipeError("\n".join(reader.problems))
    return values, reader.places


def parse_scalar(text: str) -> Any:
    """Parse a value as it would be in a recipe: `1e-4` is a float, `[a, b]` a list, `null` None."""
    return yaml.load(text, Loader=_Loader)


def apply_overrides(raw: dict[str, Any], places: Places, overrides: Sequence[str]) -> None:
    """Set `a.b.0.c=value` pairs in `raw`, in place. A name that no recipe has is left for the validation to refuse."""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise RecipeError(
                f"{COMMAND_LINE}  {override}: an override looks like key=value, for example train.max_steps=100"
            )
        try:
            value = parse_scalar(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{COMMAND_LINE}  {override}: {getattr(error, 'problem', error)}") from None
        _set(raw, tuple(dotted.split(".")), value, places, override)


def _set(raw: dict[str, Any], keys: tuple[str, ...], value: Any, places: Places, override: str) -> None:
    here: Any = raw
    path: KeyPath = ()
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        dotted = ".".join(map(str, path))
        step: Key = key
        if isinstance(here, list):
            if not key.isdigit() or int(key) >= len(here):
                raise RecipeError(
                    f"{COMMAND_LINE}  {override}: {dotted} has items 0 to {len(here) - 1}, there is no '{key}'"
                    if here
                    else f"{COMMAND_LINE}  {override}: {dotted} is an empty list"
                )
            step = int(key)
        elif not isinstance(here, dict):
            raise RecipeError(
                f"{COMMAND_LINE}  {override}: {dotted} is {here!r}, which has nothing inside; set {dotted} itself"
            )
        path = (*path, step)
        if last:
            here[step] = value
        elif isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        places[path] = COMMAND_LINE if last or path not in places else places[path]
        here = here[step]
