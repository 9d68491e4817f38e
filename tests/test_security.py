"""SECURITY.md names tests that there are, and limits that hold."""

import ast
import re
from pathlib import Path

from vlm.data.images import MAX_ASPECT_RATIO, MAX_BYTES, MAX_PIXELS, MAX_SCANS
from vlm.template_budget import CHARACTERS, STEPS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_the_tests_in_the_table_exist():
    table = TEXT.partition("| attack | response | test |\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[1:]]
    assert len(rows) > 15
    assert all(len(row) == 3 and row[2].startswith("`test_") for row in rows)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[2])}
    written = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert named <= written, f"no such tests: {sorted(named - written)}"


def test_the_limits_are_those_of_the_code():
    said = " ".join(TEXT.split())
    for limit in (
        f"at most {MAX_PIXELS:,} pixels, {MAX_BYTES // 2**20} MB of file, and sides of {MAX_ASPECT_RATIO} to 1",
        f"takes {STEPS:,} steps and writes {CHARACTERS:,} characters",
        f"refused above {MAX_SCANS} ",
    ):
        assert limit in said, limit
