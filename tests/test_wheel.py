"""The wheel, as a user gets it: what is inside, and that it runs from an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["links", pytest.param("text files for links", marks=pytest.mark.slow)])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a checkout as it is, and as one where git makes no symbolic links (`core.symlinks=false`)."""
    copy = tmp_path_factory.mktemp("source") / "project"  # building writes into the source folder
    unwanted = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unwanted)
    if request.param != "links":
        for link in [path for path in (copy / "vlm").iterdir() if path.is_symlink()]:
            target = os.readlink(link)
            link.unlink()
            link.write_text(target)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (copy / "dist").glob("*.whl")
    return found


def test_it_has_every_module_and_recipe_and_nothing_else_on_top(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vlm"}
    packaged = {name for name in names if name.startswith("vlm/")}
    for folder, inside in (
        ("adapters", "vlm/adapters"),
        ("eval", "vlm/eval"),
        ("recipes", "vlm/recipes"),
        ("vlm", "vlm"),
    ):
        real = {path for kind in ("*.py", "*.yaml") for path in (ROOT / folder).rglob(kind)}
        missing = {f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" for path in real} - packaged
        assert not missing
    assert "vlm/py.typed" in packaged


def test_it_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, "--target", str(tmp_path / "site"), str(wheel)], check=True)
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "vlm", "recipes"],
        cwd=tmp_path / "empty",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    code = "import vlm, vlm.adapters, vlm.eval; print(vlm.__file__, vlm.adapters.__file__, vlm.eval.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "empty",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert all(Path(file).is_relative_to(tmp_path / "site" / "vlm") for file in where)
