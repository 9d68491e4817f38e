"""Whole runs with tiling, on images of several sizes: several in a turn, few-shot prompts, and text alone."""

import json

import pytest
from PIL import Image

from tests.tiny import image
from tests.training.helpers import recipe_values, train
from vlm import generation
from vlm.errors import UserError
from vlm.session import Session

SIZES = [(20, 30), (70, 30), (80, 64), (30, 100), (64, 64)]
IMAGE = {"type": "image"}


def said(role, *parts):
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


SHOTS = [
    said("user", IMAGE, "what ?"), said("assistant", "a cat"),
    said("user", "and", IMAGE, "what ?"), said("assistant", "a dog"),
]  # fmt: skip
TEXT = {"file_names": [], "messages": [said("user", "what is a cat ?"), said("assistant", "it is on the street")]}


def save(folder):
    folder.mkdir()
    for n in range(10):
        image(n, SIZES[n % 5]).save(folder / f"{n}.png")
    qa = [{"question": "what ?", "answer": "a cat"}, {"question": "where is it ?", "answer": "on the street"}]
    one = [{"file_name": f"{n}.png", "qa": qa} for n in range(10)]
    two = [{"file_names": ["0.png", "2.png"], "question": "what are they ?", "answer": "a cat and a dog"}]
    few = [{"file_names": [f"{n}.png", f"{n + 1}.png"], "messages": SHOTS} for n in range(3)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*one[:6], *two, *few, TEXT]))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one[6:] + few))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return save(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def values(parts, pictures, tmp_path):
    made = recipe_values(parts, pictures, tmp_path / "run")
    made["data"]["max_tokens_per_row"] = 400
    return made


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("kind", "adapter", "kept"),
    [
        ("tiles", {}, True),
        ("idefics3", {}, False),
        ("anyres", {"projector": {"type": "average_pool", "num_image_tokens": 4}}, True),
        ("tiles", {"fusion": "cross_attention", "cross_attention_every": 2}, True),
        ("internvl", {"fusion": "cross_attention", "cross_attention_layers": [1, 3]}, False),
    ],
)
def test_a_run(values, tmp_path, kind, adapter, kept):
    values["model"] |= {"adapter": adapter, "tiling": {"type": kind, "max_tiles": 4}}
    values["data"]["cache_features"] = kept
    if "fusion" in adapter:
        values["trainable"] = {"projector": 1e-2, "fusion": 1e-2}
    output = train(values)
    assert "no trees" not in output
    assert "left out" not in output
    summary = json.loads((tmp_path / "run/evaluation/summary.json").read_text())
    assert summary["n_items"] == 11
    assert summary["blind_missing"] is None, "images of other sizes stand in, and two for two"
    rows = [json.loads(line) for line in (tmp_path / "run/evaluation/predictions.jsonl").read_text().splitlines()]
    model, processor = generation.load(str(tmp_path / "run"), device="cpu")
    assert model.config.tiling["max_tiles"] == 4
    picture = Image.open(values["data"]["train"]["path"] + "/8.png").convert("RGB")
    asked = [picture], [said("user", IMAGE, "what ?")]
    [row] = [row for row in rows if row["image_id"] == "8.png" and row["prompt"] == "what ?"]
    assert generation.generate(model, processor, [asked], max_new_tokens=4) == [row["prediction"]]
    assert "".join(Session(model, processor).stream(asked, max_new_tokens=4)).strip() == row["prediction"]


@pytest.mark.slow
def test_text_alone_teaches_a_frozen_language_model_nothing(values, pictures, tmp_path):
    """One row of nothing but text would end the run: no gradient comes from it."""
    rows = (pictures / "train.jsonl").read_text().splitlines()[:2]
    (tmp_path / "mixed.jsonl").write_text("\n".join([*rows, *[json.dumps(TEXT)] * 3]))
    values["data"]["train"]["metadata"] = str(tmp_path / "mixed.jsonl")
    values["data"]["max_tokens_per_row"] = 1
    frozen = values | {"lora": None, "evaluation": {}}
    output = train(frozen)
    assert "3 examples without images left out: with a frozen language model nothing learns from them" in output
    assert "left out" not in train(values | {"evaluation": {}, "output_dir": str(tmp_path / "lora")})
    (tmp_path / "mixed.jsonl").write_text(json.dumps(TEXT))
    with pytest.raises(UserError, match="nothing learns from text alone"):
        train(frozen, overwrite=True)
