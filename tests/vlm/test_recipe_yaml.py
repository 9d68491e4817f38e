"""YAML of recipes: scalars, anchors and merge keys, and text that is read back as it was written."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.vlm.recipe_texts import STAGES, load, refusal
from vlm.recipe_source import parse_scalar, read_yaml, write_yaml


def test_yaml_that_explodes_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "too many values" in refusal(tmp_path, "\n".join(lines))


def test_keys_shared_by_a_yaml_merge(tmp_path: Path) -> None:
    text = STAGES.replace("- {name: align, ", "- &first {name: align, train: {max_steps: 7}, ").replace(
        "- {name: tune", "- {<<: *first, name: tune"
    )
    assert load(tmp_path, text).stages[1].train == {"max_steps": 5}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5e3", 1500.0),
        ("-2", -2),
        ("1_000", 1000),
        (".5", 0.5),
        ("010", "010"),
        ("12:30", "12:30"),
        ("no", "no"),
        ("true", True),
        ("null", None),
        ("2024-01-01", "2024-01-01"),
        ("e5", "e5"),
        ("[1e-4, x]", [1e-4, "x"]),
        ("", None),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert parse_scalar(text) == value
    assert type(parse_scalar(text)) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_python_prints_is_read_back(number: float) -> None:
    assert parse_scalar(repr(number)) == number
    assert read_yaml(f"x: {number!r}", "f")[0]["x"] == number


def test_a_question_mark_inside_braces(tmp_path: Path) -> None:
    """YAML 1.2, rule 126 (ns-plain-char): only `,[]{}`, `: ` and ` #` end a plain scalar inside braces."""
    asked = "{a: What is this?, b: [Why?, is it so ? yes], c: x?y, d: 'z?'}"
    values = {"a": "What is this?", "b": ["Why?", "is it so ? yes"], "c": "x?y", "d": "z?"}
    assert read_yaml(f"x: {asked}", "f")[0]["x"] == values
    assert read_yaml("x: {? a : b}", "f")[0]["x"] == {"a": "b"}


def test_merge_keys_of_merge_keys_are_refused(tmp_path: Path) -> None:
    lines = ["x:", "- &a0 {k: v}"]
    lines += [f"- &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)]
    assert "too many values" in refusal(tmp_path, "\n".join([*lines, "<<: *a8"]))
    assert "contains itself" in refusal(tmp_path, "model: &a {x: 1, <<: *a}\n")


def test_of_merged_keys_the_first_wins_and_the_own_before_all(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {x: 2, y: 2, z: 2}\nc: {y: 3, <<: [*a, *b]}\n"
    assert read_yaml(text, "f")[0]["c"] == yaml.safe_load(text)["c"] == {"x": 1, "y": 3, "z": 2}


@pytest.mark.parametrize(
    "text", ["1e-4", "010", "12:30", "no", "2024-01-01", "<<", "~", "? x", "a\u2028b", " x ", "=", ""]
)
def test_text_that_a_run_writes_is_text_when_it_is_read(text: str) -> None:
    values = {"a": text, "b": [text, {"c": text}], "d": 1e-5, "e": None, "f": True, "g": 1e20}
    assert read_yaml(write_yaml(values), "f")[0] == values
