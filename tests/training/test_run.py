"""Whole runs from a recipe to a folder, on tiny models."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, set_seed
from typer.testing import CliRunner

from tests.counterparts import own_paligemma
from tests.tiny import causal_lm, image, small_projector
from tests.training.helpers import STAGES, TRAIN, recipe_values, save_images, staged, train
from vlm import generation, recipe
from vlm.cli import app
from vlm.data.augmentation import Augmentation
from vlm.data.check import TooManyProblems
from vlm.errors import UserError
from vlm.training import folder as folder_of_run
from vlm.training import run as running
from vlm.training.throughput import in_words
from vlm.training.trainer import VLMTrainer

ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image."}]}]
REQUESTS = [([image(n)], ASKED) for n in range(10, 13)]


# --- a run, as a user starts it


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    """A run through the command line, one image broken. Gives its folder and what was printed."""
    folder = tmp_path_factory.mktemp("finished")
    data = save_images(folder / "images", broken=1)
    (folder / "mine.yaml").write_text(yaml.safe_dump(recipe_values(parts, data, folder / "run")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_HOME", str(folder / "home"))
        result = CliRunner().invoke(app, ["train", str(folder / "mine.yaml"), "seed=3"])
    assert result.exit_code == 0, result.output
    return folder / "run", result.output


def test_the_run_folder(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "loss.png",
        "data_problems.json",
        "checkpoints",
        "model",
        "model_hashes.json",
        "adapter",
        "evaluation",
    }
    assert {path.name for path in (folder / "evaluation").iterdir()} == {
        "summary.json",
        "predictions.jsonl",
        "samples.html",
    }
    assert sorted(path.name for path in (folder / "checkpoints/train").iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_its_recipe_is_resolved_and_runs_again(finished):
    folder, _ = finished
    loaded = recipe.load(folder / "recipe.yaml")
    assert loaded.seed == 3
    assert loaded.stages[0].learning_rates == {"projector": 1e-2, "lora": 1e-2}


def test_its_metrics_picture_and_environment(finished):
    folder, _ = finished
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if "loss" in e] == [1, 2, 3, 4]
    assert [e["step"] for e in entries if "eval_loss" in e] == [2, 4]
    losses = [e["loss"] for e in entries if "loss" in e]
    assert all(loss > 0 for loss in losses)
    assert losses[-1] < losses[0]
    speeds = [e for e in entries if "loss" in e or "train_loss" in e]
    assert len(speeds) == 5
    assert all(e["answers_per_second"] == pytest.approx(2 * e["images_per_second"], rel=1e-3) for e in speeds)
    assert all(e["tokens_per_second"] > e["answers_per_second"] and 0 < e["mfu"] < 1 for e in speeds)
    with Image.open(folder / "loss.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0] or environment["packages"]["torch"]


def test_the_broken_image_is_named_once(finished):
    folder, output = finished
    problems = json.loads((folder / "data_problems.json").read_text())
    assert len(problems) == 1
    assert problems[0]["key"] == "image"
    assert problems[0]["lost"] == 2
    assert "train.jsonl" in problems[0]["where"]
    assert problems[0]["where"].count("0.png") == 1
    assert "0.png" not in problems[0]["why"]
    assert "Skipped 2 of 26 answers" in " ".join(output.split())


def test_the_table_before_training(finished):
    _, output = finished
    lines = [line.split() for line in output.splitlines()]
    assert any(line[:1] == ["vision"] and line[-1] == "frozen" for line in lines)
    assert any(line[:1] == ["projector"] and line[-1] == "0.01" for line in lines)
    assert any(line[:1] == ["lora"] and line[-1] == "0.01" for line in lines)
    assert ["examples", "9"] in lines
    assert ["answers", "18"] in lines
    assert ["padding", "0.0%", "of", "the", "token", "places"] in lines, "a batch is one row here"
    assert ["steps", "4"] in lines


def test_its_speed_is_said_at_the_end(finished):
    folder, output = finished
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    whole = next(entry for entry in entries if "train_loss" in entry)
    assert in_words(whole) in " ".join(output.split())


def test_the_summary_is_of_the_held_out_images(finished):
    folder, _ = finished
    summary = json.loads((folder / "evaluation/summary.json").read_text())
    assert summary["n_images"] == 3
    rows = [json.loads(line) for line in (folder / "evaluation/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 3


def test_the_saved_model_loads_and_answers_as_it_was_evaluated(finished):
    folder, _ = finished
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    processor = AutoProcessor.from_pretrained(folder / "model")
    assert not any("lora" in name for name, _ in model.named_parameters())
    answers = generation.generate(model, processor, REQUESTS, max_new_tokens=4)
    rows = [json.loads(line) for line in (folder / "evaluation/predictions.jsonl").read_text().splitlines()]
    assert answers == [row["prediction"] for row in rows]


def test_exported_as_a_model_of_transformers_it_answers_as_it_was_evaluated(finished, tmp_path):
    folder, _ = finished
    result = CliRunner().invoke(app, ["export", str(folder), "--to", "llava", "--output", str(tmp_path / "llava")])
    assert result.exit_code == 0, result.output
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    answers = generation.generate(model, processor, REQUESTS, max_new_tokens=4)
    rows = [json.loads(line) for line in (folder / "evaluation/predictions.jsonl").read_text().splitlines()]
    assert answers == [row["prediction"] for row in rows]


@pytest.mark.slow
def test_a_run_of_the_preset_of_paligemma_becomes_one(tmp_path):
    """Trained in trees, two captions to one image and prompt; and asked as the stock processor asks."""
    model, processor = own_paligemma()
    for name, part in {"vision": model.model.vision_tower, "language": causal_lm(model)}.items():
        part.save_pretrained(tmp_path / name)
    processor.image_processor.save_pretrained(tmp_path / "vision")
    processor.tokenizer.save_pretrained(tmp_path / "language")
    values = recipe_values(tmp_path, save_images(tmp_path / "images"), tmp_path / "run")
    said = train(values | {"model": values["model"] | {"preset": "paligemma"}})
    assert "no trees" not in said
    rows = [json.loads(row) for row in (tmp_path / "run/evaluation/predictions.jsonl").read_text().splitlines()]
    export = ["export", str(tmp_path / "run"), "--to", "paligemma", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, export)
    assert result.exit_code == 0, result.output
    answers = generation.generate(*generation.load(str(tmp_path / "out"), device="cpu"), REQUESTS, max_new_tokens=4)
    assert answers == [row["prediction"] for row in rows]


def test_the_saved_model_equals_the_one_in_memory_and_its_adapter(values, parts, tmp_path, monkeypatch):
    from peft import PeftModel

    from vlm.build import build

    kept, save = [], folder_of_run.save_model
    monkeypatch.setattr(folder_of_run, "save_model", lambda model, *rest: (kept.append(model), save(model, *rest)))
    train(values | {"evaluation": {}})
    loaded, processor = generation.load(str(tmp_path / "run"), device="cpu")
    inputs = generation.encode_requests(loaded, processor, REQUESTS)
    with torch.no_grad():
        wanted = kept[0].cpu().eval()(**inputs).logits
        assert torch.equal(loaded(**inputs).logits, wanted)
        set_seed(0)
        base, _ = build(str(parts / "vision"), str(parts / "language"))
        adapted = PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
        assert torch.allclose(adapted(**inputs).logits, wanted, atol=1e-5)


def test_a_run_is_the_start_of_another_recipe(finished, values, tmp_path):
    folder, _ = finished
    start = {"model": {"pretrained": str(folder)}, "trainable": {"projector": 1e-3}, "lora": None}
    train(values | start | {"train": TRAIN | {"max_steps": 2}})
    before, _ = generation.load(str(folder), device="cpu")
    after, _ = generation.load(str(tmp_path / "run"), device="cpu")
    moved = {
        name.split(".")[1]
        for (name, p), (_, q) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved == {"multi_modal_projector"}


def test_a_second_run_in_the_folder_is_refused_and_overwrite_replaces_it(finished, parts, images, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    values = recipe_values(parts, images, tmp_path / "run") | {"evaluation": {}}
    with pytest.raises(UserError, match=r"holds a finished run\. Replace it with --overwrite"):
        train(values)
    with pytest.raises(UserError, match="nothing to resume"):
        train(values, resume=True)
    train(values, overwrite=True)
    assert not (tmp_path / "run/evaluation").exists(), "of the old run nothing is left"
    assert not (tmp_path / "run/data_problems.json").exists()
    assert (tmp_path / "run/notes.txt").read_text() == "mine", "what is the user's stays"


def test_overwrite_does_not_replace_the_model_that_it_starts_from(finished, values):
    folder, _ = finished
    start = values | {"model": {"pretrained": str(folder / "model")}, "output_dir": str(folder)}
    with pytest.raises(UserError, match="which --overwrite would replace"):
        train(start, overwrite=True)
    assert (folder / "model/config.json").is_file()


def test_a_mistake_in_the_data_leaves_the_old_run_alone(finished, values, tmp_path):
    folder, _ = finished
    data = values["data"] | {"train": values["data"]["train"] | {"metadata": "gone.jsonl"}}
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        train(values | {"data": data, "output_dir": str(folder)}, overwrite=True)
    assert (folder / "model/config.json").is_file()
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        train(values | {"data": data})
    assert not (tmp_path / "run").exists(), "so that a second try needs no flag"


def test_images_are_changed_in_training_alone(values, monkeypatch):
    """Not for the held-out loss and the scores, and not where trees are compared with rows of one answer."""
    seeds = []
    change = Augmentation.__call__

    def changed(augment, image, seed):
        seeds.append(seed)
        return change(augment, image, seed)

    monkeypatch.setattr(Augmentation, "__call__", changed)
    values["data"] |= {"augmentation": {"random_resized_crop": {"scale": [0.1, 0.2]}, "color_jitter": {"hue": 0.5}}}
    assert "no trees" not in train(values)
    assert len(seeds) > 4
    assert all("train.jsonl" in seed for seed in seeds)


# --- before training


def test_a_dry_run_takes_no_step_and_writes_no_folder(values, tmp_path, monkeypatch):
    monkeypatch.setattr(VLMTrainer, "train", lambda *args, **kwargs: pytest.fail("a step was taken"))
    output = train(staged(values), dry_run=True)
    assert "this was a dry run" in output
    assert "stage 2 of 2: tune" in output
    assert "expected time" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dry_run_of_two_lora_stages(values, tmp_path):
    stages = [STAGES[1] | {"name": name} for name in ("one", "two")]
    output = train(staged(values) | {"stages": stages}, dry_run=True)
    counts = [line.split()[1] for line in output.splitlines() if line.startswith(("lora", "language"))]
    assert counts[:2] == counts[2:], "the second stage begins with a model without LoRA, as it would"


def test_too_many_broken_images_stop_it(parts, tmp_path):
    values = recipe_values(parts, save_images(tmp_path / "images", broken=4), tmp_path / "run")
    values["data"]["max_bad"] = 0.1
    with pytest.raises(TooManyProblems, match=r"(?s)train\.jsonl.*more than max_bad = 0\.1 allows; repair the data"):
        train(values)


def test_too_many_bad_rows_stop_it(parts, tmp_path):
    folder = save_images(tmp_path / "images")
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"file_name": "0.png", "captoins": ["typo"]}\n' * 5)
    values = recipe_values(parts, folder, tmp_path / "run")
    values["data"]["max_bad"] = 0.1
    with pytest.raises(TooManyProblems, match=r"train\.jsonl"):
        train(values)
    assert not (tmp_path / "run").exists()


def test_nothing_left_to_train_on_is_said(values):
    values["data"]["max_length"] = 10
    with pytest.raises(UserError, match=r"no example is left.*data\.max_length"):
        train(values)


def test_a_broken_image_is_found_before_training_without_a_cache_too(parts, tmp_path):
    values = recipe_values(parts, save_images(tmp_path / "images", broken=1), tmp_path / "run") | {"evaluation": {}}
    values["data"]["cache_features"] = False
    train(values)
    assert len(json.loads((tmp_path / "run/data_problems.json").read_text())) == 1


def test_a_window_shorter_than_the_rows_stays_a_window_in_trees(values, tmp_path):
    from transformers import AutoModelForCausalLM

    from tests.tiny import byte_level_tokenizer, text_config

    tokenizer = byte_level_tokenizer()
    config = text_config("gemma3", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    values["model"]["language"] = str(tmp_path / "gemma")
    assert "no trees" not in train(values, dry_run=True)


def test_the_cache_changes_nothing(values, tmp_path):
    models = []
    for number, kept in enumerate((True, False)):
        data = values["data"] | {"cache_features": kept}
        train(values | {"data": data, "evaluation": {}, "output_dir": str(tmp_path / str(number))})
        models.append(generation.load(str(tmp_path / str(number)), device="cpu")[0])
    for (name, p), (_, q) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.few(1)
def test_the_projector_starts_from_the_training_images(values, images, tmp_path, kept):
    train(values | {"data": values["data"] | {"cache_features": kept}, "evaluation": {}})
    model, processor = generation.load(str(tmp_path / "run"), device="cpu")
    pixels = [Image.open(images / f"{n}.png") for n in range(10)]
    with torch.no_grad():
        features, _ = model.get_vision_features(processor.image_processor(pixels, return_tensors="pt")["pixel_values"])
    fitted = model.model.multi_modal_projector.standardize
    assert torch.allclose(fitted.mean[1], features.mean(dim=(0, 1)), atol=1e-5)
    assert torch.allclose(fitted.std[1], features.flatten(0, 1).std(dim=0), atol=1e-5)


def test_visual_tokens_start_as_large_as_words(values, monkeypatch):
    seen = []

    def look(model, *args, **kwargs):
        initialize(model, *args, **kwargs)
        pixels = torch.randn(9, 3, 32, 32, device=model.device)
        tokens = torch.stack(model.get_image_features(pixels).pooler_output)
        seen.extend(float(t.square().mean().sqrt().detach()) for t in (tokens, model.get_input_embeddings().weight))

    initialize = running.initialize_projector
    monkeypatch.setattr(running, "initialize_projector", look)
    train(values, dry_run=True)
    assert seen[0] == pytest.approx(seen[1], rel=0.3)  # these are other images than it was fitted to


def test_the_projector_can_start_at_random(values, tmp_path):
    values["model"]["adapter"] = {"data_dependent_init": False}
    train(values | {"evaluation": {}})
    model, _ = generation.load(str(tmp_path / "run"), device="cpu")
    assert not model.model.multi_modal_projector.standardize.mean.any()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("projector", "options"),
    [("c_abstractor", {}), ("resampler", {}), ("qformer", {}), ("qformer", {"use_qformer_text_input": True})],
)
def test_projectors_with_layers_of_their_own_train(values, projector, options):
    """The part check of a run stops it if they do not."""
    model = values["model"] | {"adapter": {"projector": small_projector(projector) | options}}
    train(values | {"model": model, "trainable": {"projector": 1e-2}, "lora": None, "evaluation": {}})


@pytest.mark.parametrize(
    "adapter",
    [
        {"fusion": "cross_attention", "cross_attention_every": 2},
        {"fusion": "prefix+cross_attention", "cross_attention_layers": [1]},
    ],
)
@pytest.mark.few(1)
def test_cross_attention_trains(values, adapter):
    model = values["model"] | {"adapter": adapter}
    trainable = {"projector": 1e-2, "fusion": 1e-2}
    train(values | {"model": model, "trainable": trainable, "lora": None, "evaluation": {}})


def test_every_part_trains_with_activation_checkpointing(values):
    trainable = {"projector": 1e-3, "vision": 1e-4, "language": 1e-4}
    arguments = TRAIN | {"activation_checkpointing": True, "max_steps": 2}
    train(values | {"trainable": trainable, "lora": None, "train": arguments, "evaluation": {}})


@pytest.mark.slow
def test_as_a_module(values, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "vlm", "train", str(tmp_path / "mine.yaml"), "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert result.returncode == 0, result.stderr
    assert "dry run" in result.stdout


def test_a_model_that_ignores_the_mask_gets_no_trees(values, monkeypatch):
    """Trees are tried on two examples: a decoder that goes its own way is found before a step is taken."""
    from vlm.modeling import VLMForConditionalGeneration

    forward, seen = VLMForConditionalGeneration.forward, []

    @functools.wraps(forward)  # `generate` looks at its arguments
    def without_trees(self, *args, attention_mask=None, tree_layout=None, **kwargs):
        if attention_mask is not None:
            seen.append(attention_mask.ndim)
            attention_mask = attention_mask if attention_mask.ndim == 2 else None
        return forward(self, *args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(VLMForConditionalGeneration, "forward", without_trees)
    said = train(values, dry_run=True)
    assert said.count("no trees for LlamaForCausalLM, a row for each answer: several answers in a row have a loss") == 1
    assert seen[:2] == [2, 4], "one by one, then as trees"
    assert set(seen[2:]) == {2}
