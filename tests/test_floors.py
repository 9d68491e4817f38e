"""Who may import whom: each floor of the package imports from its own and the floors above it in this list."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS: list[set[str]] = [
    {"errors", "disk_faults", "files", "hashes", "locks", "paths", "printing", "standard_streams", "threads"},
    {"adapters"},
    {
        "arguments",
        "configuration",
        "encoder",
        "image_attention",
        "image_processors",
        "vision_towers",
        "fusion",
        "loading",
        "fingerprint",
        "modeling",
        "modeling_outputs",
        "base_model",
        "pretrained_model",
        "language_head",
        "older_names",
        "older_adapters",
        "cache_state",
        "image_places",
        "image_rows",
        "generation_inputs",
        "placeholders",
        "processing",
        "build",
        "dual_encoder",
        "chat_templates",
        "template_bounds",
        "template_budget",
        "template_metering",
        "registration",
        "precision",
        "tiling",
        "vision_cache",
        "attention",
        "tree_attention",
        "",
    },
    {"data"},
    {"interop"},
    {"batches", "shared_prefix", "generation_config", "positions"},
    {"generation", "embedding"},
    {"session"},
    {"eval"},
    {"pair_evaluation"},
    {
        "recipe",
        "recipe_contrastive",
        "recipe_data",
        "recipe_evaluation",
        "recipe_model",
        "presets",
        "recipe_source",
        "recipe_errors",
        "recipe_paths",
        "recipe_train",
        "recipe_train_effects",
        "recipes",
        "training",
        "recognition",
    },
    {"retrieval"},
    {
        "cache",
        "chat",
        "classify",
        "probe",
        "predict",
        "evaluate",
        "data_check",
        "encode",
        "encoders",
        "export",
        "index",
        "remote_code",
        "runs",
        "search",
        "hub",
        "model_card",
        "portable",
        "publication",
        "serve",
        "quickstart",
        "tour",
    },
    {"cli", "__main__"},
]
"""The names are modules and packages inside `vlm`; the empty one is `vlm/__init__.py`."""

STRICT: dict[str, set[str]] = {
    "adapters": {"torch", "numpy", "vlm.adapters", "vlm.errors"},
    "eval": {
        "numpy",
        "PIL",
        "rich",
        "vlm.eval",
        "vlm.disk_faults",
        "vlm.errors",
        "vlm.files",
        "vlm.printing",
        "vlm.data",
    },
    "errors": set(),
    "disk_faults": {"safetensors", "vlm.errors"},
    "locks": {"vlm.errors", "vlm.printing"},
    "files": {"vlm.disk_faults", "vlm.errors", "vlm.locks"},
    "standard_streams": set(),
}
"""For these, all that they may import besides the standard library, at the top or inside functions."""


def part_of(module: str) -> str:
    """`vlm.data.readers` is a part of `data`."""
    return [*module.split("."), ""][1]


LINKED = ("adapters", "eval", "recipes")
"""Folders at the top that are packages inside `vlm`: by links, or where there are none by `pyproject.toml`."""


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the package with its file."""
    folders = {"vlm": ROOT / "vlm"} | {f"vlm.{name}": ROOT / name for name in LINKED}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder).with_suffix("").parts
            if package != "vlm" or inside[0] not in LINKED:  # some versions of Python follow the links
                yield ".".join((package, *(inside[:-1] if inside[-1] == "__init__" else inside))), path


def imports(path: Path) -> Iterator[str]:
    """The dotted names a file imports, wherever in it; `from vlm import recipe` is `vlm.recipe`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name, from vlm..."
            for alias in node.names:
                yield f"{node.module}.{alias.name}" if node.module == "vlm" and alias.name[0].islower() else node.module


MODULES = dict(sources())


def test_the_linked_folders_are_seen() -> None:
    assert {"vlm.adapters.projectors", "vlm.eval.metrics", "vlm.cli", "vlm.data.readers"} <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_it_imports_from_its_own_floor_and_those_above(module: str) -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    part = part_of(module)
    assert part in floor, f"vlm/{part} is new: give it a place in FLOORS"
    for name in imports(MODULES[module]):
        if name == "vlm" or name.startswith("vlm."):
            other = part_of(name) if part_of(name) in floor else ""  # `from vlm import VLMConfig`
            assert floor[other] <= floor[part], f"{module} imports {name}, which is below it"


@pytest.mark.parametrize("module", [name for name in sorted(MODULES) if part_of(name) in STRICT])
def test_it_imports_little(module: str) -> None:
    allowed = STRICT[part_of(module)]
    for name in imports(MODULES[module]):
        fine = name.split(".")[0] in sys.stdlib_module_names or any(
            name == good or name.startswith(f"{good}.") for good in allowed
        )
        assert fine, f"{module} imports {name}; besides the standard library it may import {sorted(allowed)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_it_uses_the_packaged_names(module: str) -> None:
    loose = {"adapters", "eval", "recipes"} & {name.split(".")[0] for name in imports(MODULES[module])}
    assert not loose, f"{module} imports {loose}: outside the repository these exist as vlm.{loose.pop()} only"
