"""`vlm cache`: what is kept, shown and removed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vlm import cache
from vlm.cli import app
from vlm.data.features import FeatureCache

ABOUT = {"encoder": "openai/clip", "image_size": "224x224", "layer": "-2", "precision": "float32"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two encoders, the second used last, and a folder of the format before this one."""
    monkeypatch.setenv("VLM_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")
    for number, key in enumerate(("aa11", "ab22")):
        kept = FeatureCache(tmp_path / "features" / key)
        kept.write(["x", "y"], torch.zeros(2, 250, 1000), (1, 1))
        kept.write(["z"], torch.zeros(1, 250, 1000), (1, 1))
        kept.describe(ABOUT | {"precision": f"float{32 // (number + 1)}"})
        os.utime(kept.folder / "about.json", (86400 * 365 * (10 + number),) * 2)
    old = tmp_path / "features" / "b0ld"
    old.mkdir()
    (old / "0.npy").write_bytes(bytes(5_000_000))
    (old / "0.json").write_text("{}")
    os.utime(old, (0, 0))
    return tmp_path / "features"


def vlm(*words, **options):
    result = CliRunner().invoke(app, ["cache", *words], **options)
    return result.exit_code, result.stdout, result.stderr


def test_what_is_kept_is_listed(folder):
    entries = cache.kept()
    assert [(e.key, e.images, e.size // 10**6) for e in entries] == [("ab22", 3, 3), ("aa11", 3, 3), ("b0ld", None, 5)]
    code, out, _ = vlm("ls")
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert rows[1][:8] == ["ab22", "openai/clip", "224x224", "-2", "float16", "3", "0.00", "GB"]
    assert rows[1][8].startswith("198")
    assert rows[3][:6] == ["b0ld", "?", "?", "?", "?", "?"]
    assert out.splitlines()[-1].startswith("0.01 GB in ")


def test_an_empty_cache_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path))
    assert vlm("ls")[1].startswith("no features are kept in ")
    assert vlm("clear") == (0, "removed 0.00 GB, of 0 encoders\n", "")


def test_a_file_that_is_cut_off_does_not_stop_the_list(folder):
    shard = next((folder / "aa11").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:50])
    assert {entry.key: entry.images for entry in cache.kept()}["aa11"] in (1, 2)


def test_keys_are_cleared_by_how_they_start(folder):
    (folder / "aa11" / "0.writing-1").write_bytes(b"left over")
    assert vlm("clear", "aa", "b0")[0] == 0
    assert [path.name for path in folder.iterdir()] == ["ab22"]


@pytest.mark.parametrize(
    ("key", "said"), [("aa12", "did you mean 'aa11'?"), ("zz", "known: aa11, ab22, b0ld"), ("", "known")]
)
def test_a_key_that_there_is_not_removes_nothing(folder, key, said):
    code, _, err = vlm("clear", "ab22", key)
    assert code == 2
    assert said in err
    assert len(list(folder.iterdir())) == 3


def test_all_are_cleared_after_asking(folder):
    code, out, _ = vlm("clear", input="n\n")
    assert code == 1
    assert "Remove all kept features, 0.01 GB in " in out
    assert vlm("clear", input="")[0] == 1, "nobody is there to say yes"
    assert len(list(folder.iterdir())) == 3
    assert vlm("clear", input="y\n")[0] == 0
    assert not list(folder.iterdir())


def test_all_are_cleared_without_asking(folder):
    assert vlm("clear", "--yes") == (0, "removed 0.01 GB, of 3 encoders\n", "")
    assert not list(folder.iterdir())


def test_it_does_not_wait_for_the_heavy_libraries(folder):
    code = """if True:
        import sys
        from typer.testing import CliRunner
        from vlm.cli import app
        assert CliRunner().invoke(app, ["cache", "ls"]).exit_code == 0
        heavy = {"torch", "transformers", "datasets"} & set(sys.modules)
        sys.exit(f"imported: {heavy}" if heavy else 0)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
def test_a_damaged_description_does_not_stop_the_list(folder, content):
    (folder / "aa11" / "about.json").write_text(content)
    code, out, _ = vlm("ls")
    assert code == 0
    assert "?" in next(line for line in out.splitlines() if line.startswith("aa11"))
