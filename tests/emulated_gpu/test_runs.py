"""`vlm train` on the device: the defaults of a recipe, pinned memory and data loader workers included."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import yaml

from tests.emulated_gpu.log import log
from tests.training.conftest import images, parts, values, vlm_home  # noqa: F401 - fixtures
from tests.training.helpers import Killed, kill_in, train


def losses(folder):
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(entry["step"], name, entry[name]) for entry in entries for name in ("loss", "eval_loss") if name in entry]


@pytest.fixture
def recipe(values, tmp_path):  # noqa: F811
    """A recipe by device; LoRA has no dropout, which would differ."""

    def on(device, **changes):
        made = values | {"output_dir": str(tmp_path / device), "lora": values["lora"] | {"lora_dropout": 0.0}}
        made["train"] = {**values["train"], "use_cpu": device == "cpu", **changes}
        return made

    return on


def test_a_run_has_the_losses_of_the_cpu(recipe, tmp_path):
    """Also after it was killed and resumed."""
    train(recipe("cpu"))
    log.clear()
    with pytest.MonkeyPatch.context() as patch:
        kill_in(patch, "train", 3)
        with pytest.raises(Killed):
            train(recipe("cuda", dataloader_num_workers=1))
    said = train(recipe("cuda", dataloader_num_workers=1), resume=True)
    assert "cuda:0" in said
    assert any(kind.startswith("copy to device, pinned") for kind, _ in log.copies), "batches are pinned"
    found, expected = losses(tmp_path / "cuda"), losses(tmp_path / "cpu")
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in expected], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_in_half_precision(recipe, tmp_path, precision):
    """In float16, gradient scaling skips some of the steps, so later losses differ."""
    train(recipe("cpu"))
    train(recipe("cuda", **{"bf16": False, precision: True}))
    found, expected = losses(tmp_path / "cuda"), losses(tmp_path / "cpu")
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert found[0][2] == pytest.approx(expected[0][2], rel=0.01)
    assert all(math.isfinite(entry[2]) for entry in found)


@pytest.mark.slow
def test_a_deterministic_run(recipe, tmp_path):
    train(recipe("cpu"))
    try:
        train(recipe("cuda", full_determinism=True))
    finally:
        torch.use_deterministic_algorithms(False)
    found, expected = losses(tmp_path / "cuda"), losses(tmp_path / "cpu")
    assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in expected], rel=1e-4)


@pytest.mark.slow
def test_a_run_on_a_machine_with_two_gpus(recipe, tmp_path):
    """It uses one of them, and trains on whole batches."""
    train(recipe("cpu"))
    path = tmp_path / "recipe.yaml"
    mine = recipe("cuda")
    mine["train"].pop("use_cpu")
    path.write_text(yaml.safe_dump(mine))
    environment = os.environ | {"EMULATED_GPU_COUNT": "2"}
    words = [sys.executable, "-m", "vlm", "train", str(path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "this run uses 1 of 2 GPUs" in done.stdout
    found, expected = losses(tmp_path / "cuda"), losses(tmp_path / "cpu")
    assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in expected], rel=1e-4)
