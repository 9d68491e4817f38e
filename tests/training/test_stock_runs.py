"""Every family of stock models through the commands: train on captions and on questions, eval, chat, predict."""

import io
import json

import pytest
from rich.console import Console

from tests.stock import STOCK, stock
from tests.stock_prompted import PROMPTED
from tests.tiny import image
from tests.training.helpers import TRAIN, train
from vlm import chat, evaluate, generation, predict

QUESTIONS = [("what is it ?", "a cat"), ("is it a dog ?", "no"), ("how many ?", "2")]


def save_images(folder):
    """Four images with two captions and three questions each; the captions differ by image."""
    folder.mkdir()
    rows = {"captions": [], "questions": []}
    for n in range(4):
        name = f"{n}.png"
        image(n, [(40, 36), (64, 24)][n % 2]).save(folder / name)
        captions = [f"a cat on the street {n}", f"the dog {n}"]
        rows["captions"].append({"file_name": name, "captions": captions})
        asked = [{"question": question, "answer": answer} for question, answer in QUESTIONS]
        rows["questions"].append({"file_name": name, "qa": asked})
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captions", "questions"])
@pytest.mark.parametrize("name", [*STOCK, *PROMPTED])
def test_a_stock_model_through_every_command(name, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    start, images, run = tmp_path / "start", save_images(tmp_path / "images"), tmp_path / "run"
    for part in stock(name):
        part.save_pretrained(start)
    source = {"format": "image_folder", "path": str(images), "metadata": f"{kind}.jsonl"}
    metrics = {"captions": ["cider_d", "rouge_l"], "questions": ["vqa_accuracy", "exact_match"]}[kind]
    lora = {"r": 4, "lora_alpha": 8, "learning_rate": 2.0e-2}
    said = train(
        {
            "name": name,
            "model": {"pretrained": str(start)},
            "data": {"train": source, "validation": source, "max_tokens_per_row": 200},
            **({"trainable": {"language": 1.0e-2}} if kind == "captions" else {"lora": lora}),
            "train": TRAIN | {"max_steps": 12, "save_strategy": "no", "eval_steps": 12},
            "evaluation": {"metrics": metrics, "max_new_tokens": 8},
            "output_dir": str(run),
        }
    )
    assert f"done: {run}" in said
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3]), losses
    before, after = (dict(generation.load(str(path), device="cpu")[0].named_parameters()) for path in (start, run))
    moved = {key for key, parameter in before.items() if not parameter.equal(after[key].to(parameter.dtype))}
    assert moved
    assert not [key for key in moved if "vision" in key or "visual.blocks" in key or "image_encoder" in key]

    console = Console(file=io.StringIO(), width=200)
    data = " ".join(f"{key}={value}" for key, value in source.items())
    summary = evaluate.run(
        str(run), data, metrics=metrics, output=tmp_path / "scores", limit=2, console=console, max_new_tokens=8
    )
    assert set(summary["metrics"]) == set(metrics)
    assert summary["blind_missing"] is None

    asked, picture = {"captions": "Describe the image.", "questions": "how many ?"}[kind], str(images / "0.png")
    answer = Console(file=io.StringIO(), width=200)
    chat.run(str(run), image=picture, question=asked, console=answer, max_new_tokens=8)
    counts = predict.run(
        str(run), [picture], prompt=asked, output=tmp_path / "out.jsonl", console=console, max_new_tokens=8
    )
    assert counts.done == 1
    predicted = json.loads((tmp_path / "out.jsonl").read_text())["prediction"]
    assert answer.file.getvalue().strip() == predicted.strip()
