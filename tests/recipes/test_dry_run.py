"""The recipes that come with vlm, through the command's own dry run, on small stand-ins of what they name."""

import json
from pathlib import Path

import datasets
import pytest
from typer.testing import CliRunner

from tests.tiny import image
from tests.training.helpers import ANSWERS, save_parts
from vlm.cli import app


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def models(parts):
    return [f"model.vision={parts / 'vision'}", f"model.language={parts / 'language'}"]


SMALL = 'model.adapter.projector={"type": "average_pool", "num_image_tokens": 4}'


def invoke(name, *overrides):
    result = CliRunner().invoke(app, ["train", name, "--dry-run", SMALL, *overrides])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert "this was a dry run" in result.output
    assert not Path("runs").exists()
    return [line.split() for line in result.output.splitlines()]


def on_cpu(stages=1):
    """What only a GPU can do, off."""
    places = ["train"] if stages == 1 else [f"stages.{i}.train" for i in range(stages)]
    return [f"{place}.{key}" for place in places for key in ("bf16=false", "use_cpu=true")]


def save_coco(folder, split, numbers):
    """Parquet files with the columns of the data set that the recipe names."""
    features = datasets.Features(
        {"image": datasets.Image(), "cocoid": datasets.Value("int64"), "sentences_raw": [datasets.Value("string")]}
    )
    rows = {
        "image": [image(n) for n in numbers],
        "cocoid": list(numbers),
        "sentences_raw": [[ANSWERS[(n + k) % 6] for k in range(5)] for n in numbers],
    }
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def test_caption(parts, tmp_path):
    save_coco(tmp_path / "coco_train", "train", range(6))
    save_coco(tmp_path / "coco_validation", "validation", range(6, 9))
    sources = ["data.train.path=coco_train", "data.validation.path=coco_validation"]
    lines = invoke("caption", *models(parts), *sources, *on_cpu(2))
    assert lines.count(["examples", "6"]) == 2
    assert lines.count(["answers", "30"]) == 2


def save_vqa(folder, subset, images_folder, numbers, pattern):
    questions, annotations = [], []
    (folder / images_folder).mkdir(parents=True)
    for n in numbers:
        image(n).save(folder / images_folder / pattern.format(n))
        for k, question in enumerate(("What is it?", "Is it a cat?", "How many?")):
            key = {"image_id": n, "question_id": 10 * n + k}
            questions.append(key | {"question": question})
            answers = [{"answer": ANSWERS[(n + k) % 6], "answer_id": i, "answer_confidence": "yes"} for i in range(10)]
            annotations.append(
                key
                | {"multiple_choice_answer": ANSWERS[(n + k) % 6], "answers": answers}
                | {"question_type": "what", "answer_type": "other"}
            )
    header = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subset}
    return header | {"task_type": "Open-Ended", "questions": questions}, header | {"annotations": annotations}


@pytest.mark.slow
def test_vqa(parts, tmp_path):
    folder = tmp_path / "vqav2"
    for subset, numbers in (("train2014", range(4)), ("val2014", range(4, 7))):
        questions, annotations = save_vqa(folder, subset, subset, numbers, f"COCO_{subset}_{{:012d}}.jpg")
        (folder / f"v2_OpenEnded_mscoco_{subset}_questions.json").write_text(json.dumps(questions))
        (folder / f"v2_mscoco_{subset}_annotations.json").write_text(json.dumps(annotations))
    lines = invoke("vqa", *models(parts), f"data.base_dir={folder}", *on_cpu(2))
    assert lines.count(["examples", "4"]) == 2
    assert lines.count(["answers", "12"]) == 2


def save_home(tmp_path, parts):
    home = tmp_path / "home"
    home.mkdir()
    (home / "clip-vit-base-patch16").symlink_to(parts / "vision")
    (home / "SmolLM2-135M-Instruct").symlink_to(parts / "language")
    return home


def test_quickstart(parts, tmp_path):
    stamps = save_home(tmp_path, parts) / "tuxpaint-stamps"
    stamps.mkdir()
    for name, numbers in (("train", range(5)), ("test", range(5, 8))):
        rows = [{"file_name": f"{n}.png", "caption": ANSWERS[n % 6]} for n in numbers]
        (stamps / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for n in numbers:
            image(n).save(stamps / f"{n}.png")
    lines = invoke("quickstart", *on_cpu())
    assert ["examples", "5"] in lines


def test_easy_vqa(parts, tmp_path):
    folder = save_home(tmp_path, parts) / "easy-vqa"
    for subset, numbers in (("train", range(4)), ("test", range(4, 7))):
        questions, annotations = save_vqa(folder, subset, subset, numbers, "{}.png")
        (folder / f"{subset}_questions.json").write_text(json.dumps(questions))
        (folder / f"{subset}_annotations.json").write_text(json.dumps(annotations))
    lines = invoke("easy_vqa", *on_cpu())
    assert ["answers", "12"] in lines
