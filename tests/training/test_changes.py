"""Which keys of a recipe may differ when a run goes on."""

import pytest
import yaml

from tests.training.helpers import TRAIN, staged
from vlm import recipe
from vlm.errors import UserError
from vlm.training.changes import recipe_changes


@pytest.fixture
def run(values, tmp_path):
    """A run of two stages, stopped in the second."""
    folder = tmp_path / "run"
    (folder / "stages/align/model").mkdir(parents=True)
    (folder / "stages/align/model/config.json").write_text("{}")
    (folder / "checkpoints/tune/checkpoint-2").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.from_dict(staged(values)).resolved()))
    return folder


def after(run, values, *overrides):
    return recipe_changes(run, recipe.from_dict(staged(values), overrides))


def test_nothing_changed(run, values):
    assert after(run, values) == []


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "evaluation.max_new_tokens=9",
        "evaluation.limit=2",
        "data.max_cache_size=1",
        "data.cache_features=false",
        "data.validation.limit=2",
        "data.train.path=elsewhere",
        "stages.1.train.max_steps=9",
        "stages.1.train.save_steps=1",
        "stages.1.train.save_total_limit=1",
        "stages.1.train.eval_steps=1",
        "stages.1.train.logging_steps=2",
        "stages.1.train.dataloader_num_workers=2",
        "stages.1.train.activation_checkpointing=true",
        "stages.1.train.bf16=true",
        "stages.1.train.gradient_accumulation_steps=2",
        "stages.1.trainable.projector=1e-4",
    ],
)
def test_what_decides_nothing_about_the_steps_taken_may_differ(run, values, override):
    assert override.split("=")[0] in [line.split(":")[0] for line in after(run, values, override)]


@pytest.mark.parametrize(
    "override",
    [
        "seed=5",
        "model.vision=other",
        "model.adapter.projector=linear",
        "data.max_length=100",
        "data.max_tokens_per_row=100",
        "data.answer_weighting=root_answers",
        "stages.0.train.max_steps=9",
        "stages.0.trainable.projector=1e-4",
        "stages.1.trainable={vision: 1e-4, projector: 1e-3}",
        "stages.1.lora.r=2",
        "stages.1.lora.lora_dropout=0",
        "stages.1.name=other",
        "stages.1.train.weight_decay=0.1",
        "stages.1.train.optim=sgd",
        "stages.1.train.lr_scheduler_type=cosine",
        "stages.1.train.dataloader_drop_last=true",
    ],
)
def test_what_would_make_other_steps_is_refused_and_named(run, values, override):
    key = override.split("=")[0]
    with pytest.raises(UserError, match=rf"(?s)recipe has changed.*\n  {key}.*, now .*Take these back .*--overwrite"):
        after(run, values, override)


def test_the_rate_of_lora_may_differ(run, values):
    (line,) = after(run, values, "stages.1.lora.learning_rate=1e-4")
    assert line == "stages.1.lora.parts.language: 0.01, now 0.0001"


def test_a_stage_without_a_checkpoint_may_be_another(run, values):
    (run / "checkpoints/tune/checkpoint-2").rmdir()
    assert after(run, values, "stages.1.lora.r=2") == ["stages.1.lora.r: 4, now 2"]
    with pytest.raises(UserError, match=r"stages\.0\.train\.max_steps"):
        after(run, values, "stages.0.train.max_steps=9")


def test_a_stage_that_would_never_run_is_refused(run, values):
    (run / "model").mkdir()
    (run / "model/config.json").write_text("{}")
    more = recipe.from_dict(staged(values) | {"stages": [*staged(values)["stages"], {"trainable": ["projector"]}]})
    with pytest.raises(UserError, match=r"stages\.2: None, now"):
        recipe_changes(run, more)


def test_before_the_first_checkpoint_all_may(run, values):
    (run / "stages/align/model/config.json").unlink()
    (run / "checkpoints/tune/checkpoint-2").rmdir()
    assert TRAIN["max_steps"] != 9
    assert len(after(run, values, "seed=5", "stages.0.train.max_steps=9")) == 2
