"""The quickstart from end to end: real recipes, real steps, on tiny models and images that are there already."""

import json
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModel, AutoModelForCausalLM

from tests import tiny
from vlm import quickstart, tour
from vlm.quickstart.sources import Package, SourceError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder as `prepare` leaves it, with tiny models; nothing can be fetched into it."""
    folder = tmp_path / "home"
    monkeypatch.setenv("VLM_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "prepare", partial(quickstart.prepare, fetch=refuse))
    AutoModel.from_config(tiny.clip_config()).save_pretrained(folder / quickstart.CLIP)
    tiny.image_processor().save_pretrained(folder / quickstart.CLIP)
    AutoModelForCausalLM.from_config(tiny.text_config()).save_pretrained(folder / quickstart.SMOLLM2)
    tiny.byte_level_tokenizer().save_pretrained(folder / quickstart.SMOLLM2)
    return folder


def refuse(package: Package, folder: Path) -> Path:
    raise SourceError(f"{package.name} cannot be had")


def stamps(home: Path) -> None:
    folder = home / quickstart.STAMPS
    folder.mkdir()
    for part, numbers in (("train", range(6)), ("test", range(6, 9))):
        rows = [{"file_name": f"{n}.png", "captions": ["a cat", "a dog"]} for n in numbers]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for n in numbers:
            tiny.image(n).save(folder / f"{n}.png")


def easy_vqa(home: Path) -> None:
    folder = home / quickstart.EASY_VQA
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        keys = [{"question_id": n, "image_id": n} for n in range(4)]
        questions = [key | {"question": "what is in the image ?"} for key in keys]
        annotations = [key | {"multiple_choice_answer": "a cat", "answers": [{"answer": "a cat"}]} for key in keys]
        (folder / f"{part}_questions.json").write_text(json.dumps({"questions": questions}))
        (folder / f"{part}_annotations.json").write_text(json.dumps({"annotations": annotations}))
        for n in range(4):
            tiny.image(n).save(folder / part / f"{n}.png")


def run() -> tuple[Path, str]:
    console = Console(file=StringIO(), width=200)
    return tour.run(console=console), console.file.getvalue()


def test_it_trains_scores_and_asks(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stamps(home)
    folder, said = run()

    printed = capsys.readouterr()
    assert "easy-vqa: left out. easy-vqa cannot be had" in printed.out
    assert "Loading weights" not in printed.err
    assert folder == Path("runs/quickstart")
    assert (folder / "model" / "config.json").is_file()
    scores = json.loads((folder / "evaluation" / "summary.json").read_text())["metrics"]
    assert f"{scores['rouge_l']['score']:.3f}" in said
    assert "asked:   Describe the image." in said
    assert "vlm chat runs/quickstart" in said

    model = (folder / "model" / "model.safetensors").stat()
    again, said = run()
    assert again == folder
    assert "done already" in said
    assert (folder / "model" / "model.safetensors").stat() == model


@pytest.mark.slow
def test_without_the_stamps_easy_vqa_takes_their_place(home: Path) -> None:
    easy_vqa(home)
    folder, said = run()

    assert folder == Path("runs/easy_vqa")
    assert "asked:   what is in the image ?" in said
    assert "correct: a cat" in said


def test_without_any_images_it_says_so(home: Path) -> None:
    with pytest.raises(SourceError, match="easy-vqa cannot be had"):
        run()
