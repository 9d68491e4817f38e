"""Several processes make one run: each step has the loss that one process has with the same rows a step.

`python -m benchmarks.parallel` makes the table in docs/scaling.md of what is noted here.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.training.helpers import TRAIN, recipe_values, save_images, save_parts, train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROWS = 4
"""An optimizer step has so many. There are 10 in an epoch: the last step has 2, which is less than processes."""
CROSS_ATTENTION = {"model.adapter": {"fusion": "prefix+cross_attention", "cross_attention_every": 2}}
CASES = {
    "projector trained, the rest frozen": {},
    "features not kept": {"data.cache_features": False},
    "answers weigh 1/√n": {"data.answer_weighting": "root_answers"},
    "several trees a row": {"data.max_tokens_per_row": 120},
    "LoRA": {"lora": {"r": 4, "lora_alpha": 8, "learning_rate": 1e-2}},
    "cross-attention, every part trained": {
        **CROSS_ATTENTION,
        "trainable": {"projector": 1e-2, "fusion": 1e-2, "language": 1e-3, "vision": 1e-3},
    },
    "two batches accumulated": {"train.gradient_accumulation_steps": 2},
    "rows without images, every part trained": {
        "data.train.metadata": "mixed.jsonl",
        "data.validation.metadata": "mixed_held_out.jsonl",
        "train.per_device_eval_batch_size": 1,
        "data.cache_features": False,
        "trainable": {"projector": 1e-2, "language": 1e-3, "vision": 1e-3},
    },
    "rows without images, cross-attention": {
        **CROSS_ATTENTION,
        "data.train.metadata": "mixed.jsonl",
        "data.validation.metadata": "mixed_held_out.jsonl",
        "train.per_device_eval_batch_size": 1,
        "trainable": {"projector": 1e-2, "fusion": 1e-2, "language": 1e-3},
    },
    "activation checkpointing, every part trained": {
        "train.activation_checkpointing": True,
        "trainable": {"projector": 1e-2, "language": 1e-3, "vision": 1e-3},
    },
}
SHARDED = [
    "LoRA",
    "cross-attention, every part trained",
    "two batches accumulated",
    "rows without images, every part trained",
    "rows without images, cross-attention",
]
"""Of these also with FSDP2."""


def values_of(case, place, run, processes, **train):
    values = recipe_values(place / "parts", place / "images", place / run)
    values["data"]["train"]["metadata"] = "uneven.jsonl"
    values["data"]["max_tokens_per_row"] = 1
    values["lora"] = None
    values["evaluation"]["metrics"] = ["exact_match", "cider_d"]
    values["train"] = TRAIN | {"max_steps": 7, "save_steps": 4} | train
    changes = copy.deepcopy(CASES[case])
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = values
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    accumulated = values["train"].get("gradient_accumulation_steps", 1)
    if accumulated == 2 and processes == ROWS:
        values["train"]["gradient_accumulation_steps"] = accumulated = 1
    values["train"]["per_device_train_batch_size"] = ROWS // processes // accumulated
    return values


def write(values):
    path = Path(f"{values['output_dir']}.yaml")
    path.write_text(yaml.safe_dump(values))
    return str(path)


def launch(processes, *words, fsdp=False, timeout=500):
    """As torchrun starts them on CPUs."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"ACCELERATE_USE_CPU": "1"} if not fsdp else {
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*torchrun, "-m", "tests.training.parallel_worker", *(["--fsdp"] if fsdp else []), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=timeout,
        check=False,
    )


def file_name(case, name):
    return f"{[*CASES].index(case)}-{name}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where everything is: parts, images with 1 to 4 answers, the same among rows without images, kept features."""
    folder = tmp_path_factory.mktemp("parallel")
    save_parts(folder / "parts")
    images = save_images(folder / "images")
    rows = [json.loads(line) for line in (images / "train.jsonl").read_text().splitlines()]
    uneven = [row | {"captions": ["a cat", "no cat at all", "a dog", "2"][: 1 + n % 4]} for n, row in enumerate(rows)]
    (images / "uneven.jsonl").write_text("".join(json.dumps(row) + "\n" for row in uneven))
    texts = [{"file_names": [], "question": "why " * (1 + n % 5), "answer": "a cat " * (1 + n)} for n in range(10)]
    mixed = [row for pair in zip(rows, texts, strict=True) for row in pair]
    (images / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    held_out = (images / "test.jsonl").read_text() + "".join(json.dumps(row) + "\n" for row in texts[:4])
    (images / "mixed_held_out.jsonl").write_text(held_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_HOME", str(folder / "home"))
        yield folder


def recipes(place, name, processes, cases=CASES, **train):
    return [write(values_of(case, place, file_name(case, name), processes, **train)) for case in cases]


@pytest.fixture(scope="module")
def one(place):
    for path in recipes(place, "one", 1):
        train(yaml.safe_load(Path(path).read_text()))


@pytest.fixture(scope="module")
def two(place, one):
    done = launch(2, *recipes(place, "two", 2))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: ") == len(CASES), "one process speaks"


@pytest.fixture(scope="module")
def four(place, one, two):
    """And, on four processes, the run that two had begun."""
    goes_on = begun(place, "two", "four-resumed", 4)
    done = launch(4, *recipes(place, "four", 4), "--resume", goes_on)
    assert done.returncode == 0, done.stderr
    assert "was saved on 2 processes, and this run has 4" in done.stdout


@pytest.fixture(scope="module")
def fsdp2(place, one):
    done = launch(2, *recipes(place, "fsdp2", 2, SHARDED, use_cpu=False), fsdp=True)
    assert done.returncode == 0, done.stderr


def begun(place, name, anew, processes, **train):
    """A run folder as it was after the checkpoint at step 4, under another name."""
    run = place / file_name("LoRA", anew)
    shutil.copytree(place / file_name("LoRA", name), run)
    for gone in ("model", "adapter", "evaluation", "checkpoints/train/checkpoint-7"):
        shutil.rmtree(run / gone)
    return write(values_of("LoRA", place, run.name, processes, **train))


def logged(run, key):
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "train_loss" not in entry]  # of this process's steps, not of all
    return torch.tensor([entry[key] for entry in entries if key in entry], dtype=torch.float64)


def tokens_an_answer(run):
    """What is counted of a step does not depend on how long it took."""
    return logged(run, "tokens_per_second") / logged(run, "answers_per_second")


def apart(place, case, name):
    """The largest differences from one process: of the loss of a step, of the held-out loss, of a weight."""
    wanted, found = place / file_name(case, "one"), place / file_name(case, name)
    losses = [(logged(found, key) - logged(wanted, key)).abs().max().item() for key in ("loss", "eval_loss")]
    before, after = (load_file(run / "model/model.safetensors") for run in (wanted, found))
    assert before.keys() == after.keys()
    return [*losses, max((after[key] - before[key]).abs().max().item() for key in before)]


def same_scores(place, case, name):
    folders = [place / file_name(case, which) / "evaluation" for which in ("one", name)]
    rows = [(folder / "predictions.jsonl").read_text() for folder in folders]
    assert len(rows[0].splitlines()) >= 3
    return rows[0] == rows[1] and len({(folder / "summary.json").read_text() for folder in folders}) == 1


def check(place, case, name, processes, record_property):
    step, held_out, weight = apart(place, case, name)
    record_property("parallel", (case, processes, step, held_out, weight))
    assert step < 1e-5
    assert held_out < 1e-5
    assert weight < 1e-4
    assert same_scores(place, case, name)
    counted = [tokens_an_answer(place / file_name(case, which)) for which in ("one", name)]
    assert len(set(counted[0].tolist())) > 1
    torch.testing.assert_close(*counted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_two_processes(place, two, case, record_property):
    check(place, case, "two", "2, DDP", record_property)


@pytest.mark.parametrize("case", CASES)
def test_four_processes(place, four, case, record_property):
    check(place, case, "four", "4, DDP", record_property)


@pytest.mark.parametrize("case", SHARDED)
def test_two_processes_that_share_the_model(place, fsdp2, case, record_property):
    check(place, case, "fsdp2", "2, FSDP2", record_property)


def test_what_two_processes_began_one_ends(place, two, record_property):
    """And without dropout it is as if it had not been stopped: no example is lost, and none comes twice."""
    path = begun(place, "two", "one-resumed", 1)
    said = train(yaml.safe_load(Path(path).read_text()), resume=True)
    assert "was saved on 2 processes, and this run has 1" in said
    check(place, "LoRA", "one-resumed", "2, then 1, DDP", record_property)


def test_what_two_processes_began_four_end(place, four, record_property):
    check(place, "LoRA", "four-resumed", "2, then 4, DDP", record_property)


def test_what_two_processes_sharded_four_end(place, fsdp2, record_property):
    done = launch(4, "--resume", begun(place, "fsdp2", "four-shards", 4, use_cpu=False), fsdp=True)
    assert done.returncode == 0, done.stderr
    check(place, "LoRA", "four-shards", "2, then 4, FSDP2", record_property)


@pytest.mark.parametrize("how", ["hang", "die"])
def test_who_waits_in_vain_fails(place, how):
    """Within `ddp_timeout`, which transformers drops on CPUs: it would be half an hour."""
    path = write(values_of("LoRA", place, how, 2, ddp_timeout=20))
    done = launch(2, "--at-step-2", how, path, timeout=200)
    assert done.returncode != 0
    assert len(logged(place / how, "loss")) >= 1
    assert not (place / how / "model").exists()
    assert ("Timed out waiting 20000ms" in done.stderr) == (how == "hang"), done.stderr
