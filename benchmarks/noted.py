"""What tests note of themselves with pytest's `record_property`, for the tables in the docs."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


class Noted:
    """A plugin of pytest that keeps what the tests that passed noted under `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: list[Any] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.values += [value for name, value in report.user_properties if name == self.name]


def run(name: str, arguments: Sequence[str], *plugins: Any) -> tuple[list[Any], int]:
    """What the tests in `arguments` note under `name`, and pytest's exit status."""
    noted = Noted(name)
    status = pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[noted, *plugins])
    return noted.values, int(status)


def replace_table(document: Path, rows: str, after: str = "") -> None:
    """Put `rows` in place of the first table in `document` behind the text `after`."""
    text = document.read_text(encoding="utf-8")
    start = text.index(after)
    new = re.sub(r"(?m)(?:^\|.*\n)+", lambda _: rows, text[start:], count=1)
    document.write_text(text[:start] + new, encoding="utf-8")
    print(rows)
