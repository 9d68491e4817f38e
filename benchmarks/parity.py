"""How far systems are from transformers' own implementation: `python -m benchmarks.parity` writes docs/parity.md.

Runs the tests that compare the two, on tiny random models in float32, and takes the differences from them: nothing is
computed here. Needs the extra `test`.
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "parity.md"


class Collected:
    """A plugin of pytest that runs the tests with the fixture `parity`, and keeps what those noted that passed."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[float]] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if "parity" in item.fixturenames]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == "parity":
                    system, compared, difference = value
                    self.found.setdefault((system, compared), []).append(difference)


def table(found: dict[tuple[str, str], list[float]]) -> str:
    lines = ["| system | compared | cases | largest difference |", "| --- | --- | --- | --- |"]
    for (system, compared), differences in sorted(found.items(), key=lambda item: item[0][0].lower()):
        largest = max(differences)
        lines.append(f"| {system} | {compared} | {len(differences)} | {f'{largest:.0e}' if largest else '0'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    collected = Collected()
    failed = pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / "tests")], plugins=[collected])
    rows = table(collected.found)
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(re.sub(r"(?m)(?:^\|.*\n)+", lambda _: rows, text, count=1), encoding="utf-8")
    print(rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
