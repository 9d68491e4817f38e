"""Chat templates within bounds: how much work they do, how much text they write, and what they call.

A chat template is a program that comes with a model. jinja2's sandbox keeps it from files and from the internals of
Python, but not from loops in loops, nor from a text that doubles forty times. Here every step is counted, and what
could make a large value out of small ones is measured before it is done. Nothing depends on time: a template that one
machine renders, every machine renders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from types import BuiltinMethodType
from typing import Any

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.exceptions import TemplateSyntaxError
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, _PassArg, pass_context

from vlm.template_budget import Budget, TemplateBoundsError
from vlm.template_metering import CONTROL_TOKEN_START, COUNTING, Metering, finalize

MAX_SOURCE = 200_000
"""Characters of a template. The longest of published models have about 30,000."""
MAX_BITS, MAX_DIGITS, MAX_WIDTH = 4096, 100, 999
"""Bits of a whole number, digits that one is rounded to, and characters that a formatted value is padded to."""
_CHARACTERS_PER_STEP_OF_JOIN = 4096
_WIDE = re.compile(r"%[^%\w]*\*|\{[^{}]*\{|\d{4}")
"""In a format: a width that is given elsewhere, or has more digits than `MAX_WIDTH`."""

_SHALLOW = {
    *("attr", "batch", "count", "d", "default", "first", "float", "int", "items", "last", "length", "list", "map"),
    *("reject", "rejectattr", "reverse", "round", "safe", "select", "selectattr", "slice"),
}
"""Filters that do not look into what they are given."""
FILTERS = _SHALLOW | {
    *("abs", "capitalize", "center", "dictsort", "e", "escape", "forceescape", "groupby", "indent", "join", "lower"),
    *("max", "min", "replace", "sort", "string", "sum", "title", "tojson", "trim", "truncate", "unique", "upper"),
    *("urlencode", "wordcount"),
}
"""The filters that there are. jinja2's others are for web pages, or take the square of a text's length."""
_COMPARING = {
    *("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le", "in")
}
_PADDING = {"center", "ljust", "rjust", "zfill"}
STRING_METHODS = _PADDING | {
    *("capitalize", "casefold", "count", "encode", "endswith", "expandtabs", "find", "index", "isalnum", "isalpha"),
    *("isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle"),
    *("isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex"),
    *("rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
}
_CONTAINERS: tuple[type, ...] = (list, tuple, dict, range, type({}.keys()), type({}.values()), type({}.items()))


class BoundedContext(Context):
    """The variables of one rendering, and its budget."""

    def __init__(self, environment: Any, parent: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(environment, parent, *args, **kwargs)
        self.budget = Budget([value for name, value in parent.items() if name not in environment.globals])

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        made = super().derived(locals)
        made.budget = self.budget  # type: ignore[attr-defined]
        return made


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with a budget for each rendering."""

    context_class = BoundedContext
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.finalize = finalize
        del self.globals["lipsum"]

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Template:
        # The filters are wrapped here, since some are added after the environment has been made.
        filters = {name: _watched(name, self.filters[name], _filter) for name in FILTERS & {*self.filters}}
        self.filters = filters | COUNTING
        self.tests = {name: _watched(name, test, _test) for name, test in self.tests.items()}
        if len(source) > MAX_SOURCE:
            raise TemplateSyntaxError(f"it has {len(source):,} characters, more than {MAX_SOURCE:,}", 1)
        if CONTROL_TOKEN_START in source:
            raise TemplateSyntaxError("it has the character U+F0000, which marks what users write", 1)
        try:
            return super().from_string(source, *args, **kwargs)
        except (RecursionError, MemoryError, SyntaxError) as error:
            raise TemplateSyntaxError(f"it is nested too deep ({type(error).__name__})", 1) from None

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = Metering().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget: Budget = context.budget  # type: ignore[attr-defined]
        if operator == "%" and isinstance(left, str):
            _require_format(budget, left, right)
        elif isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * abs(right)}.get(operator, 0)
            if bits > MAX_BITS:
                raise TemplateBoundsError(f"it makes a number of more than {MAX_BITS:,} bits")
            budget.charge(1)
        elif operator == "*":
            times = left if isinstance(left, int) else right if isinstance(right, int) else 1
            _require_copies(budget, right if isinstance(left, int) else left, times)
        else:
            budget.require(budget.take(left) + budget.take(right) if operator == "+" else 0)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget: Budget = __context.budget  # type: ignore[attr-defined]
        budget.charge(1)
        __self._require_bounded(budget, __obj, [*args, *kwargs.values()])
        made = super().call(__context, __obj, *args, **kwargs)
        budget.take(made)
        return made

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapper = super().wrap_str_format(value)
        if wrapper is not None:
            wrapper.text = value.__self__  # type: ignore[attr-defined]
        return wrapper

    def _require_bounded(self, budget: Budget, called: Any, given: list[Any]) -> None:
        """Raise TemplateBoundsError for a call that makes too much, and for one that no chat template needs."""
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", type(called).__name__)
        if isinstance(called, BuiltinMethodType) and isinstance(owner, _CONTAINERS):
            for value in [owner, *given] if name in ("count", "index", "isdisjoint") else []:
                budget.measure(value)
        elif isinstance(owner, str) and name in STRING_METHODS:
            _require_string_method(budget, owner, name, given)
        elif isinstance(text := getattr(called, "text", None), str):  # of `wrap_str_format`
            _require_format(budget, text, given)
        elif owner in self.extensions.values():  # `generation` joins all that was written before
            budget.charge(budget.written // _CHARACTERS_PER_STEP_OF_JOIN)
        elif called is self.globals.get("strftime_now"):
            if budget.measure(given).characters > MAX_WIDTH or re.search(r"%\W?\d", str(given)):
                raise TemplateBoundsError("it formats a date with a width")
        elif isinstance(owner, LoopContext | Cycler | type(self.globals["dict"])):
            budget.measure(given)
        elif isinstance(called, Macro | LoopContext | Joiner | Undefined) or any(
            called is known for known in self.globals.values()
        ):
            for value in given:
                budget.take(value)
        else:
            raise TemplateBoundsError(f"it calls {name!r}, which no chat template needs")


def _require_copies(budget: Budget, value: Any, times: int) -> None:
    length = budget.take(value)
    budget.require(length * max(0, times))
    if not isinstance(value, str):
        budget.charge(length * max(0, times))


def _require_string_method(budget: Budget, text: str, name: str, given: list[Any]) -> None:
    if name == "join" and not all(isinstance(value, Collection) for value in given):
        raise TemplateBoundsError("it joins what is no list; write `| list` first")
    budget.measure(text)
    sizes = [budget.measure(value) for value in given]
    numbers = [abs(value) for value in given if isinstance(value, int)]
    texts = [value for value in given if isinstance(value, str)]
    if name in _PADDING or name == "expandtabs":
        budget.require((len(text) if name == "expandtabs" else 1) * max([8, *numbers]))
    elif name == "replace" and len(texts) > 1:
        budget.require(len(text) + text.count(texts[0]) * len(texts[1]))
    elif name == "join":
        budget.require(sum(size.characters + len(text) * size.items for size in sizes))


def _require_format(budget: Budget, text: str, given: Any) -> None:
    """Raise TemplateBoundsError if `text % given` or `text.format(*given)` may be too long."""
    if _WIDE.search(text):
        raise TemplateBoundsError(f"it formats a text with a width of more than {MAX_WIDTH} characters")
    values = text.count("%") + text.count("{")
    budget.require(budget.take(text) + values * (budget.measure(given).characters + MAX_WIDTH))


def _watched(name: str, function: Any, bound: Callable[..., Any]) -> Any:
    """Return a filter or a test that `bound(name, budget, call, value, arguments)` calls. It asks for the context, and
    so is not called when a template is compiled."""
    kind = _PassArg.from_obj(function)

    @pass_context
    def wrapper(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        first = {_PassArg.context: [context], _PassArg.eval_context: [context.eval_ctx]}.get(kind, [])  # type: ignore[arg-type]
        first = [context.environment] if kind is _PassArg.environment else first
        if isinstance(value, Iterator) and name in FILTERS - _SHALLOW:
            value = list(value)  # which counts its items
        call = partial(function, *first, value, *args, **kwargs)
        return bound(name, context.budget, call, value, [*args, *kwargs.values()])

    return wrapper


def _filter(name: str, budget: Budget, call: Callable[[], Any], value: Any, given: list[Any]) -> Any:
    budget.charge(1)
    if name not in _SHALLOW:
        budget.require(_made_by(name, budget, value, given))
    widths = [abs(each) for each in given if isinstance(each, int)]
    if name in ("batch", "slice"):
        budget.charge(max(widths, default=0))
    if name == "round" and max(widths, default=0) > MAX_DIGITS:
        raise TemplateBoundsError(f"it rounds to more than {MAX_DIGITS} digits")
    made = call()
    if isinstance(made, Iterator):
        return _charged(budget, made)
    budget.take(made)
    return made


def _made_by(name: str, budget: Budget, value: Any, given: list[Any]) -> int:
    """Return about how many characters a filter makes, at most."""
    size, arguments = budget.measure(value), budget.measure(given)
    texts = [each for each in given if isinstance(each, str)]
    width = sum(abs(each) for each in given if isinstance(each, int)) + arguments.characters + arguments.items
    if name == "replace" and len(texts) > 1:
        return size.characters + str(value).count(texts[0]) * len(texts[1])
    if name == "join":
        return size.characters + size.items * width
    if name == "indent":
        return size.characters + (1 + str(value).count("\n")) * (4 + width)
    if name == "tojson":
        return size.characters + size.items * (1 + size.depth) * width
    if name == "sum" and any(isinstance(each, list | tuple) for each in given):
        return size.items**2
    return size.characters + (width if name == "center" else 0)


def _charged(budget: Budget, items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        budget.charge(1)
        yield item


def _test(name: str, budget: Budget, call: Callable[[], Any], value: Any, given: list[Any]) -> Any:
    budget.charge(1)
    if name in _COMPARING:
        budget.measure([value, *given])
    return call()


def bound_templates() -> None:
    """Have transformers render every chat template within these bounds, from now on in this process."""
    from transformers.utils import chat_template_utils

    chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment  # type: ignore[misc]
    chat_template_utils._compile_jinja_template.cache_clear()
