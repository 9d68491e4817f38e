"""The command line: what is imported when, exit codes, and what is said on which stream."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlm import recipe
from vlm.cli import app

COMMANDS = (["train"], ["recipes"], ["data", "check"], ["eval"], ["chat"], ["predict"], ["push"], ["quickstart"])


def vlm(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(words))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_help_does_not_wait_for_the_heavy_libraries() -> None:
    code = """if True:
        import sys
        from typer.testing import CliRunner
        from vlm.cli import app
        assert CliRunner().invoke(app, ["--help"]).exit_code == 0
        heavy = {"torch", "transformers", "datasets", "numpy", "PIL", "pydantic", "huggingface_hub"} & set(sys.modules)
        sys.exit(f"imported: {heavy}" if heavy else 0)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: list[str]) -> None:
    code, out, _ = vlm(*command, "--help")
    assert code == 0
    assert "Usage:" in out


def test_recipes_are_listed_and_shown() -> None:
    code, out, _ = vlm("recipes")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == sorted(recipe.packaged())
    assert vlm("recipes", "show", "quickstart") == (0, recipe.packaged_text("quickstart"), "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes", "show", "quikstart"], "did you mean 'quickstart'?"),
        (["train", "quikstart"], "did you mean 'quickstart'?"),
        (["train", "quickstart", "train.max_stps=1"], "command line  train.max_stps: no such field"),
        (["data", "check", "format=image_foldr"], "did you mean 'image_folder'?"),
        (["data", "check", "format=image_folder", "path=/nowhere"], "no such folder: /nowhere"),
        (["eval", "m", "--data", "quikstart"], "did you mean 'quickstart'?"),
        (["eval", "m", "--data", "quickstart", "--metrics", "cider"], "did you mean 'cider_d'?"),
        (["eval", "m", "--data", "format=image_folder path=/x"], "say what to measure"),
        (["chat", "m", "--image", "/nowhere.png"], "/nowhere.png: the file does not exist"),
        (["predict", "m", "/nowhere.png", "--prompt", "p", "--output", "o.jsonl"], "/nowhere.png is no file"),
    ],
)
def test_a_mistake_is_one_message_and_exit_2(words: list[str], message: str) -> None:
    code, out, err = vlm(*words)
    assert code == 2
    assert out == ""
    assert err.startswith("vlm: ")
    assert message in err
    assert "Traceback" not in err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(recipe, "packaged", broken)
    with pytest.raises(ValueError, match="a bug"):
        vlm("recipes")


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "packaged", stopped)
    assert vlm("recipes") == (130, "", "stopped\n")


def test_data_check_reports_and_fails_on_bad_rows(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = ['{"file_name": "a.png", "caption": "black"}', '{"file_name": "b.png", "caption": "missing"}']
    (tmp_path / "metadata.jsonl").write_text(rows[0] + "\n")
    code, out, _ = vlm("data", "check", "format=image_folder", f"path={tmp_path}")
    assert code == 0
    assert "[[black]]" in out
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    code, out, _ = vlm("data", "check", "format=image_folder", f"path={tmp_path}")
    assert code == 1
    assert "b.png" in out
