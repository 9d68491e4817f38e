"""Run transformers' test suites over a variant in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.transformers_suites.source import ROOT

SUITES = Path(__file__).with_name("suites.py")


@dataclass
class Outcome:
    """What became of a test: `passed`, `failed` or `skipped`, and the last line of the error or the reason."""

    suite: str
    outcome: str
    message: str


def run(variant: str, folder: Path, options: Sequence[str] = ()) -> dict[str, Outcome]:
    """Return the outcome of every test over a variant by its name.

    Args:
        folder: the tests of transformers, as `tests.transformers_suites.source.locate` returns them.
        options: further options of pytest.

    Raises RuntimeError with the last lines of the output if the tests cannot be collected.
    """
    with tempfile.TemporaryDirectory() as made:
        written = Path(made) / "outcomes.json"
        environment = os.environ | {
            "TRANSFORMERS_TESTS": str(folder),
            "TRANSFORMERS_VARIANT": variant,
            "TRANSFORMERS_OUTCOMES": str(written),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-o",
            "addopts=",
            "-p",
            "no:cacheprovider",
            "--disable-warnings",
        ]
        command += ["--import-mode=importlib", "-p", "tests.transformers_suites.run", *options, str(SUITES)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        if not written.exists() or done.returncode not in (0, 1):
            raise RuntimeError(f"{variant}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
        return {name: Outcome(**values) for name, values in json.loads(written.read_text()).items()}


_outcomes: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report: Any) -> None:
    """As a plugin of pytest: keep the outcome of a test, that of its body unless setting up or cleaning up fails."""
    if report.when != "call" and report.passed:
        return
    suite, name = report.nodeid.split("::")[-2:]
    if report.skipped:
        message = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = "" if report.passed else crash.message if crash else str(report.longrepr)[-2000:]
    key = f"{suite}::{name}"
    if _outcomes.get(key, {}).get("outcome") != "failed":
        _outcomes[key] = {"suite": suite, "outcome": report.outcome, "message": message}


def pytest_sessionfinish() -> None:
    """As a plugin of pytest: write the outcomes where `run` reads them."""
    if path := os.environ.get("TRANSFORMERS_OUTCOMES"):
        Path(path).write_text(json.dumps(_outcomes))
