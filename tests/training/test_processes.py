"""Processes that train together, two of them forked from the test. Whole runs are in test_parallel.py."""

import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from tests.stock import STOCK, stock
from tests.tiny import tiny
from tests.training.helpers import LORA, examples, rows_of, trainer_of, weights
from vlm import recipe
from vlm.data.batches import RowSampler
from vlm.data.dataset import TreeCollator
from vlm.errors import UserError
from vlm.training.checkpoints import seal
from vlm.training.parts import add_lora
from vlm.training.processes import GlobalBatch, join_processes, units, what_differs
from vlm.training.throughput import row_counts
from vlm.training.trainer import supervised_loss


def together(function, *args):
    """Run `function` in two processes that can reach each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Forked, since it takes seconds to import what the test has imported.
    torch.multiprocessing.start_processes(_process, (port, function, args), nprocs=2, start_method="fork")


def _process(rank, port, function, args):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    AcceleratorState._reset_state(reset_partial_state=True)
    function(*args)
    dist.destroy_process_group()


# --- the loss of a step


def run(folder, rows_each):
    """Seven examples, four rows a step: the last one has three."""
    made = tiny(fusion="cross_attention")
    torch.manual_seed(0)
    adapted = add_lora(made[0], LORA, {"projector": 1e-2, "fusion": 1e-2, "lora": 1e-2})
    trainer = trainer_of(
        folder,
        {"projector": 1e-2, "fusion": 1e-2, "lora": 1e-2},
        made=(adapted, made[1]),
        data=examples(7),
        eval_data=examples(5),
        per_device_train_batch_size=rows_each,
        per_device_eval_batch_size=1,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    held_out = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, held_out, weights(adapted)


def run_and_keep(folder):
    losses, held_out, found = run(folder, 2)
    if dist.get_rank() == 0:
        torch.save((losses, held_out, found), folder / "kept")


@pytest.mark.cpu
def test_two_processes_have_the_losses_of_one(tmp_path):
    together(run_and_keep, tmp_path)
    losses, held_out, found = torch.load(tmp_path / "kept")
    wanted = run(tmp_path / "one", 4)
    assert losses == pytest.approx(wanted[0], abs=1e-5)
    assert held_out == pytest.approx(wanted[1], abs=1e-5)
    assert max(float((found[name] - wanted[2][name]).abs().max()) for name in found) < 1e-4
    assert GlobalBatch.in_checkpoint(tmp_path / "checkpoint-2") == GlobalBatch(2, 2, 1)


# --- rows


@pytest.mark.parametrize(("processes", "each", "accumulated"), [(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 1, 4), (8, 1, 1)])
def test_a_step_has_the_same_rows_however_they_are_divided(processes, each, accumulated):
    rows = rows_of(tiny()[1], examples(21))
    whole = list(RowSampler(rows, 8))
    order = list(RowSampler(rows, 8, processes * each))
    assert len(order) == len(RowSampler(rows, 8, processes * each))
    assert len(order) % (processes * each) == 0
    assert [row for row in order if row >= 0] == whole
    assert sorted(whole) == list(range(21))
    assert all(row < 0 for row in order[21:])


def test_nothing_is_learned_from_a_blank_row():
    model, processor = tiny()
    rows = rows_of(processor, examples(2))
    batch = TreeCollator(processor)([rows[0], rows[~1]])
    assert not (batch["labels"][1] != -100).any()
    assert (batch["labels"][0] != -100).any()
    assert row_counts([rows[0], rows[~1]])[1].tolist() == [0, 0, 0]
    labels = batch.pop("labels")
    model(**batch, logits_to_keep=torch.zeros_like(labels, dtype=torch.bool)).logits.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


# --- going on with another number of processes


def test_a_checkpoint_of_a_larger_step_is_refused_and_one_of_other_processes_is_not(tmp_path):
    seal(tmp_path, {"batch": vars(GlobalBatch(2, 4, 1))})
    assert what_differs(tmp_path, GlobalBatch(2, 4, 1)) is None
    assert what_differs(tmp_path, GlobalBatch(2, 2, 2)) is None
    assert "on 2 processes, and this run has 4: " in what_differs(tmp_path, GlobalBatch(4, 2, 1))
    with pytest.raises(UserError, match=r"8 rows \(2 processes x 4 x 1 accumulated\).*4 rows \(1 process x 4 x 1"):
        what_differs(tmp_path, GlobalBatch(1, 4, 1))


def test_random_numbers_of_other_processes_are_drawn_anew(tmp_path):
    trainer = trainer_of(tmp_path)
    seal(tmp_path, {"batch": vars(GlobalBatch(2, 1, 1))})
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        trainer._load_rng_state(str(tmp_path))
        draws.append(torch.rand(3))
    assert torch.equal(*draws), "by the seed and the step"
    torch.manual_seed(7)
    assert not torch.equal(torch.rand(3), draws[0])


# --- starting


def recipe_with(**train):
    return recipe.from_dict(
        {
            "model": {"pretrained": "some/model"},
            "data": {"train": {"format": "image_folder", "path": "x", "metadata": "y"}},
            "trainable": {"projector": 1e-3},
            "train": train,
        }
    )


@pytest.mark.parametrize(
    ("variable", "train", "named"),
    [
        ("ACCELERATE_USE_FSDP", {"use_cpu": True}, "FSDP shards"),
        ("ACCELERATE_USE_DEEPSPEED", {"use_cpu": True}, "DeepSpeed shards"),
        (None, {"use_cpu": True, "fsdp": "full_shard"}, "fsdp shards"),
    ],
)
def test_sharding_is_refused_on_a_cpu_where_accelerate_would_not_say_that_it_does_not(
    monkeypatch, variable, train, named
):
    if variable:
        monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=rf"{named} the model over GPUs.*vlm recipes show accelerate/ddp"):
        join_processes(recipe_with(**train))


def join_and_look():
    processes = join_processes(recipe_with(use_cpu=True, ddp_timeout=77))
    assert processes.num_processes == 2
    options = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options
    assert options._timeout.total_seconds() == 77


def test_the_group_has_the_timeout_of_the_recipe():
    together(join_and_look)


# --- sharding


@pytest.mark.parametrize("name", STOCK)
def test_units_of_stock_models_are_there_and_are_their_layers(name):
    model, _ = stock(name)
    named = units(model)
    inside = {type(module).__name__ for module in model.modules()}
    assert set(named) <= inside
    assert [unit for unit in named if unit.endswith("DecoderLayer")] or name == "internvl"


UNITS = {"LlamaDecoderLayer": 4, "FusedDecoderLayer": 2, "CLIPEncoderLayer": 3}


def train_sharded(folder):
    """Four steps with accelerate's own sharding, which is torch's `fully_shard` for each unit."""
    model, processor = tiny(fusion="prefix+cross_attention", cross_attention_every=2)
    model._no_split_modules = units(model)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.cpu_ram_efficient_loading = False
    accelerator = Accelerator(cpu=True)
    given = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=accelerator.is_main_process,
        device=torch.device("cpu"),
    )
    fsdp2_prepare_model(given, model)
    found = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            name = type(module).__name__.removeprefix("FSDP")
            found[name] = found.get(name, 0) + 1
    assert {name: found.get(name) for name in UNITS} == UNITS
    losses = steps(model, processor, accelerator.process_index, 2)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    dcp.save(get_model_state_dict(model), checkpoint_id=folder / "sharded")
    if accelerator.is_main_process:
        torch.save((losses, state), folder / "kept")


def steps(model, processor, process, processes):
    rows = rows_of(processor, examples(8)).rows
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for start in (0, 4, 0, 4):
        batch = rows[start : start + 4]
        count = sum(label != -100 for row in batch for item in row for label in item.tree.labels)
        inputs = TreeCollator(processor)(batch[process::processes])
        labels = inputs.pop("labels")
        keep = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
        loss = supervised_loss(model(**inputs, logits_to_keep=keep, use_cache=False), labels, count) * processes
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach() / processes)
    losses = torch.stack(losses)
    if processes > 1:
        dist.all_reduce(losses)
    return losses


@pytest.mark.cpu
def test_a_sharded_model_trains_as_a_whole_one(tmp_path):
    together(train_sharded, tmp_path)
    losses, state = torch.load(tmp_path / "kept")
    model, processor = tiny(fusion="prefix+cross_attention", cross_attention_every=2)
    assert steps(model, processor, 0, 1).tolist() == pytest.approx(losses.tolist(), abs=1e-5)
    wanted = weights(model)
    assert wanted.keys() == state.keys()
    assert max(float((state[name] - wanted[name]).abs().max()) for name in wanted) < 1e-5
    loaded, _ = tiny(fusion="prefix+cross_attention", cross_attention_every=2, seed=1)
    parts = loaded.state_dict()
    dcp.load(parts, checkpoint_id=tmp_path / "sharded", no_dist=True)
    assert all(torch.equal(parts[name], state[name]) for name in state), "saved in shards, it loads whole"
