"""Whether a stage keeps the encoder's features: what was timed, what there is room for, and what comes of it."""

import itertools
import json
import os
import subprocess
import sys
from collections import namedtuple
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors import safe_open

from tests.tiny import image, tiny
from tests.training.helpers import arguments, examples, recipe_values, save_images, save_parts
from vlm import recipe
from vlm.data.check import ProblemLog
from vlm.data.encoding import EncodedBatch
from vlm.data.example import Example, question_and_answer
from vlm.data.features import FeatureCache
from vlm.errors import UserError
from vlm.training import features as keeping
from vlm.training import run as running
from vlm.training.callbacks import StopOnSignal
from vlm.training.features import choose, kept_features

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class SlowToRead(FeatureCache):
    clock, seconds = Clock(), 0.0

    def __getitem__(self, sha):
        self.clock.now += self.seconds
        return super().__getitem__(sha)


def encoded(clock, batches=5, seconds=(100.0, 1.0, 1.0, 1.0, 1.0), size=10):
    """Batches of 10 images that take so long each; the first one, far longer, is a warm-up."""
    for number, took in zip(range(batches), seconds, strict=False):
        clock.now += took
        names = [f"{number}-{i}" for i in range(size)]
        yield EncodedBatch(names, torch.full((size, 250, 100), float(number)), (25, 10))  # 100,000 bytes an image


def choice(folder, *, reading, mode="auto", max_cache_size=50, count=1000, **batches):
    """Encoding at 10 images a second against `reading` seconds an image."""
    cache = SlowToRead(folder / "features" / "key")
    cache.clock = clock = Clock()
    cache.seconds = reading
    return choose(
        cache,
        encoded(clock, **batches),
        count,
        mode=mode,
        max_cache_size=max_cache_size,
        device=CPU,
        clock=clock,
    )


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --- the choice


def test_what_is_read_faster_is_kept(tmp_path):
    made = choice(tmp_path, reading=0.01)
    assert made.keep
    assert made.why.startswith("kept on disk (reading 100 images a second, encoding 10): 1,000 images take 0.10 GB of ")
    assert "free" in made.why
    [shard] = files(tmp_path)
    assert len(FeatureCache(shard.parent)._rows) == 50, "what was timed is kept, the first batch too"


def test_what_is_encoded_faster_is_not_kept(tmp_path):
    made = choice(tmp_path, reading=0.2)
    assert not made.keep
    assert made.why.startswith("not kept on disk, encoded in every step (reading 5 images a second, encoding 10): ")
    assert not files(tmp_path)


def test_true_keeps_what_is_encoded_faster(tmp_path):
    made = choice(tmp_path, reading=0.2, mode=True)
    assert made.keep
    assert "reading 5 images a second, encoding 10" in made.why
    assert files(tmp_path)


def test_a_single_batch_is_kept_without_timing(tmp_path):
    made = choice(tmp_path, reading=100, batches=1, count=10)
    assert made.keep
    assert "too few to time: 10 images take 0.00 GB" in made.why
    assert files(tmp_path)


def test_images_that_do_not_open_are_no_reason(tmp_path):
    assert choice(tmp_path, reading=100, batches=0).keep


# --- room


@pytest.mark.parametrize("mode", ["auto", True])
@pytest.mark.parametrize(("limit", "fits"), [(0.1001, True), (0.0999, False)])
def test_the_size_is_limited(tmp_path, mode, limit, fits):
    """1,000 images of 100,000 bytes are 0.1 GB."""
    if fits:
        assert choice(tmp_path, reading=0.01, mode=mode, max_cache_size=limit).keep
    elif mode is True:
        with pytest.raises(UserError, match=r"1,000 images take 0\.10 GB.*data\.max_cache_size.*Raise it"):
            choice(tmp_path, reading=0.01, mode=mode, max_cache_size=limit)
    else:
        made = choice(tmp_path, reading=0.01, mode=mode, max_cache_size=limit)
        assert not made.keep
        assert "data.max_cache_size" in made.why
    assert bool(files(tmp_path)) == fits


def test_the_limit_counts_what_is_there_of_other_encoders(tmp_path):
    other = tmp_path / "features" / "other"
    other.mkdir(parents=True)
    (other / "0.npy").write_bytes(bytes(2_000_000))
    assert choice(tmp_path, reading=0.01, max_cache_size=0.103).keep
    (other / "1.npy").write_bytes(bytes(2_000_000))
    made = choice(tmp_path, reading=0.01, max_cache_size=0.103)
    assert not made.keep
    assert "that" in made.why


@pytest.mark.parametrize(("free", "fits"), [(111_200_000, True), (111_000_000, False)])
def test_a_tenth_of_the_free_disk_stays_free(tmp_path, monkeypatch, free, fits):
    usage = namedtuple("usage", "total used free")(10**12, 0, free)
    monkeypatch.setattr(keeping.shutil, "disk_usage", lambda path: usage)
    made = choice(tmp_path, reading=0.01)
    assert made.keep == fits
    if not fits:
        assert "more than 90% of the 0.11 GB that are free" in made.why
        with pytest.raises(UserError, match="Make room"):
            choice(tmp_path, reading=0.01, mode=True)


def test_features_that_half_precision_cannot_hold_are_not_kept(tmp_path):
    batches = [EncodedBatch(["a"], torch.full((1, 1, 1), 1e6).bfloat16(), (1, 1))]
    options = {"max_cache_size": 50, "device": CPU}
    made = choose(FeatureCache(tmp_path / "key"), iter(batches), 1, mode="auto", **options)
    assert not made.keep
    assert "do not fit into float16" in made.why
    with pytest.raises(UserError, match="do not fit into float16"):
        choose(FeatureCache(tmp_path / "key"), iter(batches), 1, mode=True, **options)


# --- the features of a stage


@pytest.fixture(autouse=True)
def vlm_home(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


def a_recipe(**data):
    source = {"format": "image_folder", "path": "photos"}
    return recipe.from_dict(
        {"model": {"vision": "me/eyes", "language": "me/words"}, "data": {"train": source, **data}}
        | {"trainable": {"projector": 1e-3}}
    )


def kept(made, groups, tmp_path, log=None, data=None, **args):
    console = Console(file=StringIO(), width=200)
    args = {"bf16": False, **args}
    given = (
        a_recipe(**(data or {})),
        groups,
        *made,
        arguments(tmp_path / "run", **args),
        log or ProblemLog(99),
        console,
        StopOnSignal(),
    )
    cache, keys = kept_features(*given)
    return cache, keys, console.file.getvalue()


def test_features_of_a_stage(tmp_path, vlm_home):
    model, processor = made = tiny()
    groups = (examples(20), examples(3))
    cache, keys, said = kept(made, groups, tmp_path)
    assert "0 of 20 images found on disk; kept on disk" in said
    assert [sorted(group) for group in keys] == [list(range(20)), [0, 1, 2]]
    with torch.no_grad():
        pixels = processor.image_processor([image(n) for n in range(20)], return_tensors="pt")["pixel_values"]
        wanted, _ = model.cpu().get_vision_features(pixels)
    assert all(torch.allclose(cache[keys[0][n][0]], wanted[n], atol=1e-5) for n in range(20))
    assert keys[1][2] == keys[0][2]


def test_what_is_found_is_said_and_not_encoded_again(tmp_path, monkeypatch):
    made = tiny()
    kept(made, (examples(20),), tmp_path)
    _, _, said = kept(made, (examples(21),), tmp_path)
    assert "20 of 21 images found on disk; kept on disk" in said
    monkeypatch.setattr(made[0], "get_vision_features", None)
    cache, keys, said = kept(made, (examples(21),), tmp_path)
    assert said == "features: 21 of 21 images found on disk; none to encode\n"
    assert all(keys[0][n][0] in cache for n in range(21))


def test_a_damaged_file_is_said_and_its_images_encoded_again(tmp_path, vlm_home):
    made = tiny()
    kept(made, (examples(3),), tmp_path)
    [shard] = vlm_home.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    cache, keys, said = kept(made, (examples(3),), tmp_path)
    assert said.startswith(f"features: 1 damaged files in {shard.parent} were removed ({shard.name}); 0 of 3")
    assert not shard.exists()
    assert keys[0][2][0] in cache


def test_a_changed_bit_is_said_and_its_images_encoded_again(tmp_path, vlm_home):
    made = tiny()
    cache, keys, _ = kept(made, (examples(3),), tmp_path)
    wanted = [cache[keys[0][n][0]].clone() for n in range(3)]
    [shard] = vlm_home.rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    cache, keys, said = kept(made, (examples(3),), tmp_path)
    assert said.startswith(
        f"features: 1 damaged files in {shard.parent} were removed ({shard.name}); 0 of 3 images found"
    )
    assert all(torch.equal(cache[keys[0][n][0]], wanted[n]) for n in range(3))


def test_files_of_an_earlier_version_are_said_and_their_images_encoded_again(tmp_path, vlm_home):
    made = tiny()
    kept(made, (examples(3),), tmp_path)
    [shard] = vlm_home.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes().replace(b'"sha256"', b'"sha000"'))
    cache, keys, said = kept(made, (examples(3),), tmp_path)
    assert said.startswith(
        "features: 1 files of an earlier version, without checksums, were removed; 0 of 3 images found"
    )
    assert keys[0][2][0] in cache
    assert not shard.exists()


def test_nothing_is_kept_where_that_is_no_faster(tmp_path, monkeypatch, vlm_home):
    monkeypatch.setattr(keeping, "_rate", lambda *_, rates=itertools.count(): -next(rates))  # reading is the second
    made = tiny()
    cache, keys, said = kept(made, (examples(40), []), tmp_path)
    assert (cache, keys) == (None, [None, None])
    assert "not kept on disk" in said
    assert not files(vlm_home)
    assert kept(made, (examples(40), []), tmp_path, data={"cache_features": True})[0] is not None


@pytest.mark.parametrize(
    "other",
    [
        {"dataloader_num_workers": 1, "bf16": True},
        {"layer": -2},
        {"layer": [-1, -2]},
        {"strategy": "full"},
        {"size": 40},
        {"weight": 1e-3},
        {"fp16": True},
    ],
    ids=str,
)
def test_other_features_are_never_found(tmp_path, monkeypatch, other):
    if "fp16" in other:
        monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    made = tiny()
    kept(made, (examples(2),), tmp_path)
    model, processor = tiny()
    model.config.vision_feature_layer = other.pop("layer", None)
    model.config.vision_feature_select_strategy = other.pop("strategy", "default")
    if "size" in other:
        processor.image_processor.size = {"shortest_edge": other.pop("size")}
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).flatten()[0] += other.pop("weight", 0)
    assert "0 of 2 images found" in kept((model, processor), (examples(2),), tmp_path, **other)[2]


def test_every_row_of_a_broken_image_is_reported(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")

    def example(number, *sources):
        branch = question_and_answer("what", "a cat", num_images=len(sources))
        return Example(sources, (branch,), str(number), f"row {number}")

    rows = [
        example(0, image(0)),
        example(1, str(bad)),
        example(2, image(0), str(bad)),
        example(3),
        example(4, image(1)),
    ]
    log = ProblemLog(99, 1.0)
    _, keys, _ = kept(tiny(), (rows,), tmp_path, log)
    assert {index: len(names) for index, names in keys[0].items()} == {0: 1, 3: 0, 4: 1}
    assert sorted(problem.where.split(":")[0] for problem in log.problems) == ["row 1", "row 2"]
    assert all("bad.png" in str(problem) for problem in log.problems)


def test_what_is_kept_is_described(tmp_path, vlm_home):
    kept(tiny(), (examples(2),), tmp_path)
    [about] = vlm_home.rglob("about.json")
    assert json.loads(about.read_text()) == {
        "encoder": "me/eyes",
        "image_size": "32x32",
        "layer": "last",
        "precision": "float32",
    }


# --- whole runs


@pytest.mark.slow
def test_a_run_without_kept_features_is_that_on_pixels(parts, tmp_path, monkeypatch):
    images = save_images(tmp_path / "images")
    losses = []
    for run, mode in (("auto", "auto"), ("false", False)):
        values = recipe_values(parts, images, tmp_path / run) | {"evaluation": {}}
        values["data"] |= {"cache_features": mode, "max_cache_size": 1e-9}
        console = Console(file=StringIO(), width=200)
        running.train(recipe.from_dict(values), console=console)
        assert ("more than data.max_cache_size" in console.file.getvalue()) == (mode == "auto")
        entries = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        losses.append([entry["loss"] for entry in entries if "loss" in entry])
    assert losses[0] == losses[1]
    values["data"]["cache_features"] = True
    with pytest.raises(UserError, match=r"data\.cache_features is true"):
        running.train(recipe.from_dict(values), overwrite=True, console=console)


TWO_PROCESSES = """
import os, sys
from vlm.training import features
timed = features.choose

def choose(*args, **options):
    assert os.environ["RANK"] == "0", "the first process chooses for all"
    choice = timed(*args, **options)
    choice.keep = {keep}
    return choice

features.choose = choose
sys.argv = ["vlm", "train", {recipe!r}]
from vlm.cli import app
app()
"""


@pytest.mark.slow
@pytest.mark.parametrize("keep", [True, False])
def test_two_processes_choose_alike_and_encode_once(parts, tmp_path, vlm_home, monkeypatch, keep):
    values = recipe_values(parts, save_images(tmp_path / "images", broken=1), tmp_path / "run") | {"evaluation": {}}
    values["train"] |= {"ddp_backend": "gloo"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    # One batch of two images is timed; the rest is shared.
    script = "import vlm.training.features as f\nf.TIMED_BATCHES, f.images_per_batch = 0, lambda processor: 2\n"
    (tmp_path / "train.py").write_text(script + TWO_PROCESSES.format(keep=keep, recipe=str(tmp_path / "mine.yaml")))
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(tmp_path / "train.py")],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    names = []
    for path in vlm_home.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            names.append(json.loads(shard.metadata()["images"]))
    together = [name for shard in names for name in shard]
    assert len(together) == len(set(together)) == (12 if keep else 1)
    assert len(names) == (3 if keep else 1), "what the first process timed, and a share of each"
    assert len(json.loads((tmp_path / "run/data_problems.json").read_text())) == 1
