"""Build the library that replaces CUDA, once per torch version, and say how a process is started with it."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCE = HERE / "cuda.c"
LIBRARY = "EMULATED_GPU_LIBRARY"
"""The environment variable that names the library; it is set in every process on the device."""


class Unavailable(RuntimeError):  # noqa: N818 - named for what was found
    """The device cannot be emulated here; the message is the reason."""


def environment() -> dict[str, str]:
    """Return the environment of a process on the emulated device, for itself and the processes that it starts.

    Raises [`Unavailable`] without a C compiler, or without torch's CUDA build.
    """
    library = _built()
    return os.environ | {
        LIBRARY: str(library),
        "LD_PRELOAD": _joined(str(library), "LD_PRELOAD"),
        "LD_LIBRARY_PATH": _joined(str(library.parent), "LD_LIBRARY_PATH"),
        "PYTHONPATH": _joined(f"{HERE / 'startup'}{os.pathsep}{ROOT}", "PYTHONPATH"),
    }


def _joined(first: str, variable: str) -> str:
    return os.pathsep.join(filter(None, (first, os.environ.get(variable))))


def _built() -> Path:
    """The library, built if it is missing or older than its source."""
    library = ROOT / "build" / "emulated_gpu" / version("torch") / "libcuda.so.1"
    if library.exists() and library.stat().st_mtime > SOURCE.stat().st_mtime:
        return library
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise Unavailable("an emulated GPU needs a C compiler (cc, gcc or clang)")
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    options = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-ldl"]
    made = subprocess.run([compiler, *_headers(), "-o", unfinished, SOURCE, *options], capture_output=True, text=True)
    if made.returncode:
        raise Unavailable(f"an emulated GPU: {compiler} cannot build {SOURCE.name}: {made.stderr.strip()}")
    unfinished.rename(library)
    return library


def _headers() -> list[str]:
    """The compiler's options for CUDA's headers, from the packages that torch's CUDA build installs."""
    specs = filter(None, map(find_spec, ("nvidia", "triton")))
    folders = [Path(folder) for spec in specs for folder in spec.submodule_search_locations or ()]
    found = [header.parent for folder in folders for header in folder.rglob("cuda_runtime_api.h")]
    if not found:
        raise Unavailable("an emulated GPU needs torch's CUDA build, and this one brings no CUDA headers")
    return [f"-I{folder}" for folder in found]
