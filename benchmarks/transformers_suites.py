"""Run transformers' test suites over our variants and over Llava: `python -m benchmarks.transformers_suites`.

Writes the counts into docs/parity.md and prints every failure. Needs the extra `test`, and PyPI and GitHub the first
time. Further words are options of pytest: `-k "not compil"` leaves out what compiles models, most of the time it takes.
"""

import sys
from collections import Counter
from collections.abc import Mapping

import transformers

from benchmarks.noted import ROOT, replace_table
from tests.transformers_suites.allowed import problems
from tests.transformers_suites.run import Outcome, run
from tests.transformers_suites.source import GENERATION, locate
from tests.transformers_suites.variants import LLAVA, VARIANTS

DOCUMENT = ROOT / "docs" / "parity.md"
SECTION = "## transformers' own test suites"


def row(variant: str, outcomes: Mapping[str, Outcome]) -> str:
    """Return a line of the table: tests passed, failed and skipped in each suite."""
    counts = Counter((outcome.suite, outcome.outcome) for outcome in outcomes.values())
    cells = [" / ".join(str(counts[suite, kind]) for kind in ("passed", "failed", "skipped")) for suite in SUITES]
    return f"| {variant} | {' | '.join(cells)} |"


SUITES = {"Model": "model and generation", "Processor": "processor"}


def main() -> int:
    folder = locate()
    if not (folder / GENERATION).exists():
        print(f"GenerationTesterMixin is left out: {folder / GENERATION} could not be fetched")
    lines = [f"| transformers {transformers.__version__} | {' | '.join(SUITES.values())} |", "| --- | --- | --- |"]
    found: list[str] = []
    for variant in VARIANTS:
        outcomes = run(variant, folder, sys.argv[1:])
        lines.append(row(variant, outcomes))
        print(lines[-1], flush=True)
        if variant == LLAVA:
            found += [f"{name}: {outcome.message}" for name, outcome in outcomes.items() if outcome.outcome == "failed"]
        else:
            found += problems(variant, outcomes)
    replace_table(DOCUMENT, "\n".join(lines) + "\n", after=SECTION)
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
