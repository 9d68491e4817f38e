"""Recipes and overrides with mistakes: each is refused with a message, or what is accepted is whole and comes back."""

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fuzz.cases import WORDS, at, changed, changed_text, odd_value, parts, places, run, told
from vlm import recipe
from vlm.errors import UserError
from vlm.recipe import RecipeError
from vlm.recipe_source import read_yaml, write_yaml
from vlm.recipe_train import training_fields
from vlm.training.arguments import require_arguments

SHORT = {
    "model": {
        "vision": "some/encoder", "language": "some/llm",
        "adapter": {"projector": {"type": "resampler", "num_image_tokens": 16, "depth": 1, "head_dim": 8}},
        "tiling": {"type": "tiles", "max_tiles": 4, "grids": [[1, 2], [2, 1]]},
        "image_size": {"height": 32, "width": 32},
        "vision_feature_layer": [-2, -1], "image_markers": ["<a>", "</a>"],
    },
    "data": {
        "train": [
            {"format": "image_folder", "path": "images", "weight": 0.5},
            {"format": "coco_captions", "annotations": "a.json", "images": "i", "weight": 2},
        ],
        "validation": {"format": "vqav2", "questions": "q.json", "annotations": "a.json", "images": "i", "limit": 5},
        "max_bad": 0.1, "max_length": 100, "max_tokens_per_row": 200, "max_cache_size": 1.5,
        "augmentation": {"color_jitter": {"hue": 0.1}, "random_resized_crop": {"scale": [0.5, 1.0]}},
    },
    "trainable": {"projector": 1e-3, "vision": 1e-5},
    "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "learning_rate": 1e-4, "target_modules": ["q_proj"]},
    "train": {
        "max_steps": 5, "per_device_train_batch_size": 2, "weight_decay": 0.1, "eval_strategy": "steps",
        "eval_steps": 2,
        "lr_scheduler_type": "cosine", "optim": "adamw_torch", "save_steps": 2, "warmup_steps": 0.1, "adam_beta1": 0.8,
        "dataloader_num_workers": 0, "report_to": "none", "lr_scheduler_kwargs": {"num_cycles": 0.5},
    },
    "evaluation": {
        "metrics": ["cider_d"], "samples": 2, "limit": 10, "max_new_tokens": 8,
        "classification": {"animals": {"data": "images", "prompt": "What is this?", "templates": ["A {}."]}},
    },
    "seed": 1,
    "output_dir": "runs/x",
}  # fmt: skip
STAGES = {
    "name": "two",
    "model": {"preset": "llava", "vision": ["a/b", "c/d"], "language": "e/f",
              "quantization_config": {"load_in_4bit": True}},
    "data": {"train": {"format": "llava", "path": "a.json", "images": "i"}},
    "stages": [
        {"name": "align", "trainable": ["projector"], "train": {"learning_rate": 1e-3, "num_train_epochs": 0.5}},
        {"name": "tune", "trainable": {"projector": 1e-4}, "lora": {"parts": {"language": 1e-4}, "use_rslora": True}},
    ],
}  # fmt: skip
PAIRS = {
    "model": {"vision": "a/b", "language": "c/d"},
    "contrastive": {"loss": "sigmoid", "chunk_size": 8, "projection_dim": 16, "projection_dropout": 0.1},
    "data": {"train": {"format": "dataset", "path": "json", "data_files": ["a.jsonl"],
                       "columns": {"image": "x", "caption": "y"}}},
    "trainable": {"projector": 1e-3},
    "train": {"max_steps": 3, "bf16": False, "fp16": False, "deepspeed": None, "fsdp": "full_shard",
              "fsdp_config": {"min_num_params": 1}},
}  # fmt: skip
BASES: tuple[dict[str, Any], ...] = (SHORT, STAGES, PAIRS)


def accepted(make: Callable[[], recipe.Recipe]) -> recipe.Recipe | None:
    """The recipe, or None if it was refused with a message. Any other error is a failure."""
    said = ""
    try:
        return make()
    except RecipeError as error:
        said = str(error)
    assert said.strip()
    assert len(said) < 20_000
    return None


def is_sound(made: recipe.Recipe) -> None:
    """What is accepted holds finite numbers only, and comes back unchanged from the file that a run writes."""
    values = made.resolved()
    for path in places(values):
        value = at(values, path)
        assert not isinstance(value, float) or math.isfinite(value), path
    assert recipe.from_dict(read_yaml(write_yaml(values), "resolved")[0]).resolved() == values
    assert all(rate > 0 for stage in made.stages for rate in stage.learning_rates.values())


@pytest.mark.parametrize("base", BASES)
def test_without_a_change(base: dict[str, Any]) -> None:
    is_sound(recipe.from_dict(base))


@parts(fast=300, slow=6_000)
def test_values(numbers: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def case(draw: random.Random) -> bool:
        values, change = changed(draw.choice(BASES), draw)
        if not draw.randrange(4):
            values, more = changed(values, draw)
            change += f", {more}"
        with told(change):
            made = accepted(lambda: recipe.from_dict(values, base_dir=tmp_path))
            if made:
                is_sound(made)
        return bool(made)

    assert any(run("recipe", numbers, case))


@parts(fast=400, slow=4_000)
def test_text(numbers: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [yaml.safe_dump(base, default_flow_style=flow) for base in BASES[1:] for flow in (None, True, False)]

    def case(draw: random.Random) -> bool:
        text = changed_text(draw.choice(texts), draw)
        with told(text):
            made = accepted(lambda: recipe.from_dict(read_yaml(text, "mine.yaml")[0], base_dir=tmp_path))
            if made:
                is_sound(made)
        return bool(made)

    assert any(run("text", numbers, case))


def _override(draw: random.Random) -> tuple[str, Any]:
    """A key of a recipe or of TrainingArguments, and a value for it."""
    keys = [".".join(map(str, path)) for path in places(SHORT)] + [f"train.{name}" for name in training_fields()]
    key = draw.choice(keys) + draw.choice(("", "", "", "", ".x", ".0"))
    return key, odd_value(draw)


@parts(fast=200, slow=5_000)
def test_overrides(numbers: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def case(draw: random.Random) -> bool:
        key, value = _override(draw)
        text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
        if not draw.randrange(3):
            text = changed_text(text, draw) if draw.randrange(2) else draw.choice(WORDS)
        with told(f"{key}={text}"):
            made = accepted(lambda: recipe.from_dict(SHORT, [f"{key}={text}"], base_dir=tmp_path))
            if made:
                is_sound(made)
        return bool(made)

    assert any(run("override", numbers, case))


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_no_key_takes_a_number_that_is_none(tmp_path: Path, value: str) -> None:
    for path in places(SHORT):
        if isinstance(at(SHORT, path), int | float) and not isinstance(at(SHORT, path), bool):
            key = ".".join(map(str, path))
            with pytest.raises(RecipeError, match=rf"command line  {re.escape(key)}: must be a finite number"):
                recipe.from_dict(SHORT, [f"{key}={value}"], base_dir=tmp_path)


@pytest.mark.slow
def test_training_arguments(tmp_path: Path) -> None:
    """What the check of a recipe lets through is built, with its optimizer and schedule, or refused by name."""
    fields = list(training_fields())
    base = {**SHORT, "train": {"max_steps": 5, "use_cpu": True}, "evaluation": {}}

    def case(draw: random.Random) -> None:
        key, value = draw.choice(fields), odd_value(draw)
        with told(f"{key}: {value!r}"):
            made = accepted(lambda: recipe.from_dict({**base, "train": base["train"] | {key: value}}))
            said = f"train.{key}: "
            try:
                if made:
                    require_arguments(made)
            except UserError as error:
                said = str(error)
            assert f"train.{key}: " in said

    run("arguments", range(1_500), case)
