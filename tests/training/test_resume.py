"""Stages one after the other, and runs that stop and go on."""

import json
import os
import shutil
import signal

import pytest
import torch

from tests.tiny import image
from tests.training.helpers import TRAIN, Killed, kill_in, recipe_values, staged, train
from vlm import generation
from vlm.errors import UserError


@pytest.fixture(scope="module")
def two_stages(parts, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_HOME", str(folder.parent / "home"))
        train(staged(recipe_values(parts, images, folder)))
    return folder


def test_stages_chain(two_stages):
    """The second starts where the first ended: only its LoRA and its projector moved since."""
    first, _ = generation.load(str(two_stages / "stages/align"), device="cpu")
    last, _ = generation.load(str(two_stages), device="cpu")
    moved = {
        name
        for (name, p), (_, q) in zip(first.named_parameters(), last.named_parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert any("multi_modal_projector" in name for name in moved)
    assert any("q_proj" in name for name in moved)
    assert not any("vision_tower" in name or "norm" in name or "embed" in name for name in moved)
    assert not (two_stages / "stages/align/adapter").exists()
    assert (two_stages / "adapter/adapter_config.json").is_file()
    entries = [json.loads(line) for line in (two_stages / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(entry["stage"] for entry in entries)) == ["align", "tune"]


@pytest.mark.few(1)
@pytest.mark.parametrize(("stage", "step"), [("align", 3), ("tune", 1), ("tune", 3)])
def test_an_interrupted_run_resumes_to_the_same_weights(two_stages, values, tmp_path, monkeypatch, stage, step):
    with monkeypatch.context() as patch:
        kill_in(patch, stage, step)
        with pytest.raises(Killed):
            train(staged(values))
    with pytest.raises(UserError, match=r"holds a stopped run.*--resume"):
        train(staged(values))
    with pytest.raises(UserError, match="its training did not end"):
        generation.load(str(tmp_path / "run"))
    torch.manual_seed(77)
    train(staged(values), resume=True)
    wanted, _ = generation.load(str(two_stages), device="cpu")
    found, _ = generation.load(str(tmp_path / "run"), device="cpu")
    for (name, p), (_, q) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    logs = [
        [(e["stage"], e["step"], e["loss"]) for e in map(json.loads, path.read_text().splitlines()) if "loss" in e]
        for path in (two_stages / "metrics.jsonl", tmp_path / "run/metrics.jsonl")
    ]
    assert logs[0] == logs[1], "the log is that of the undisturbed run too"


@pytest.mark.slow
def test_a_run_that_froze_no_unread_weights_goes_on_so(values, tmp_path, monkeypatch):
    """Earlier versions left layers after the feature layer in the optimizer, and wrote no hashes."""
    values |= {"trainable": {"projector": 1e-2, "vision": 1e-3}, "lora": None}
    with monkeypatch.context() as patch:
        kill_in(patch, "train", 3)
        patch.setattr("vlm.training.stage.freeze_unread", lambda *args: 0)
        with pytest.raises(Killed):
            train(values)
    for manifest in (tmp_path / "run/checkpoints/train").glob("*/manifest.json"):
        content = json.loads(manifest.read_text())
        del content["sha256"]
        manifest.write_text(json.dumps(content))
    assert "weights frozen" not in train(values, resume=True)
    assert (tmp_path / "run/model/config.json").is_file()


@pytest.mark.slow
def test_a_stage_is_not_started_from_a_model_that_has_changed_on_the_disk(two_stages, values, tmp_path, monkeypatch):
    """Without it, its stage makes it anew from its last checkpoint, and the run ends as the undisturbed one."""
    with monkeypatch.context() as patch:
        kill_in(patch, "tune", 3)
        with pytest.raises(Killed):
            train(staged(values))
    model = tmp_path / "run/stages/align/model"
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-9] ^= 0x10
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"align/model is damaged: the content of model\.safetensors has changed"):
        train(staged(values), resume=True)
    shutil.rmtree(model)
    train(staged(values), resume=True)
    wanted, _ = generation.load(str(two_stages), device="cpu")
    found, _ = generation.load(str(tmp_path / "run"), device="cpu")
    for (name, p), (_, q) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize(
    "augmentation",
    [None, {"random_resized_crop": {"scale": [0.3, 0.6]}}],
    ids=str,
)
@pytest.mark.slow
def test_a_run_resumed_in_a_later_epoch_equals_one_that_was_not_stopped(values, tmp_path, monkeypatch, augmentation):
    """Each epoch has rows of its own and changes images in its own way, and the resumed run must do as its epoch."""
    rows = [{"file_name": f"{n}.png", "captions": ["a cat", "no cat"]} for n in range(10)]  # alike: they change places
    data = tmp_path / "data"
    data.mkdir()
    for n in range(10):
        image(n).save(data / f"{n}.png")
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"format": "image_folder", "path": str(data), "metadata": "train.jsonl"}
    arguments = {key: value for key, value in TRAIN.items() if key != "max_steps"}
    values |= {"train": arguments | {"num_train_epochs": 3, "eval_strategy": "no"}, "evaluation": {}}
    values["data"] = {"train": source, "max_tokens_per_row": 100, "augmentation": augmentation}
    said = train(values | {"output_dir": str(tmp_path / "undisturbed")})
    assert ("features: not kept on disk, since data.augmentation" in said) == bool(augmentation)
    log = (tmp_path / "undisturbed/metrics.jsonl").read_text().splitlines()
    steps = max(json.loads(line)["step"] for line in log)
    assert 9 <= steps < 30, "too few steps for a checkpoint in the middle of the last epoch, or one image a row"
    with monkeypatch.context() as patch:
        kill_in(patch, "train", steps - 1)
        with pytest.raises(Killed):
            train(values)
    train(values, resume=True)
    wanted, found = (generation.load(str(tmp_path / name), device="cpu")[0] for name in ("undisturbed", "run"))
    for (name, p), (_, q) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.slow
def test_a_changed_recipe_is_said_on_resuming(values, monkeypatch):
    with monkeypatch.context() as patch:
        kill_in(patch, "train", 3)
        with pytest.raises(Killed):
            train(values)
    output = train(values | {"evaluation": {}, "train": TRAIN | {"max_steps": 5}}, resume=True)
    assert "stages.0.train.max_steps: 4, now 5" in output


@pytest.mark.slow
def test_a_run_told_to_stop_says_how_to_go_on(values, tmp_path, monkeypatch):
    from vlm.training.callbacks import MetricsLog

    original = MetricsLog.on_log

    def on_log(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "on_log", on_log)
        with pytest.raises(UserError, match=r"stopped after step 2 of 4; go on with --resume"):
            train(values)
    assert not (tmp_path / "run/model").exists()
    train(values, resume=True)
    assert (tmp_path / "run/model/config.json").is_file()
    assert (tmp_path / "run/evaluation/summary.json").is_file()
