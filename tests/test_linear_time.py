"""Whatever others wrote is read in a time that grows with its length, not with the square of it.

The texts are so long that the square of their length takes hours, and the rest a moment: nothing is timed, but what
hangs is stopped and named.
"""

import ast
import contextlib
import faulthandler
import importlib
import re
import subprocess
import sys

import pytest
from transformers.processing_utils import _MARKED_RE

from tests.regular_expressions import attacks, match_of
from tests.test_floors import MODULES

LENGTH = 200_000
HANGS = 120
"""Seconds after which something hangs; each takes one or two."""

FROM_NAMES = {
    "vlm.portable": 1,  # the names of folders, escaped
    "vlm.training.memory": 1,  # a line of the system's own
    "vlm.training.weights": 1,  # patterns of a model class, on its own weights
    "vlm.recipe_source": 2,  # those of `_SCALARS`, which are in `patterns` too
}
"""How many calls in a module have a pattern that is not written in the call."""

SEARCHES = {"search", "finditer", "findall", "sub", "subn", "split"}
"""What tries a pattern at every place of a text. `match` and `fullmatch` try it at one."""


def written_patterns(path):
    """The patterns in the calls of a module, and how many calls have one that is made elsewhere."""
    patterns, others = [], 0
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "re") or node.func.attr == "escape":
            continue
        first, names = node.args[0], [n.attr for a in node.keywords for n in ast.walk(a.value) if hasattr(n, "attr")]
        flags = sum(getattr(re, name) for name in names if name.isupper())
        if isinstance(first, ast.Constant) and node.func.attr != "compile":
            patterns.append((node.func.attr in SEARCHES, re.compile(first.value, flags)))
        elif node.func.attr != "compile":
            others += 1
    return patterns, others


def compiled_patterns(module):
    """The compiled patterns of a module, by the names that they have in it."""
    for name, value in vars(module).items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, re.Pattern):
                yield name, item


def searching():
    """The names of patterns that are searched for, somewhere in the package."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in MODULES.values()]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return {node.value.id for node in calls if isinstance(node.value, ast.Name) and node.attr in SEARCHES}


def all_patterns():
    """Every regular expression of the package, by a name, and whether it is searched for."""
    found, searched = {}, searching()
    for name, path in MODULES.items():
        if name == "vlm.__main__":  # which runs the command line
            continue
        module = importlib.import_module(name)
        written, others = written_patterns(path)
        assert others == FROM_NAMES.get(name, 0), f"{name} has regular expressions that are not looked at here"
        kept = [(variable in searched, pattern) for variable, pattern in compiled_patterns(module)]
        for is_searched, pattern in [*written, *kept]:
            if pattern is _MARKED_RE:  # of transformers; `vlm.template_bounds` bounds the texts that it is searched in
                continue
            found[f"{name}: {pattern.pattern[:60]!r} {pattern.flags}"] = pattern, is_searched
    scalars = importlib.import_module("vlm.recipe_source")._SCALARS
    return found | {f"vlm.recipe_source: {name}": (re.compile(text), False) for name, (text, _) in scalars.items()}


def each_text():
    """What reads texts of others, by a name, with a text that is short of what it looks for."""
    from vlm.data.readers_json import parse_json
    from vlm.eval.ptb_tokenizer import tokenize
    from vlm.eval.vqa import normalize_answer
    from vlm.portable import portable_text
    from vlm.printing import html_text, printable
    from vlm.recipe_source import parse_scalar

    n = LENGTH // 2
    deep = "[" * 100_000
    keys = ", ".join(f'"{i}": 0' for i in range(n // 8))
    return {
        "a string without an end in deep JSON": lambda: quiet(parse_json, deep + '"' + '\\"' * n),
        "an object with a key twice": lambda: parse_json("{" + keys + ', "0": 1}'),
        "JSON that is nested deep": lambda: quiet(parse_json, "[" * n + "]" * n),
        **{f"a caption of {part!r}": (lambda part=part: tokenize(part * n)) for part in ("a+", "a.", "a'", "1,", "<a")},
        "a caption that is nearly an address": lambda: tokenize("a+" * n + "@"),
        "an answer": lambda: normalize_answer("1,a. " * (n // 2)),
        "a text that is nearly a web address": lambda: portable_text("a" * LENGTH),
        "a text of web addresses": lambda: portable_text("a://b" * (n // 3)),
        "a page": lambda: (html_text("\u202e<" * n), printable("\r" * LENGTH)),
        "a scalar": lambda: quiet(parse_scalar, "0_" * n + "x"),
    }


def quiet(function, text):
    with contextlib.suppress(ValueError):  # the texts are as broken as can be
        function(text)


def begin(name):
    print(name, flush=True)
    faulthandler.dump_traceback_later(HANGS, exit=True)


def main(part):
    if part == "texts":
        for name, read in each_text().items():
            begin(name)
            read()
    for name, (pattern, is_searched) in all_patterns().items() if part == "patterns" else ():
        begin(name)
        for text in attacks(pattern, LENGTH):
            for _ in pattern.finditer(text) if is_searched else ():
                pass
            pattern.match(text)
            pattern.fullmatch(text)


def what_hangs(part):
    done = subprocess.run([sys.executable, "-m", "tests.test_linear_time", part], capture_output=True, text=True)
    return done.stdout.splitlines()[-1] + done.stderr[-2000:] if done.returncode else None


@pytest.mark.slow
@pytest.mark.parametrize("part", ["patterns", "texts"])
def test_nothing_takes_the_square_of_its_length(part):
    assert what_hangs(part) is None


@pytest.mark.slow
def test_the_texts_are_made_of_what_a_pattern_matches():
    import random

    for name, (pattern, _) in all_patterns().items():
        if "(?=" in pattern.pattern or "(?!" in pattern.pattern or "(?<" in pattern.pattern or "$" in pattern.pattern:
            continue  # look-arounds are passed over
        assert pattern.search(match_of(pattern, random.Random(1))), name


if __name__ == "__main__":
    main(sys.argv[1])
