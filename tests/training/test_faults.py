"""What ends a run before its time: what is said, and that it goes on from what was saved."""

import json
import os
import shutil
import signal

import pytest
import torch

from tests.training.helpers import TRAIN, Killed, examples, kill_in, lora_trainer, recipe_values, train, trainer_of
from vlm import generation
from vlm.data.dataset import TreeItem
from vlm.errors import UserError
from vlm.training.faults import TrainingError, in_words
from vlm.training.skipped import SkippedSteps
from vlm.training.trainer import VLMTrainer


@pytest.fixture(scope="module")
def stopped(parts, images, tmp_path_factory):
    """A run that died after step 5 of 6, with three checkpoints. Gives its recipe."""
    folder = tmp_path_factory.mktemp("stopped")
    values = recipe_values(parts, images, folder / "run")
    arguments = TRAIN | {"max_steps": 6, "save_steps": 1, "save_total_limit": 3, "eval_strategy": "no"}
    values |= {"train": arguments, "evaluation": {}}
    values["data"]["cache_features"] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_HOME", str(folder / "home"))
        kill_in(patch, "train", 5)
        with pytest.raises(Killed):
            train(values)
    return values


@pytest.fixture
def copy(stopped, tmp_path):
    """A copy of it that a test may spoil."""
    shutil.copytree(stopped["output_dir"], tmp_path / "run")
    return json.loads(json.dumps(stopped)) | {"output_dir": str(tmp_path / "run")}


@pytest.mark.slow
def test_a_broken_checkpoint_is_said_and_the_one_before_is_taken(copy, tmp_path):
    checkpoints = tmp_path / "run/checkpoints/train"
    (checkpoints / "checkpoint-4/optimizer.pt").write_bytes(b"cut off")
    said = train(copy, resume=True)
    assert "checkpoint-4 is broken: optimizer.pt has 7 bytes of" in said
    assert "going on from checkpoint-3" in said
    model, _ = generation.load(str(tmp_path / "run"), device="cpu")
    train(copy | {"output_dir": str(tmp_path / "undisturbed")})
    wanted, _ = generation.load(str(tmp_path / "undisturbed"), device="cpu")
    for (name, p), (_, q) in zip(wanted.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_without_a_whole_checkpoint_nothing_is_trained(copy, tmp_path):
    for checkpoint in (tmp_path / "run/checkpoints/train").iterdir():
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(
        UserError, match=r"no checkpoint in .* is whole: checkpoint-4 is broken.*checkpoint-2 is broken"
    ):
        train(copy, resume=True)


def test_other_data_are_refused(copy, tmp_path):
    copy["data"]["train"]["limit"] = 9
    with pytest.raises(
        UserError, match=r"training data have changed .*: 10 examples with 20 .* now 9 examples with 18"
    ):
        train(copy, resume=True)
    assert not (tmp_path / "run/model").exists()


def test_a_recipe_that_would_make_other_steps_is_refused_before_the_data_are_read(copy, tmp_path):
    before = (tmp_path / "run/recipe.yaml").read_bytes()
    copy["train"]["weight_decay"] = 0.1
    copy["data"]["train"]["path"] = "/nowhere"
    with pytest.raises(UserError, match=r"(?s)weight_decay: None, now 0\.1\nTake these back"):
        train(copy, resume=True)
    assert (tmp_path / "run/recipe.yaml").read_bytes() == before


def test_other_versions_are_said(copy, tmp_path, monkeypatch):
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    environment["packages"]["torch"] = "1.0"
    (tmp_path / "run/environment.json").write_text(json.dumps(environment))
    monkeypatch.setattr("vlm.training.run._run_stages", lambda *args, **kwargs: None)
    assert f"numbers may differ: torch: 1.0, now {torch.__version__[:4]}" in train(copy, resume=True)


# --- while training


@pytest.mark.slow
def test_a_full_disk_at_the_end_keeps_the_checkpoint(copy, tmp_path, monkeypatch):
    def full(model, folder, **kwargs):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vlm.modeling.VLMForConditionalGeneration.save_pretrained", full)
        with pytest.raises(UserError, match=r"the model in .*run could not be saved: the disk is full\. .*--resume"):
            train(copy, resume=True)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.lstrip(".").startswith("model")]
    train(copy, resume=True)
    assert (tmp_path / "run/model/config.json").is_file()


def test_metrics_that_cannot_be_written_stop_nothing(tmp_path, caplog):
    from vlm.training.callbacks import MetricsLog

    trainer = trainer_of(tmp_path, callbacks=[MetricsLog(tmp_path / "no folder" / "metrics.jsonl", "train")])
    trainer.train()
    assert trainer.state.global_step == 3
    assert caplog.text.count("cannot be written") == 1


def test_a_line_of_metrics_that_was_cut_off_is_left_out(tmp_path):
    from vlm.training.history import read_metrics

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_out_of_memory_says_what_to_change(tmp_path, monkeypatch):
    trainer = lora_trainer(tmp_path / "run" / "checkpoints" / "train", max_steps=3)
    step = VLMTrainer.compute_loss

    def out_of_memory(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "compute_loss", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        trainer.train()
    error = in_words(raised.value, trainer, tmp_path / "run" / "checkpoints" / "train")
    assert isinstance(error, TrainingError)
    for words in (
        f"step 3 does not fit into the memory of {trainer.args.device}: a batch of 1 rows",
        f"of {trainer.batch_shape[1]} tokens",
        "train.activation_checkpointing: true",
        "halve train.per_device_train_batch_size",
        "data.max_tokens_per_row",
        "--resume, from",
        "checkpoint-2",
    ):
        assert words in str(error)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:128] DefaultCPUAllocator: can't allocate")]
)
def test_memory_of_the_machine_is_memory_too(tmp_path, error, monkeypatch):
    """Also on a GPU."""
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(type(trainer.args), "device", torch.device("cuda:0"))
    assert "does not fit into the memory of cpu" in str(in_words(error, trainer, tmp_path))
    trainer.control.should_evaluate = True
    assert "lower train.per_device_eval_batch_size, which is 8" in str(in_words(error, trainer, tmp_path))


def test_an_error_that_nobody_knows_stays_what_it_is(tmp_path):
    error = RuntimeError("a mistake in the code")
    assert in_words(error, trainer_of(tmp_path), tmp_path) is error
    assert "--resume" in error.__notes__[0]


@pytest.mark.parametrize("harm", ["killed", "unlinked"])
def test_what_happens_to_a_process_that_reads_data_is_told(copy, tmp_path, monkeypatch, harm):
    """A worker that the system kills, and an image that is gone while the run goes on."""
    original = TreeItem.open_images

    def open_images(item):
        if torch.utils.data.get_worker_info() is None:
            return original(item)
        if harm == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        copied = type(item.example)(("/gone.png",), item.example.branches, "gone", "train.jsonl:3")
        return original(type(item)(item.tree, copied))

    monkeypatch.setattr(TreeItem, "open_images", open_images)
    copy["train"]["dataloader_num_workers"] = 1
    match = {
        "killed": r"data was killed before step 5: .*lower train\.dataloader_num_workers, which is 1\. .*checkpoint-4",
        "unlinked": r"step 5: train\.jsonl:3: /gone\.png: the file does not exist.*--resume, from .*checkpoint-4",
    }
    with pytest.raises(TrainingError, match=f"(?s){match[harm]}"):
        train(copy, resume=True)


# --- steps that are skipped


@pytest.mark.slow
def test_the_examples_of_skipped_steps_are_named(tmp_path):
    """Two batches a step; the second example of step 2 gives a loss that is not a number."""
    skipped = SkippedSteps(tmp_path / "skipped_steps.jsonl", "align")
    trainer = trainer_of(
        tmp_path / "run", data=examples(8), per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    trainer.skipped = skipped
    seen = []
    compute_loss = VLMTrainer.compute_loss

    def spoil(model, inputs, *args, **kwargs):
        seen.append(inputs["labels"])
        loss = compute_loss(trainer, model, inputs, *args, **kwargs)
        return loss * float("nan") if len(seen) == 4 else loss

    trainer.compute_loss = spoil
    batches = [batch["examples"] for batch in trainer.get_train_dataloader()]
    trainer.train()
    (entry,) = [json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert (entry["stage"], entry["step"]) == ("align", 2)
    assert [batch["examples"] for batch in entry["batches"]] == batches[2:4]
    assert batches[3][0].startswith("row ")
    first, second = (batch["loss"] for batch in entry["batches"])
    assert first > 0
    assert second == "nan"
    assert skipped.count == 1


def test_too_many_in_a_row_stop_the_run_which_goes_on_from_a_good_checkpoint(copy, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(VLMTrainer, "max_bad_steps", 2)
        patch.setattr(
            "vlm.training.trainer.supervised_loss", lambda outputs, *args, **kwargs: outputs.logits.sum() * torch.nan
        )
        with pytest.raises(
            TrainingError, match=r"skipped_steps\.jsonl names their examples.*--resume, from .*checkpoint-3"
        ):
            train(copy, resume=True)
    assert len((tmp_path / "run/skipped_steps.jsonl").read_text().splitlines()) == 2
    copy["trainable"]["projector"] /= 10
    said = train(copy, resume=True)
    assert "stages.0.trainable.projector: 0.01, now 0.001" in said
    model, _ = generation.load(str(tmp_path / "run"), device="cpu")
    assert all(p.isfinite().all() for p in model.parameters())
