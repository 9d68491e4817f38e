"""How far several processes are from one: `python -m benchmarks.parallel` writes the table in docs/scaling.md.

Runs the tests that compare the two, on CPUs, and takes the differences from them: nothing is computed here. Needs the
extra `test`, and some minutes.
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
HEAD = "| case | processes | loss of a step | held-out loss | trained weights |"

Row = tuple[str, str, float, float, float]


class Collected:
    """A plugin of pytest that keeps what was noted by the tests that passed."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.rows += [value for name, value in report.user_properties if name == "parallel"]


def table(rows: list[Row]) -> str:
    lines = [HEAD, "| --- | --- | --- | --- | --- |"]
    order = list(dict.fromkeys(case for case, *_ in rows))
    for case, processes, *differences in sorted(rows, key=lambda row: order.index(row[0])):
        cells = [f"{difference:.0e}" if difference else "0" for difference in differences]
        lines.append(f"| {case} | {processes} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    collected = Collected()
    tests = str(ROOT / "tests/training/test_parallel.py")
    failed = pytest.main(["-q", "-p", "no:cacheprovider", "-m", "slow", tests], plugins=[collected])
    rows = table(collected.rows)
    text = DOCUMENT.read_text(encoding="utf-8")
    pattern = rf"(?m)^{re.escape(HEAD)}\n(?:^\|.*\n)+"
    DOCUMENT.write_text(re.sub(pattern, lambda _: rows, text), encoding="utf-8")
    print(rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
