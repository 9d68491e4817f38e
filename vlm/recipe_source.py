"""Recipe files as plain values that remember where they were written: YAML with line numbers, and overrides."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vlm.errors import UserError, cut, shown

Key = str | int
KeyPath = tuple[Key, ...]
Places = dict[KeyPath, str]
"""For every key of a recipe, by its path, where it was written: `my.yaml:12` or `command line`."""

COMMAND_LINE = "command line"
MAX_NODES = 20_000  # a few lines of nested YAML aliases can otherwise stand for billions of values
MAX_DEPTH = 50
MAX_CHARACTERS = 1_000_000


class RecipeError(UserError):
    """A recipe that cannot be used; the message lists every problem with its file and line."""


_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[str, list[str]]] = {
    "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": (r"<<", ["<"]),
}
"""How YAML 1.2 writes values that are not text: pattern and first characters. In YAML 1.1, which PyYAML follows, `1e-4`
is a string, `010` is eight, `12:30` is 750 and `no` is false."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012  (the class attribute is PyYAML's own interface)

    def scan_plain(self) -> Any:
        """Read a scalar without quotes. PyYAML ends it at a question mark inside braces; YAML 1.2 does not."""
        peek = self.peek
        self.peek = lambda index=0: peek(index).replace("?", "x")  # type: ignore[method-assign]
        try:
            return super().scan_plain()
        finally:
            del self.peek


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which either version of YAML would take for another value."""

    yaml_implicit_resolvers = {key: list(found) for key, found in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _tag, re.compile(f"^(?:{_pattern})$"), _first)


class _Reader:
    """Turns YAML nodes into values, filling `places` and `problems` on the way."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.places: Places = {}
        self.problems: list[str] = []
        self.nodes = 0
        if len(text) > MAX_CHARACTERS:
            raise RecipeError(f"{name}: longer than {MAX_CHARACTERS:,} characters, which no recipe is")
        try:
            self.root = _Loader(text).get_single_node()
        except yaml.YAMLError as error:
            raise RecipeError(_explain(error, text, name)) from None
        except RecursionError:
            raise RecipeError(f"{name}: {_TOO_DEEP}") from None

    def at(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.name != COMMAND_LINE else self.name

    def value(self, node: yaml.Node, path: KeyPath, inside: tuple[yaml.Node, ...] = ()) -> Any:
        self.count(node, inside)
        if len(inside) >= MAX_DEPTH:
            raise RecipeError(f"{self.at(node)}: {_TOO_DEEP}")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        kind = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != _TAG + kind:
            raise RecipeError(f"{self.at(node)}: {_tag_of(node)} has no meaning in a recipe; remove it")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, (*inside, node))
        for i, item in enumerate(node.value):
            self.places[*path, i] = self.at(item)
        return [self.value(item, (*path, i), (*inside, node)) for i, item in enumerate(node.value)]

    def count(self, node: yaml.Node, inside: tuple[yaml.Node, ...], nodes: int = 1) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES or node in inside:
            raise RecipeError(f"{self.at(node)}: too many values, or a YAML alias (*name) that contains itself")

    def scalar(self, node: yaml.ScalarNode) -> Any:
        """Return text, a number, true or false, or None."""
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind in ("str", "merge"):
            return text
        if kind not in _SCALARS:
            raise RecipeError(f"{self.at(node)}: {_tag_of(node)} has no meaning in a recipe; remove it")
        if not re.fullmatch(_SCALARS["float" if kind == "float" and not _is_whole(text) else kind][0], text):
            raise RecipeError(f"{self.at(node)}: {shown(text)} is not what {_tag_of(node)} says; remove the tag")
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if len(text) > MAX_DIGITS:
            raise RecipeError(f"{self.at(node)}: {shown(text)} has {len(text):,} digits; write a shorter number")
        plain = text.replace("_", "")
        return int(plain) if kind == "int" else float(plain.lower().replace(".inf", "inf").replace(".nan", "nan"))

    def mapping(self, node: yaml.MappingNode, path: KeyPath, inside: tuple[yaml.Node, ...]) -> dict[str, Any]:
        first: dict[str, str] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # `pairs` refuses it
            if key.value in first:
                dotted = ".".join(map(str, (*path, key.value)))
                self.problems.append(f"{self.at(key)}  {dotted}: written twice, first at {first[key.value]}; keep one")
            first.setdefault(key.value, self.at(key))
        result = {}
        for name, (key, item) in self.pairs(node, inside[:-1]).items():
            self.places[*path, name] = self.at(key)
            result[name] = self.value(item, (*path, name), inside)
        return result

    def pairs(self, node: yaml.Node, inside: tuple[yaml.Node, ...]) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Return the keys of a mapping, name to key and value, with those of what it merges in (`<<: *defaults`). What
        is written in the mapping itself wins, then what is merged first."""
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{self.at(node)}: `<<` merges sections of `key: value` lines; this is something else")
        self.count(node, inside, len(node.value))
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{self.at(key)}: a key must be a plain word")
            if key.tag != _TAG + "merge":
                own[key.value] = key, item
                continue
            for source in item.value if isinstance(item, yaml.SequenceNode) else [item]:
                merged = self.pairs(source, (*inside, node)) | merged
        return merged | own


MAX_DIGITS = 400
"""The longest float in decimal notation has 309 digits before the point; Python refuses to read over 4,300."""
_TOO_DEEP = f"values inside values, over {MAX_DEPTH} deep, which no recipe has"


def _is_whole(text: str) -> bool:
    return re.fullmatch(_SCALARS["int"][0], text) is not None


def _tag_of(node: yaml.Node) -> str:
    return f"the tag {node.tag.replace(_TAG, '!!')}"


def _explain(error: yaml.YAMLError, text: str, name: str) -> str:
    """Say where a text is not YAML, and why."""
    what = getattr(error, "problem", None) or str(error)
    line, column = 0, 0
    if isinstance(error, yaml.reader.ReaderError):
        what = f"the character {chr(error.character)!r}" if isinstance(error.character, int) else str(error)
        line, column = text.count("\n", 0, error.position) + 1, error.position - text.rfind("\n", 0, error.position)
    elif mark := getattr(error, "problem_mark", None):
        line, column = mark.line + 1, mark.column + 1
    if "\\t" in what:
        what = "a tab where spaces are wanted; indent with spaces"
    elif "found another document" in what:
        what = "a second document begins here (---); a recipe is one"
    elif "cannot start any token" in what or "mapping values are not allowed" in what:
        what += "; put text with special characters in quotes"
    where = f"{name}:{line}" if line and name != COMMAND_LINE else name
    return f"{where}: not valid YAML: {what}" + (f" (column {column})" if line else "")


def read_yaml(text: str, name: str) -> tuple[dict[str, Any], Places]:
    """Parse a recipe. `name` is how the file is called in messages.

    Raises RecipeError for text that is not YAML, for a key written twice, and for a file that is not a mapping.
    """
    reader = _Reader(text, name)
    if reader.root is None:
        raise RecipeError(f"{name}: the file is empty; `vlm recipes show quickstart` prints one to start from")
    if not isinstance(reader.root, yaml.MappingNode):
        raise RecipeError(f"{name}: a recipe is a list of `key: value` lines, this is something else")
    values = reader.value(reader.root, ())
    if reader.problems:
        raise RecipeError("\n".join(reader.problems))
    return values, reader.places


def read_written(path: Path) -> dict[str, Any]:
    """Return the recipe that a run has written into its folder. Raises RecipeError for a damaged file."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8"), str(path))[0]
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text: {error}") from None
    stages = values.get("stages")
    if not isinstance(stages, list) or not all(isinstance(stage, dict) and "name" in stage for stage in stages):
        raise RecipeError(f"{path}: damaged; it has no `stages` with a name each, as the recipe of a run has")
    return values


def write_yaml(values: Any, **options: Any) -> str:
    """Return plain values as YAML that [`read_yaml`] gives back unchanged; `options` are those of yaml.dump."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options)


def parse_scalar(text: str) -> Any:
    """Parse a value as it would be in a recipe: `1e-4` is a float, `[a, b]` a list, `null` None. Raises RecipeError."""
    reader = _Reader(text, COMMAND_LINE)
    value = None if reader.root is None else reader.value(reader.root, ())
    if reader.problems:
        raise RecipeError("\n".join(reader.problems))
    return value


def apply_overrides(raw: dict[str, Any], places: Places, overrides: Sequence[str]) -> None:
    """Set `a.b.0.c=value` pairs in `raw`, in place. A name that no recipe has is left for the validation to refuse."""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise RecipeError(
                f"{COMMAND_LINE}  {cut(override)}: an override looks like key=value, for example train.max_steps=100"
            )
        keys = tuple(dotted.split("."))
        if len(keys) > MAX_DEPTH:
            raise RecipeError(f"{COMMAND_LINE}  {cut(override)}: {_TOO_DEEP}")
        try:
            value = parse_scalar(text)
        except RecipeError as error:
            why = str(error).removeprefix(COMMAND_LINE).lstrip(": ")
            raise RecipeError(f"{COMMAND_LINE}  {cut(override)}: {why}") from None
        _set(raw, keys, value, places, override)


def _set(raw: dict[str, Any], keys: tuple[str, ...], value: Any, places: Places, override: str) -> None:
    here: Any = raw
    path: KeyPath = ()
    at = f"{COMMAND_LINE}  {cut(override)}"
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        dotted = cut(".".join(map(str, path)))
        step: Key = key
        if isinstance(here, list):
            if not re.fullmatch("[0-9]{1,9}", key) or int(key) >= len(here):
                raise RecipeError(
                    f"{at}: {dotted} has items 0 to {len(here) - 1}, there is no {shown(key)}"
                    if here
                    else f"{at}: {dotted} is an empty list"
                )
            step = int(key)
        elif not isinstance(here, dict):
            raise RecipeError(f"{at}: {dotted} is {shown(here)}, which has nothing inside; set {dotted} itself")
        path = (*path, step)
        if last:
            here[step] = value
        elif isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        places[path] = COMMAND_LINE if last or path not in places else places[path]
        here = here[step]
