"""Find and import the test suites of the installed transformers version.

ModelTesterMixin and ProcessorTesterMixin are part of the source distribution on PyPI. GenerationTesterMixin is not; it
comes from the tag of the same version on GitHub.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://github.com/huggingface/transformers"
PACKAGE = "transformers_tests"
"""The name that their package `tests` is imported under."""
GENERATION = Path("generation", "test_utils.py")


class MissingSuitesError(Exception):
    """The source distribution cannot be had."""


def locate() -> Path:
    """Return the folder with the tests of the installed version; fetch it into `build/` the first time.

    Raises MissingSuitesError with the reason.
    """
    folder = ROOT / "build" / "transformers_tests" / transformers.__version__
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            _unpack_source_distribution(Path(made))
            (Path(made) / "tests").rename(folder)
    if not (folder / GENERATION).exists():
        with tempfile.TemporaryDirectory() as made:
            if clone_generation_tests(Path(made)):
                shutil.copytree(Path(made) / "tests" / "generation", folder / "generation", dirs_exist_ok=True)
    return folder


def _unpack_source_distribution(folder: Path) -> None:
    """Put the tests of the source distribution into `folder / "tests"`."""
    package = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=transformers"]
    done = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True)
    archives = [*folder.glob("*.tar.gz")]
    if done.returncode or not archives:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MissingSuitesError(f"pip cannot download the source distribution of {package}: {last}")
    with tarfile.open(archives[0]) as archive:
        for member in archive.getmembers():
            inside = Path(*Path(member.name).parts[1:])
            if member.isfile() and inside.parts[:1] == ("tests",):
                member.name = str(inside)
                archive.extract(member, folder, filter="data")
    if not (folder / "tests" / "test_modeling_common.py").exists():
        raise MissingSuitesError(f"the source distribution of {package} has no tests/test_modeling_common.py")


def clone_generation_tests(folder: Path) -> bool:
    """Put `tests/generation` of the version's tag into `folder`, and return whether that was possible."""
    tag = f"v{transformers.__version__}"
    options = ["--quiet", "--depth=1", f"--branch={tag}", "--filter=blob:none", "--sparse"]
    for command in (
        ["git", "-c", "advice.detachedHead=false", "clone", *options, REPOSITORY, str(folder)],
        ["git", "-C", str(folder), "sparse-checkout", "set", "tests/generation"],
    ):
        try:
            done = subprocess.run(command, capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired):
            return False
        if done.returncode:
            return False
    return (folder / "tests" / GENERATION).exists()


def import_suites(folder: Path, picture: Path) -> tuple[Any, Any, type | None]:
    """Return the modules with ModelTesterMixin and ProcessorTesterMixin, and GenerationTesterMixin (None where it is
    missing).

    Args:
        folder: as returned by `locate`.
        picture: an image file that replaces every download of transformers' tests.

    Their helpers for exporting models and for downloads are in neither source; empty ones take their place.
    """
    _add_package(PACKAGE, folder)
    nothing = type("ExportTesterMixin", (), {})
    for package in (PACKAGE, "tests"):  # they use both names
        _add_module(f"{package}.exporters")
        _add_module(f"{package}.exporters.test_export", ExportTesterMixin=nothing, ExportGenerateTesterMixin=nothing)
    _add_module("fetch_hub_objects_for_ci", url_to_local_path=lambda *args, **kwargs: str(picture))
    generation = None
    if (folder / GENERATION).exists():
        _add_package(f"{PACKAGE}.generation", folder / "generation")
        generation = importlib.import_module(f"{PACKAGE}.generation.test_utils").GenerationTesterMixin
    else:
        _add_module(f"{PACKAGE}.generation")
        _add_module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    names = ("test_modeling_common", "test_processing_common")
    modeling, processing = (importlib.import_module(f"{PACKAGE}.{name}") for name in names)
    return modeling, processing, generation


def _add_module(name: str, **values: object) -> None:
    module = ModuleType(name)
    module.__dict__.update(values)
    sys.modules[name] = module


def _add_package(name: str, folder: Path) -> None:
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module
