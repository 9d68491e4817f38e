"""How far systems are from transformers' own implementation: `python -m benchmarks.parity` writes docs/parity.md.

Runs the tests that compare the two, on tiny random models in float32, and takes the differences from them: nothing is
computed here. Needs the extra `test`.
"""

import sys
from typing import Any

from benchmarks.noted import ROOT, replace_table, run


class OnlyParity:
    """A plugin of pytest that runs the tests with the fixture `parity`."""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if "parity" in item.fixturenames]


def table(noted: list[tuple[str, str, float]]) -> str:
    found: dict[tuple[str, str], list[float]] = {}
    for system, compared, difference in noted:
        found.setdefault((system, compared), []).append(difference)
    lines = ["| system | compared | cases | largest difference |", "| --- | --- | --- | --- |"]
    for (system, compared), differences in sorted(found.items(), key=lambda item: item[0][0].lower()):
        largest = max(differences)
        lines.append(f"| {system} | {compared} | {len(differences)} | {f'{largest:.0e}' if largest else '0'} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    noted, status = run("parity", [str(ROOT / "tests")], OnlyParity())
    replace_table(ROOT / "docs" / "parity.md", table(noted))
    return status


if __name__ == "__main__":
    sys.exit(main())
