"""One prompt over a model's learned positions is one bad row, for every command that answers."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from tests.tiny import text_config, tiny
from vlm import chat, classify, evaluate, predict

TILES = {"type": "tiles", "max_tiles": 6}
PROMPT = "what ?"
SMALL, LARGE = ("0.png", "2.png", "3.png"), "1.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A GPT-2 of few positions whose images take 16 tokens each tile, three small images and a large one."""
    folder = tmp_path_factory.mktemp("long")
    for part in tiny("gpt2", text=text_config("gpt2", max_position_embeddings=120), tiling=TILES):
        part.save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    for name in (*SMALL, LARGE):
        Image.new("RGB", (96, 64) if name == LARGE else (32, 32), "red").save(folder / "photos" / name)
    rows = [json.dumps({"file_name": name, "caption": "a cat"}) for name in (*SMALL, LARGE)]
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_predict_writes_an_error_for_it(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    options = {"prompt": PROMPT, "output": output, "max_new_tokens": 2, "console": console()}
    counts = predict.run(str(folder / "model"), [str(folder / "photos")], **options)
    assert (counts.done, counts.broken) == (3, 1)
    rows = {Path(row["image"]).name: row for row in map(json.loads, output.read_text().splitlines())}
    assert "and the model has 120 positions" in rows[LARGE]["error"]
    assert all("prediction" in rows[name] for name in SMALL)


def test_eval_leaves_it_out_sighted_and_blind(folder, tmp_path):
    data = f"format=image_folder path={folder / 'photos'} prompt='{PROMPT}'"
    options = {"metrics": ["rouge_l"], "output": tmp_path / "e", "limit": None, "max_new_tokens": 2}
    summary = evaluate.run(str(folder / "model"), data, console=console(), **options)
    assert summary["n_broken"] == 2, "its own, and the one that would be shown it blind"
    assert summary["n_items"] == 2
    assert all("and the model has 120 positions" in row["why"] for row in summary["broken_images"])


def test_classify_leaves_it_out(folder):
    said = console()
    classify.run(str(folder / "model"), [str(folder / "photos")], labels="cat,dog", prompt=PROMPT, console=said)
    text = said.file.getvalue()
    assert text.count("left out: ") == 1
    assert f"{LARGE}: label 'cat': image, prompt and label have" in text
    assert all(f"{name}: " in text for name in SMALL)


def test_chat_says_so_and_goes_on(folder, monkeypatch):
    said, photos = console(), folder / "photos"
    lines = [f"/image {photos / LARGE}", PROMPT, "x " * 200, f"/image {photos / SMALL[0]}", "cat ?"]
    answered = []
    real = chat._answer

    def answer(conversation, question, stream, console):
        real(conversation, question, stream, console)
        answered.append(question)

    monkeypatch.setattr(chat, "_answer", answer)
    monkeypatch.setattr(chat, "_typed", lambda console: iter(lines[:3]))
    chat.run(str(folder / "model"), image=None, question=None, console=said, max_new_tokens=2)
    assert answered == []
    monkeypatch.setattr(chat, "_typed", lambda console: iter(lines[2:]))
    chat.run(str(folder / "model"), image=None, question=None, console=said, max_new_tokens=2)
    assert said.file.getvalue().count("and the model has 120 positions; ask something shorter") == 3
    assert answered == ["cat ?"]
