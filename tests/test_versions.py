"""The versions in pyproject.toml, constraints.txt and of what is installed agree."""

import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]


def lowest(requirement):
    [bound] = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    return bound


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda requirement: requirement.name)
def test_no_lower_bound_is_below_what_transformers_needs(requirement):
    """A version that could never be installed together with it is none that works."""
    for line in distribution("transformers").requires or ():
        needed = Requirement(line)
        same = needed.name.replace("_", "-").lower() == requirement.name.replace("_", "-").lower()
        if same and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            bounds = [Version(part.version) for part in needed.specifier if part.operator == ">="]
            assert all(bound <= lowest(requirement) for bound in bounds), f"transformers needs {line}"


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda requirement: requirement.name)
def test_the_constraints_are_within_the_bounds(requirement):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {
        name.replace("_", "-").lower(): Version(version)
        for name, _, version in (line.partition("==") for line in lines)
    }
    assert pinned[requirement.name.replace("_", "-").lower()] in requirement.specifier


def test_the_classifiers_say_which_pythons_are_supported():
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: Python :: 3." in line]
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert named == [f"3.{minor}" for minor in range(11, 11 + len(named))]
