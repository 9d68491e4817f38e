"""Which encoders go with which bridges and decoders: `python -m benchmarks.combinations [-n 2]` writes the table in
docs/bridges.md.

Runs `tests/vlm/test_combinations.py` over every combination, with the arguments of pytest that are given here, and
counts what passed. Takes about 20 minutes of one core. Needs the extra `test`.
"""

import sys

from benchmarks.noted import ROOT, replace_table, run


def table(noted: list[tuple[str, str, str]]) -> str:
    """Encoders by bridges; in a cell the number of decoders, times that of the encoder's implementations."""
    bridges = list(dict.fromkeys(bridge for _, bridge, _ in noted))
    counts: dict[str, dict[str, int]] = {}
    for encoder, bridge, _ in noted:
        row = counts.setdefault(encoder, dict.fromkeys(bridges, 0))
        row[bridge] += 1
    lines = [
        "| encoder | " + " | ".join(f"`{bridge}`" for bridge in bridges) + " |",
        "| --- " * (len(bridges) + 1) + "|",
    ]
    for encoder, row in sorted(counts.items(), key=lambda item: item[0].lower()):
        lines.append(f"| {encoder} | " + " | ".join(str(row[bridge]) for bridge in bridges) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    noted, status = run("combination", [str(ROOT / "tests" / "vlm" / "test_combinations.py"), *arguments])
    replace_table(ROOT / "docs" / "bridges.md", table(noted), after="## What is tested together")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
