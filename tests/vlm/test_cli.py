"""The command line: what is imported when, exit codes, and what is said on which stream."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlm import recipe
from vlm.cli import app
from vlm.printing import printable

COMMANDS = (
    ["train"], ["recipes"], ["data", "check"], ["cache", "ls"], ["cache", "clear"],
    ["classify"], ["probe"], ["encode"], ["encoders"], ["eval"], ["chat"], ["fetch"], ["index"], ["predict"], ["push"],
    ["quickstart"], ["search"],
)  # fmt: skip


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
        (["eval", "m", "--data", "quickstart", "--metrics", "rouge_l, cider"], "no metric 'cider'; did you mean"),
        (["eval", "m", "--data", "quickstart", "--metrics", " , "], "--metrics is empty; give it one or more of bleu"),
        (["eval", "m", "--data", "format=image_folder path=/data/Bob's photos"], "a quote is not closed. Put a pair"),
        (["eval", "m", "--data", "format=image_folder path=/x/two words"], "needs quotes: 'path=/x/two words'"),
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


def test_a_model_that_writes_is_asked_for_its_metrics(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vlm"}')
    code, _, err = vlm("eval", str(tmp_path), "--data", "format=image_folder path=/x")
    assert (code, err.splitlines()[-1][:30]) == (2, "vlm: say what to measure: --me")


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


def test_a_run_that_was_told_to_stop_exits_with_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.training.callbacks import Stopped

    def stopped() -> None:
        raise Stopped("stopped after step 3", signal.SIGTERM)

    monkeypatch.setattr(recipe, "packaged", stopped)
    assert vlm("recipes") == (143, "", "vlm: stopped after step 3\n")


def test_a_full_disk_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "run/recipe.yaml")

    monkeypatch.setattr(recipe, "packaged", full)
    code, _, said = vlm("recipes")
    assert code == 2
    assert said.startswith("vlm: run/recipe.yaml could not be written: the disk is full. Make room")


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


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images with captions, as an image folder."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    colors = ("black", "white", "red", "blue")
    for color in colors:
        Image.new("RGB", (20, 12), color).save(folder / f"{color}.png")
    rows = [json.dumps({"file_name": f"{color}.png", "caption": f"a {color} square"}) for color in colors]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of a few thousand random weights, saved as a run folder keeps it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    from vlm.build import assemble

    torch.manual_seed(0)
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"]
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4))
    language = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(fast), pad_token_id=0, eos_token_id=3))
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    model, processor = assemble(vision, language, images, fast)
    run = tmp_path_factory.mktemp("run")
    model.save_pretrained(run / "model")
    processor.save_pretrained(run / "model")
    return str(run)


def test_chat_answers_one_question(checkpoint: str, photos: Path) -> None:
    code, out, _ = vlm("chat", checkpoint, "what?", "--image", str(photos / "red.png"))
    assert code == 0
    assert vlm("chat", checkpoint, "what?", "--image", str(photos / "red.png"))[1] == out


def test_chat_reads_questions_from_a_pipe(checkpoint: str, photos: Path) -> None:
    one = vlm("chat", checkpoint, "what?", "--image", str(photos / "red.png"))[1]
    result = CliRunner().invoke(app, ["chat", checkpoint], input=f"/image {photos / 'red.png'}\nwhat?\n/quit\n")
    assert result.exit_code == 0
    assert result.stdout.endswith(one)


def test_predict_writes_what_chat_says(checkpoint: str, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = ["predict", checkpoint, str(photos), "--prompt", "what?", "--output", str(output)]
    words += ["--max-new-tokens", "256"]
    code, out, _ = vlm(*words)
    assert code == 0
    assert out.startswith("4 predicted")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(row["image"]).stem for row in rows] == ["black", "blue", "red", "white"]
    said = vlm("chat", checkpoint, "what?", "--image", str(photos / "red.png"))[1]
    assert said
    # On a terminal the control characters that random weights write are written out.
    assert printable(rows[2]["prediction"]).split() == said.split()
    assert vlm(*words)[1].startswith("0 predicted, 4 were there already")


def test_eval_scores_and_scores_blind(checkpoint: str, photos: Path) -> None:
    code, out, _ = vlm("eval", checkpoint, "--data", f"format=image_folder path={photos}", "--metrics", " rouge_l,")
    assert code == 0
    assert "rouge_l" in out
    folder = Path(checkpoint) / "evaluation-image_folder"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["n_images"] == 4
    assert summary["metrics"]["rouge_l"]["blind_score"] is not None
    assert (folder / "samples.html").is_file()
    words = ["eval", checkpoint, "--data", f"format=image_folder path={photos}", "--metrics", "rouge_l", "--limit", "2"]
    code, _, err = vlm(*words)
    assert code == 2
    assert "evaluation-image_folder holds the results of data" in err
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_data_check_counts_tokens_as_the_model_does(checkpoint: str, photos: Path) -> None:
    code, out, _ = vlm("data", "check", "format=image_folder", f"path={photos}", "--model", checkpoint)
    assert code == 0
    assert "tokens" in out
    assert "<image> x 4" in out  # 2 x 2 patches
    assert "[[a black square<|im_end|>]]" in out


def test_data_check_knows_where_learned_positions_end(photos: Path, tmp_path: Path) -> None:
    """GPT-2's end after 256 tokens here; Llama's do not end."""
    from tests.tiny import tiny

    source = json.dumps({"file_name": "red.png", "caption": "red " * 100})
    (tmp_path / "long.jsonl").write_text(source)
    for decoder in ("gpt2", "llama"):
        for part in tiny(decoder):
            part.save_pretrained(tmp_path / decoder)
        words = [f"path={photos}", f"metadata={tmp_path / 'long.jsonl'}", "--model", str(tmp_path / decoder)]
        code, out, _ = vlm("data", "check", "format=image_folder", *words)
        assert code == 0
        assert ("tokens, and the model has 256 positions" in out) == (decoder == "gpt2")


@pytest.mark.parametrize(
    ("rank", "local_rank", "said"),
    [("0", "0", "vlm: there is no file"), ("8", "0", "vlm (process 8): there is no file"), ("1", "1", "")],
)
def test_what_all_processes_of_a_machine_find_is_said_once(rank: str, local_rank: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vlm", "train", "none.yaml"],
        capture_output=True, text=True, check=False, env=os.environ | {"RANK": rank, "LOCAL_RANK": local_rank},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(said) if said else not done.stderr


def test_what_a_process_finds_after_they_have_met_it_says_itself(tmp_path: Path) -> None:
    code = f"""if True:
        import os, sys, torch
        os.environ |= dict(RANK="1", LOCAL_RANK="1")
        torch.distributed.init_process_group("gloo", init_method="file://{tmp_path / "meeting"}", rank=0, world_size=1)
        from vlm.cli import app
        sys.argv = ["vlm", "train", "none.yaml"]
        app()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "vlm (process 1): there is no file" in done.stderr
