"""What tells a checkpoint from another of the same name, and the commands that go by it."""

import io
import json
import shutil

import huggingface_hub
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from tests.tiny import image, tiny
from vlm import evaluate, predict
from vlm.errors import UserError
from vlm.fingerprint import fingerprint
from vlm.loading import Placement


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for part in tiny():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def retrain(folder):
    """Change one number of one weight."""
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_it_follows_what_answers_depend_on_and_nothing_else(folder, tmp_path):
    before = fingerprint(str(folder))
    assert len(before) == 16
    (folder / "README.md").write_text("about it")
    (folder / "optimizer.pt").write_bytes(b"0")
    copied = shutil.copytree(folder, tmp_path / "run" / "model")
    assert fingerprint(str(folder)) == fingerprint(str(copied)) == fingerprint(str(copied.parent)) == before
    found = {before}
    for name in ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text + "\n")
        found.add(fingerprint(str(folder)))
        (folder / name).write_text(text)
    retrain(folder)
    found.add(fingerprint(str(folder)))
    assert len(found) == 6


def test_a_hub_name_has_its_commit(monkeypatch, tmp_path):
    path = tmp_path / "models--a--b/snapshots" / ("0123456789abcdef" + "f" * 24) / "config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(path))
    assert fingerprint("a/b") == "0123456789abcdef"


def test_predictions_of_a_model_that_was_trained_again_are_not_continued(folder, tmp_path):
    image(0).save(tmp_path / "a.png")
    options = {"prompt": "what ?", "output": tmp_path / "out.jsonl", "max_new_tokens": 2}

    def run(dtype=None):
        console, placement = Console(file=io.StringIO()), Placement(dtype=dtype)
        return predict.run(str(folder), [str(tmp_path / "a.png")], console=console, placement=placement, **options)

    assert (run().done, run("float32").earlier) == (1, 1)  # the checkpoint is in float32
    with pytest.raises(UserError, match="with dtype 'float32', and this is 'bfloat16'"):
        run("bfloat16")
    retrain(folder)
    with pytest.raises(UserError, match="with other weights of this model"):
        run()
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_an_evaluation_says_that_it_replaces_one_of_other_weights(folder, tmp_path):
    rows = []
    for n in range(2):
        image(n).save(tmp_path / f"{n}.png")
        rows.append(json.dumps({"file_name": f"{n}.png", "caption": "a cat"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))

    def run():
        console = Console(file=io.StringIO(), width=200)
        words = f"format=image_folder path={tmp_path}"
        evaluate.run(
            str(folder),
            words,
            metrics=["rouge_l"],
            output=tmp_path / "e",
            limit=None,
            console=console,
            max_new_tokens=2,
        )
        return json.loads((tmp_path / "e" / "summary.json").read_text())["weights"], console.file.getvalue()

    first = run()
    retrain(folder)
    second = run()
    assert first[0] != second[0] == fingerprint(str(folder))
    said = "the model has changed since the evaluation in"
    assert [said in text for _, text in (first, second)] == [False, True]
