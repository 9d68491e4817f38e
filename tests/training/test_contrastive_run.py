"""Whole runs of contrastive training: what they leave, how they go on, and what their recipes may say."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import top_k_accuracy_score
from transformers import AutoModel, AutoProcessor, SiglipModel
from typer.testing import CliRunner

from tests.dual_encoders import SAVE
from tests.tiny import image, tiny
from tests.training.helpers import TRAIN, Killed, kill_in, recipe_values, train
from vlm import recipe
from vlm.cli import app
from vlm.errors import UserError
from vlm.recipe import RecipeError


def test_a_run_and_what_it_leaves(pair_values, tmp_path):
    said = train(pair_values)
    run = tmp_path / "run"
    assert "image to text" in said
    for name in ("recipe.yaml", "metrics.jsonl", "loss.png", "model/config.json", "evaluation/samples.html"):
        assert (run / name).is_file(), name
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [entry for entry in logged if "eval_loss" in entry]
    assert held_out[-1]["eval_text_to_image_r10"] == 1.0
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    # The scores again, by the saved model and scikit-learn.
    model, processor = AutoModel.from_pretrained(run / "model").eval(), AutoProcessor.from_pretrained(run / "model")
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "evaluation" / "predictions.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 3
    texts = [text for row in rows for text in row["references"]]
    unique = list(dict.fromkeys(texts))
    inputs = processor(text=unique, images=[image(n) for n in range(10, 13)], return_tensors="pt", padding=True)
    scores = model(**inputs).logits_per_image.detach()
    for row, line in zip(rows, scores, strict=True):
        assert row["prediction"] == unique[int(line.argmax())]
    of_texts = [n for n, row in enumerate(rows) for _ in row["references"]]
    if len(unique) == len(texts):  # each text has one image
        expected = top_k_accuracy_score(of_texts, scores.T.numpy(), k=1, labels=range(3))
        assert summary["metrics"]["text_to_image_r1"]["score"] == pytest.approx(expected)
    assert held_out[-1]["eval_text_to_image_r1"] == pytest.approx(summary["metrics"]["text_to_image_r1"]["score"])


def test_what_is_frozen_stays_and_what_learns_moves(pair_values, parts, tmp_path):
    train(pair_values)
    before = load_file(parts / "vision" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[f"vision_model.{name}"])
    assert after["logit_scale"].item() != pytest.approx(math.log(1 / 0.07), abs=1e-6)


def test_kept_features_give_the_run_that_encoding_in_each_step_gives(pair_values, tmp_path):
    train(pair_values | {"output_dir": str(tmp_path / "kept")})
    data = pair_values["data"] | {"cache_features": False}
    said = train(pair_values | {"data": data, "output_dir": str(tmp_path / "anew")})
    assert "found on disk" not in said
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("kept", "anew"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "lora_dropout": 0.1, "learning_rate": 1e-2},
        pytest.param(None, marks=pytest.mark.slow, id="no LoRA"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(pair_values, tmp_path, monkeypatch, lora):
    if lora:
        pair_values |= {"lora": lora, "trainable": {"projector": 1e-2}}
    pair_values["contrastive"]["chunk_size"] = 2
    train(pair_values | {"output_dir": str(tmp_path / "whole")})
    with monkeypatch.context() as patch:
        kill_in(patch, "train", 3)
        with pytest.raises(Killed):
            train(pair_values)
    train(pair_values, resume=True)
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert (tmp_path / "run" / "adapter").is_dir() == bool(lora)


def test_lora_is_kept_beside_the_model_that_it_is_merged_into(pair_values, text_encoder, tmp_path):
    """What the adapter says, taken from the merged weights, leaves the text encoder as it was before training."""
    lora = {"r": 4, "lora_alpha": 8, "learning_rate": 1e-2}
    train(pair_values | {"lora": lora, "trainable": {"projector": 1e-2}})
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    merged = load_file(tmp_path / "run" / "model" / "model.safetensors")
    before = load_file(text_encoder / "model.safetensors")
    prefix, ends = "base_model.model.", ".lora_A.weight"
    layers = [name.removeprefix(prefix).removesuffix(ends) for name in adapter if name.endswith(ends)]
    assert len(layers) == 2 * 6  # two layers of BERT, six linear ones in each
    for layer in layers:
        low, high = (adapter[f"{prefix}{layer}.lora_{side}.weight"] for side in "AB")
        delta = 8 / 4 * high @ low
        assert delta.abs().max() > 1e-4
        start = before[f"{layer.removeprefix('text_model.')}.weight"]
        torch.testing.assert_close(merged[f"{layer}.weight"] - delta, start, rtol=1e-4, atol=1e-5)


def test_a_pretrained_dual_encoder_with_the_sigmoid_loss(pair_values, tmp_path):
    SAVE["siglip"](tmp_path / "siglip")
    pair_values["model"] = {"pretrained": str(tmp_path / "siglip")}
    pair_values["contrastive"] = {"loss": "sigmoid", "chunk_size": 2}
    pair_values["trainable"] = {"projector": 1e-2, "language": 1e-3, "vision": 1e-3}
    train(pair_values)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "run" / "model"), SiglipModel)


def test_the_sigmoid_loss_needs_a_bias(pair_values, tmp_path):
    SAVE["clip"](tmp_path / "clip")
    pair_values["model"] = {"pretrained": str(tmp_path / "clip")}
    pair_values["contrastive"] = {"loss": "sigmoid"}
    with pytest.raises(UserError, match="has no bias, which the sigmoid loss needs; use infonce"):
        train(pair_values)


@pytest.mark.slow
def test_stages_go_on_from_one_another(pair_values, tmp_path):
    first = {"name": "lock", "trainable": pair_values.pop("trainable"), "train": pair_values.pop("train")}
    second = {
        "name": "tune",
        "trainable": {"vision": 1e-4, "language": 1e-4, "projector": 1e-3},
        "train": first["train"],
    }
    train(pair_values | {"stages": [first, second]})
    assert (tmp_path / "run" / "stages" / "lock" / "evaluation" / "summary.json").is_file()
    assert (tmp_path / "run" / "evaluation" / "summary.json").is_file()


def test_texts_that_are_cut_are_counted(pair_values, images, tmp_path):
    for name, rows in (("train", 10), ("test", 3)):
        lines = [json.loads(line) for line in (images / f"{name}.jsonl").read_text().splitlines()]
        assert len(lines) == rows
        lines[0]["captions"] = ["a cat and a dog " * 9, "no"]
        (images / f"long-{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        part = "train" if name == "train" else "validation"
        pair_values["data"][part] = pair_values["data"][part] | {"metadata": f"long-{name}.jsonl"}
    said = train(pair_values)
    assert "training: 1 texts are cut to the 24 tokens" in said
    assert said.count("1 texts are cut to the 24 tokens") == 3  # of training, held out, and as they are scored


def test_its_eye_is_that_of_a_caption_recipe_and_of_vlm_encode(pair_values, parts, images, tmp_path):
    pair_values["trainable"] = {"vision": 1e-2, "language": 1e-3, "projector": 1e-2}
    train(pair_values)
    captions = recipe_values(parts, images, tmp_path / "captions")
    captions["model"]["vision"] = str(tmp_path / "run")
    captions["lora"] = None
    train(captions)
    eye = load_file(tmp_path / "run" / "model" / "model.safetensors")
    written = load_file(tmp_path / "captions" / "model" / "model.safetensors")
    tower = {name: tensor for name, tensor in written.items() if name.startswith("model.vision_tower.")}
    assert tower
    for name, tensor in tower.items():
        assert torch.equal(tensor, eye[name.replace("model.vision_tower.", "vision_model.", 1)])
    words = [
        "encode",
        str(images / "0.png"),
        "--encoder",
        str(tmp_path / "run"),
        "--output",
        str(tmp_path / "f.safetensors"),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    model = AutoModel.from_pretrained(tmp_path / "run" / "model").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    pixels = processor.image_processor(images=[image(0)], return_tensors="pt")["pixel_values"]
    expected = model.vision_model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(
        load_file(tmp_path / "f.safetensors")["features"], expected.detach(), rtol=1e-4, atol=1e-4
    )


def test_a_broken_image_is_named(pair_values, images, tmp_path):
    rows = [json.loads(line) for line in (images / "train.jsonl").read_text().splitlines()]
    (images / "bad.png").write_bytes(b"no image")
    (images / "worse.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"file_name": "bad.png", "captions": ["x"]}])
    )
    pair_values["data"]["train"]["metadata"] = "worse.jsonl"
    said = train(pair_values)
    assert "bad.png" in said
    problems = json.loads((tmp_path / "run" / "data_problems.json").read_text())
    assert len(problems) == 1


# --- recipes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable": {"fusion": 1e-3}}, "trainable.fusion: a dual encoder has none"),
        ({"train": {"gradient_accumulation_steps": 2}}, "gradient_accumulation_steps: pairs are told only from those"),
        ({"train": {"auto_find_batch_size": True}}, "auto_find_batch_size: a smaller batch is another loss"),
        ({"evaluation": {"metrics": ["cider_d"]}}, "evaluation.metrics: does not go with `contrastive`"),
        ({"contrastive": {"loss": "nce"}}, "contrastive.loss"),
        ({"contrastive": {"chunks": 2}}, "contrastive.chunks"),
        ({"train": TRAIN | {"metric_for_best_model": "image_to_text_r2"}}, "did you mean 'image_to_text_r"),
    ],
)
def test_what_does_not_go_with_it_is_said_before_anything_is_loaded(pair_values, change, message):
    with pytest.raises(RecipeError, match=message):
        recipe.from_dict(pair_values | change)


def test_keys_of_a_model_that_writes_are_refused(pair_values):
    pair_values["model"] |= {"adapter": {"projector": "linear"}, "tiling": {"type": "tiles"}}
    pair_values["data"] |= {"max_length": 7}
    with pytest.raises(RecipeError) as raised:
        recipe.from_dict(pair_values)
    for key in ("model.adapter", "model.tiling", "data.max_length"):
        assert f"{key}: does not go with `contrastive`" in str(raised.value)


def test_projections_of_a_pretrained_model_are_its_own(pair_values):
    pair_values["model"] = {"pretrained": "openai/clip-vit-base-patch16"}
    with pytest.raises(RecipeError, match=r"contrastive\.projection_dim: is that of the `pretrained` model already"):
        recipe.from_dict(pair_values)


def test_no_model_that_writes_is_trained_so(pair_values, tmp_path):
    tiny()[0].save_pretrained(tmp_path / "writer")
    pair_values["model"] = {"pretrained": str(tmp_path / "writer")}
    pair_values["contrastive"] = {}
    with pytest.raises(UserError, match="is of type vlm, which is no dual encoder"):
        train(pair_values)


def test_a_dry_run_leaves_nothing(pair_values, tmp_path):
    assert "nothing was trained" in train(pair_values, dry_run=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_captions_that_are_the_same_are_named(pair_values, images):
    rows = [json.loads(line) for line in (images / "train.jsonl").read_text().splitlines()]
    same = "".join(json.dumps({"file_name": row["file_name"], "caption": "A  cat"}) + "\n" for row in rows)
    (images / "same.jsonl").write_text(same)
    pair_values["data"]["train"] = pair_values["data"]["train"] | {"metadata": "same.jsonl"}
    with pytest.raises(UserError, match=r"the texts of all images are the same \('A  cat'\)"):
        train(pair_values)
    pair_values["train"] |= {"per_device_train_batch_size": 1}
    pair_values["output_dir"] += "-alone"
    with pytest.raises(UserError, match=r"a batch has one image only: raise train\.per_device_train_batch_size"):
        train(pair_values)
