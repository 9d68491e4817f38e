"""`vlm runs`, on folders as runs leave them."""

import json
import os
import platform
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from vlm import cli

RECIPE = {
    "name": "captions",
    "data": {"train": {"path": "images"}},
    "stages": [{"name": "train", "trainable": {"projector": 1e-3}, "train": {"max_steps": 40}}],
    "output_dir": "runs/one",
}


def save_run(folder: Path, recipe=RECIPE, *, losses=(3.0, 2.0, 2.5), process=None, scores=None, every=10):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(folder)}))
    (folder / "environment.json").write_text(json.dumps({"packages": {}, "process": process}))
    stage = recipe["stages"][-1]["name"]
    entries = [
        {"stage": stage, "step": every * n, "epoch": n / 2, "loss": loss + 0.1, "eval_loss": loss}
        for n, loss in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if scores:
        (folder / "model").mkdir()
        (folder / "model/config.json").write_text("{}")
        (folder / "evaluation").mkdir()
        metrics = {name: {"score": score, "blind_score": score / 2} for name, score in scores.items()}
        (folder / "evaluation/summary.json").write_text(json.dumps({"metrics": metrics}))
    return folder


def invoke(*words):
    cli.console.width = 200  # made with the module, at the width of that moment
    result = CliRunner().invoke(cli.app, ["runs", *map(str, words)])
    return result.exit_code, [" ".join(line.split()) for line in result.output.splitlines()]


def this_process(**changes):
    mine = psutil.Process()
    return {"host": platform.node(), "pid": mine.pid, "started": mine.create_time()} | changes


@pytest.mark.parametrize(
    ("process", "state"),
    [
        (this_process(), "running"),
        (this_process(started=1.0), "stopped"),  # its number is another's now
        (this_process(host="elsewhere"), "stopped"),
        (this_process(pid=2**22 + 1), "stopped"),
        (None, "stopped"),
    ],
)
def test_a_run_that_is_not_finished(tmp_path, process, state):
    save_run(tmp_path / "runs/one", process=process)
    code, lines = invoke(tmp_path / "runs")
    assert code == 0
    assert any(line.startswith(f"one captions 30 of 40 {state} loss 2.0000 ") for line in lines), lines


def test_a_finished_run_and_one_of_stages_below(tmp_path, monkeypatch):
    save_run(tmp_path / "runs/one", scores={"cider_d": 0.61, "rouge_l": 0.4}, process=this_process())
    stages = [{"name": "align", "train": {}}, {"name": "tune", "train": {"num_train_epochs": 4}}]
    save_run(tmp_path / "runs/more/two", RECIPE | {"stages": stages})
    os.utime(tmp_path / "runs/one/recipe.yaml", (1, 1))
    monkeypatch.chdir(tmp_path)
    code, lines = invoke()
    assert code == 0
    assert any(line.startswith("one captions 30 of 40 finished cider_d 0.610 ") for line in lines), lines
    # 30 steps are one and a half epochs: four are 80
    assert any(line.startswith("more/two captions 30 of 80 (tune, stage 2 of 2) stopped") for line in lines), lines


def test_a_damaged_run_is_listed_and_the_others_too(tmp_path):
    """Whatever is wrong with it, and a loss that is not a number is no damage."""
    save_run(tmp_path / "good")
    changes = {
        "recipe.yaml": [": {", "name: x", "\xff"],
        "environment.json": ["{", "[]", '{"process": 3}'],
        "evaluation/summary.json": ["{", "[1]", "{}", '{"metrics": {"cider_d": 1}}'],
        "metrics.jsonl": ['{"loss": 1}\n'],
    }
    bad = []
    for file, texts in changes.items():
        for text in texts:
            run = save_run(tmp_path / f"bad{len(bad)}")
            (run / file).parent.mkdir(exist_ok=True)
            (run / file).write_bytes(text.encode("latin-1"))
            bad.append((run, file))
    code, lines = invoke(tmp_path)
    assert code == 0
    assert any(line.startswith("good captions 30 of 40 stopped loss 2.0000 ") for line in lines), lines
    for run, _ in bad:
        assert any(line.startswith(f"{run.name} damaged") for line in lines), (run, lines)
    said = [line for line in lines if line.startswith("damaged: ")]
    assert len(said) == len(bad)
    assert all(any(str(run) in line for line in said) for run, _ in bad)
    code, lines = invoke("compare", tmp_path / "good", bad[6][0], "--output", tmp_path / "both.png")
    assert code == 2
    assert "summary.json: cannot be read as JSON" in " ".join(lines)


def test_a_loss_that_is_not_finite_is_no_number(tmp_path):
    run = save_run(tmp_path / "one")
    earlier = '{"stage": "train", "step": 40, "loss": NaN, "eval_loss": Infinity}\n'  # as earlier versions wrote it
    now = '{"stage": "train", "step": 40, "loss": null, "eval_loss": null}\n'
    with (run / "metrics.jsonl").open("a") as file:
        file.write(earlier + now)
    code, lines = invoke(tmp_path)
    assert code == 0
    assert any(line.startswith("one captions 40 of 40 stopped loss 2.0000 ") for line in lines), lines
    code, lines = invoke("compare", run, run, "--output", tmp_path / "both.png")
    assert code == 0
    assert "lowest held-out loss 2.0000 (step 20) 2.0000 (step 20)" in lines


def test_no_runs_is_said(tmp_path):
    code, lines = invoke(tmp_path)
    assert code == 2
    assert "there is no run in" in " ".join(lines)


def test_two_runs_side_by_side(tmp_path):
    first = save_run(tmp_path / "one", scores={"cider_d": 0.6})
    stage = {"name": "train", "trainable": {"projector": 1e-2}, "train": {"max_steps": 40, "warmup_steps": 5}}
    second = save_run(tmp_path / "two", RECIPE | {"stages": [stage]}, losses=(2.9, 1.5), scores={"cider_d": 0.7})
    code, lines = invoke("compare", first, second, "--output", tmp_path / "both.png")
    assert code == 0
    assert "stages.0.trainable.projector 0.001 0.01" in lines
    assert "stages.0.train.warmup_steps 5" in lines
    assert not any(line.startswith(("name", "output_dir", "stages.0.train.max_steps")) for line in lines)
    assert "lowest held-out loss 2.0000 (step 20) 1.5000 (step 20)" in lines
    assert "cider_d 0.600, blind 0.300 0.700, blind 0.350" in lines
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.format == "PNG"


def test_the_same_recipe_is_said(tmp_path):
    first, second = save_run(tmp_path / "one"), save_run(tmp_path / "two")
    _, lines = invoke("compare", first, second, "--output", tmp_path / "both.png")
    assert "the recipes are the same" in lines
    code, lines = invoke("compare", first, tmp_path)
    assert code == 2
    assert "is no run" in " ".join(lines)
