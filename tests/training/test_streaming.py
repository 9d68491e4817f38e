"""Whole runs on streams."""

import json
import os
import shutil
import subprocess
import sys
from io import BytesIO

import datasets
import pytest
import torch
import yaml

from tests.tiny import image, tiny
from tests.training.helpers import ANSWERS, TRAIN, Killed, arguments, kill_in, train
from vlm import generation, recipe
from vlm.data import stream
from vlm.data.check import ProblemLog, TooManyProblems
from vlm.errors import UserError
from vlm.recipe import RecipeError
from vlm.training.streams import Stream, mixture_of, stream_layout

ROWS = 60
ARGUMENTS = {key: value for key, value in TRAIN.items() if key not in ("eval_strategy", "eval_steps")} | {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 7,
    "save_steps": 3,
}


def png(number):
    file = BytesIO()
    image(number).save(file, "png")
    return file.getvalue()


def save_parquet(folder, rows=ROWS, broken=()):
    features = datasets.Features({"img": datasets.Image(), "text": datasets.Value("string")})
    columns = {
        "img": [{"bytes": b"not an image" if n in broken else png(n), "path": None} for n in range(rows)],
        "text": [f"{ANSWERS[n % 6]} {n}" for n in range(rows)],
    }
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "a.parquet", batch_size=5)
    return {"format": "dataset", "path": str(folder), "streaming": True, "columns": {"image": "img", "caption": "text"}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_parquet(tmp_path_factory.mktemp("parquet"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 15)


@pytest.fixture
def streamed(values, source):
    data = {"train": source, "max_tokens_per_row": 120, "max_bad": 0}
    return values | {"data": data, "train": ARGUMENTS, "evaluation": {}}


def steps(folder):
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(entry["step"], entry["epoch"], entry["loss"]) for entry in entries if "loss" in entry]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_run_resumes_to_the_same_weights(streamed, source, images, tmp_path, monkeypatch, workers):
    """Two sources by weight, LoRA with dropout, accumulation, augmentation, over several epochs."""
    streamed["train"] = ARGUMENTS | {"dataloader_num_workers": workers}
    streamed["data"] |= {
        "train": [
            source | {"weight": 3},
            {"format": "image_folder", "path": str(images), "metadata": "train.jsonl", "weight": 1},
        ],
        "augmentation": {"random_resized_crop": {"scale": [0.3, 0.6]}},
    }
    train(streamed | {"output_dir": str(tmp_path / "undisturbed")})
    with monkeypatch.context() as patch:
        kill_in(patch, "train", 5)
        with pytest.raises(Killed):
            train(streamed)
    torch.manual_seed(77)
    train(streamed, resume=True)
    wanted, found = (generation.load(str(tmp_path / name), device="cpu")[0] for name in ("undisturbed", "run"))
    for (name, p), (_, q) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert steps(tmp_path / "run") == steps(tmp_path / "undisturbed")


@pytest.mark.slow
def test_two_processes_resume_to_the_same_weights(streamed, tmp_path):
    """With a worker each, beyond the end of an epoch."""
    streamed["train"] = ARGUMENTS | {"dataloader_num_workers": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(streamed))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "vlm",
        "train",
    ]

    def run(*words):
        subprocess.run(
            [*command, str(tmp_path / "recipe.yaml"), *words], check=True, env=os.environ | {"ACCELERATE_USE_CPU": "1"}
        )
        return (tmp_path / "run/model/model.safetensors").read_bytes(), steps(tmp_path / "run")

    wanted = run()
    assert wanted[1][-1][1] > 1, "it did not come to the end of an epoch"
    shutil.rmtree(tmp_path / "run/model")
    for step in (6, 7):
        shutil.rmtree(tmp_path / f"run/checkpoints/train/checkpoint-{step}")
    assert run("--resume") == wanted


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_as_long_as_its_rows(streamed, workers, tmp_path):
    """Going by the first window of 15 rows, within a window or two."""
    loaded = recipe.from_dict(streamed)
    mixture = mixture_of(loaded.data, lambda source: [])
    stream = Stream(mixture, stream_layout(loaded, loaded.stages[0], tiny()[1], None), ProblemLog(0))
    rows = stream.rows(arguments(tmp_path, num_train_epochs=1, max_steps=-1, dataloader_num_workers=workers))
    assert rows.readers == max(1, workers)
    batches = [rows.__getitems__([start, start + 1]) for start in range(0, len(rows), 2)]
    images = sum(len(item.example.images) for batch in batches for row in batch for item in row)
    assert abs(images - ROWS) <= 12


def test_a_dry_run_says_how_much_there_is(streamed, tmp_path):
    epochs = {key: value for key, value in ARGUMENTS.items() if key != "max_steps"} | {"num_train_epochs": 2}
    said = train(streamed | {"train": epochs}, dry_run=True)
    assert f"{ROWS} rows, in 12 pieces" in said
    assert "nothing was trained" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_a_known_number_of_rows_steps_are_needed(streamed, tmp_path):
    folder = tmp_path / "jsonl"
    folder.mkdir()
    for number in range(8):
        image(number).save(folder / f"{number}.png")
    rows = [{"img": f"{n}.png", "text": ANSWERS[n % 6]} for n in range(8)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    streamed["data"] |= {
        "train": {
            "format": "dataset",
            "path": "json",
            "data_files": str(folder / "a.jsonl"),
            "images": str(folder),
            "streaming": True,
            "columns": {"image": "img", "caption": "text"},
        }
    }
    assert "rows not counted, in 1 pieces" in train(streamed, dry_run=True)
    epochs = {key: value for key, value in ARGUMENTS.items() if key != "max_steps"}
    with pytest.raises(UserError, match=r"not known.*set train.max_steps in place of num_train_epochs"):
        train(streamed | {"train": epochs}, dry_run=True)


def test_what_would_lose_the_place_is_refused(streamed):
    for key, value in (("auto_find_batch_size", True), ("dataloader_in_order", False)):
        with pytest.raises(UserError, match=f"train.{key} does not go with data that is streamed"):
            train(streamed | {"train": ARGUMENTS | {key: value}}, dry_run=True)


@pytest.mark.slow
def test_broken_images_are_left_out_named_and_bounded(streamed, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    bad = save_parquet(folder, broken=range(0, ROWS, 4))
    with pytest.raises(TooManyProblems, match=r"a.parquet:row \d*[02468]: .*not an image"):
        train(streamed | {"data": streamed["data"] | {"train": bad}})
    streamed["train"] = ARGUMENTS | {"max_steps": 4}
    said = train(streamed | {"data": streamed["data"] | {"train": bad, "max_bad": 0.5}}, overwrite=True)
    problems = json.loads((tmp_path / "run/data_problems.json").read_text())
    assert f"Skipped {len(problems)} of" in said
    assert len({problem["where"] for problem in problems}) == len(problems) > 1


@pytest.mark.slow
def test_bad_rows_of_streamed_json_are_left_out_named_and_bounded(streamed, images, tmp_path):
    rows = [{"img": f"{n % 4}.png", "text": f"{ANSWERS[n % 6]} {n}"} for n in range(20)]
    rows[5]["text"] = "half of a character \ud83d"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{no json\n")
    source = {"format": "dataset", "path": "json", "data_files": str(tmp_path / "rows.jsonl"), "streaming": True}
    source |= {"images": str(images), "columns": {"image": "img", "caption": "text"}}
    streamed["train"] = ARGUMENTS | {"max_steps": 4}
    with pytest.raises(TooManyProblems, match=r"rows\.jsonl:6: caption: half of a character"):
        train(streamed | {"data": streamed["data"] | {"train": source}})
    train(streamed | {"data": streamed["data"] | {"train": source, "max_bad": 0.5}}, overwrite=True)
    problems = json.loads((tmp_path / "run/data_problems.json").read_text())
    assert [problem["where"].rpartition("rows.jsonl:")[2] for problem in problems] == ["6", "21"]


def test_sources_read_whole_may_be_several_too(values, images, tmp_path):
    whole = {"format": "image_folder", "path": str(images), "metadata": "train.jsonl"}
    held_out = whole | {"metadata": "test.jsonl"}
    said = train(values | {"data": values["data"] | {"train": [whole, held_out]}}, dry_run=True)
    assert "examples       13 " in said
    assert "stream " not in said


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"cache_features": True}, "data.cache_features: does not go with data that is streamed"),
        ({"validation": "same"}, "data.validation.streaming: held-out data is read whole"),
        ({"train": []}, "data.train: must not be empty"),
        ({"train": [3]}, r"data.train.0: must be a section"),
        ({"train": ["same", {"format": "llava", "path": "x", "weight": 2}]}, "give each source a `weight`, or none"),
        ({"train": [{"format": "llava", "path": "x", "weight": 0}]}, "data.train.0.weight: must be more than 0, not 0"),
        ({"train": [{"format": "llava", "pth": "x"}]}, "data.train.0.pth: unknown key; did you mean 'path'"),
        ({"train": {"format": "llava", "path": "x", "weight": 2}}, "data.train.weight: unknown key"),
        ({"train": {"format": "llava", "path": "x", "streaming": True}}, "data.train.streaming: unknown key"),
    ],
    ids=str,
)
def test_what_a_recipe_may_not_say(streamed, source, data, message):
    for key, value in data.items():
        if value == "same":
            data = data | {key: source}
        elif isinstance(value, list):
            data = data | {key: [source if item == "same" else item for item in value]}
    with pytest.raises(RecipeError, match=message):
        recipe.from_dict(streamed | {"data": streamed["data"] | data})
