"""The command line says how OpenMP's threads wait, before torch is imported, and leaves a user's own setting alone."""

import json
import os
import subprocess
import sys

import pytest

from vlm.threads import SPIN_COUNT

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
CODE = """
import json, os, sys
import {module}
print(json.dumps([{{name: os.environ.get(name) for name in {names}}}, "torch" in sys.modules]))
"""


def environment_after(module, given):
    """What a process has in its environment after an import, and whether torch was imported by then."""
    env = {key: value for key, value in os.environ.items() if key not in WAITING} | given
    code = CODE.format(module=module, names=WAITING)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": None}),
    ],
)
def test_the_command_line_sets_the_spin_count_before_torch(given, expected):
    assert environment_after("vlm.cli", given) == [expected, False]


def test_importing_the_package_changes_no_environment():
    assert environment_after("vlm", {}) == [dict.fromkeys(WAITING), False]
