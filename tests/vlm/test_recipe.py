"""Recipes: what is refused and how it is said, overrides, paths, and the way there and back."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from tests.vlm.recipe_texts import GOOD, STAGES, load, refusal
from vlm import recipe, recipe_data, recipe_model, recipe_paths, recipe_train
from vlm.data.readers_dataset import DatasetSource
from vlm.recipe import RecipeError
from vlm.recipe_contrastive import Contrastive
from vlm.recipe_evaluation import Evaluation


def test_a_recipe_with_one_stage(tmp_path: Path) -> None:
    loaded = load(tmp_path, GOOD)
    assert loaded.name == "mine"
    assert loaded.output_dir == "runs/mine"
    assert loaded.model.adapter.projector == {"type": "mlp"}
    assert [stage.learning_rates for stage in loaded.stages] == [{"projector": 1e-3}]
    assert loaded.stages[0].train == {"max_steps": 5}


def test_rates_of_a_list_of_parts_and_of_lora_come_from_train(tmp_path: Path) -> None:
    align, tune = load(tmp_path, STAGES).stages
    assert align.learning_rates == {"projector": 1e-3}
    assert tune.learning_rates == {"projector": 2e-4, "lora": 2e-4}
    assert tune.train == {"max_steps": 5}  # its learning_rate has been handed out


def test_without_any_rate_it_is_the_trainers_default(tmp_path: Path) -> None:
    text = GOOD.replace("trainable:\n  projector: 1e-3", "trainable: [projector]")
    assert load(tmp_path, text).stages[0].learning_rates == {
        "projector": TrainingArguments(output_dir="x").learning_rate
    }


MLLAMA = GOOD.replace("data:\n", "  adapter: {fusion: cross_attention, cross_attention_layers: [1]}\ndata:\n")


@pytest.mark.parametrize("text", [GOOD, STAGES, MLLAMA])
def test_resolved_comes_back_unchanged_through_yaml(tmp_path: Path, text: str) -> None:
    first = load(tmp_path, text)
    again = load(tmp_path, yaml.safe_dump(first.resolved(), sort_keys=False))
    assert again == first
    assert again.resolved() == first.resolved()


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (("  vision: some", "  visoin: some"), 3, "model.visoin: unknown key; did you mean 'vision'?"),
        (("  vision: some/encoder\n", ""), 2, "model.vision: is missing; a model needs `vision` and `language`"),
        (("  projector: 1e-3", "  projectr: 1e-3"), 8, "trainable.projectr: there is no such part"),
        (("  projector: 1e-3", "  projector: fast"), 8, "trainable.projector: must be a learning rate"),
        (("  projector: 1e-3", "  projector: -1"), 8, "trainable.projector: must be a learning rate"),
        (("  projector: 1e-3", "  projector: true"), 8, "trainable.projector: must be a learning rate"),
        (("  projector: 1e-3", "  fusion: 1e-3"), 8, "trainable.fusion: `fusion: prefix` has no weights"),
        (("  max_steps: 5", "  max_stps: 5"), 10, "train.max_stps: no such field of TrainingArguments; did you mean"),
        (("  max_steps: 5", "  max_steps: many"), 10, "train.max_steps: must be a whole number, not 'many'"),
        (("  max_steps: 5", "  max_steps: 5.5"), 10, "train.max_steps: must be a whole number, not 5.5"),
        (("  max_steps: 5", "  bf16: 1"), 10, "train.bf16: must be true or false, not 1"),
        (("  max_steps: 5", "  lr_scheduler_type: cosin"), 10, "did you mean 'cosine'?"),
        (("  max_steps: 5", "  output_dir: x"), 10, "train.output_dir: set `output_dir` at the top"),
        (("  max_steps: 5", "  hub_token: x"), 10, "train.hub_token: never write a token"),
        (("  max_steps: 5", "  learning_rate: 0"), 10, "train.learning_rate: must be more than 0, not 0"),
        (("  max_steps: 5", "  learning_rate: null"), 10, "train.learning_rate: must be a number, not None"),
        (("  max_steps: 5", "  learning_rate: 1e-4"), 10, "train.learning_rate: has no effect"),
        (("format: image_folder", "format: image_foldr"), 6, "did you mean 'image_folder'?"),
        (("format: image_folder, ", ""), 6, "data.train.format: is missing"),
        (("path: images", "pth: images"), 6, "data.train.pth: unknown key; did you mean 'path'?"),
        (("data:\n", "data:\n  max_bad: 2\n"), 6, "data.max_bad: must be at most 1, not 2"),
        (("data:\n", "data:\n  max_cache_size: 0\n"), 6, "data.max_cache_size: must be more than 0, not 0"),
        (("data:\n", "data:\n  cache_features: on\n"), 6, "data.cache_features: must be auto, true or false, not 'on'"),
        (("data:\n", "data:\n  cache_features: 1\n"), 6, "data.cache_features: must be auto, true or false, not 1"),
        (("data:\n", "data:\n  too_long: cut\n"), 6, "data.too_long: 'cut' is not one of its values"),
        (("data:\n", "data:\n  max_length: '9'\n"), 6, "data.max_length: must be a whole number, not '9'"),
        (("train:\n  max", "learning_rate: 1\ntrain:\n  max"), 9, "learning_rate: unknown key; it belongs in `train:`"),
        (("train:\n  max", "num_image_tokens: 1\ntrain:\n  max"), 9, "num_image_tokens: unknown key"),
        (("train:\n  max", "seed: -1\ntrain:\n  max"), 9, "seed: must be at least 0, not -1"),
        (("train:\n  max", "evaluation: {metrics: [cider]}\ntrain:\n  max"), 9, "did you mean 'cider_d'?"),
        (("train:\n  max", "evaluation: {metrics: [cider_d]}\ntrain:\n  max"), 9, "add `data.validation`"),
        (("train:\n  max", "lora: {r: 0}\ntrain:\n  max"), 9, "lora.r: must be at least 1, not 0"),
        (("train:\n  max", "stages: []\ntrain:\n  max"), 10, "train: this recipe has `stages`"),
        (("data:\n", "  adapter: {projector: mlpp}\ndata:\n"), 5, "there is no projector 'mlpp'; did you mean 'mlp'?"),
        (
            ("data:\n", "  adapter: {cross_attention_layers: [1]}\ndata:\n"),
            5,
            "cross_attention_layers: does not go with `fusion: prefix`",
        ),
        (
            (
                "data:\n",
                "  adapter: {fusion: cross_attention, cross_attention_every: 2, cross_attention_layers: [1]}\ndata:\n",
            ),
            5,
            "cross_attention_layers: does not go with `cross_attention_every`",
        ),
        (
            (
                "data:\n",
                "  preset: idefics\n  adapter: {cross_attention_every: 4, cross_attention_layers: [1]}\ndata:\n",
            ),
            6,
            "cross_attention_layers: does not go with `cross_attention_block`",
        ),
        (("data:\n", "  adapter: {projector: {num: 1}}\ndata:\n"), 5, "projector.type: is missing"),
        (("data:\n", "  adapter: {projector: {type: average_pool, num_tokens: 9}}\ndata:\n"), 5, "num_image_tokens"),
        (("data:\n", "  pretrained: some/vlm\ndata:\n"), 3, "model.vision: does not go with `pretrained`"),
        (("data:\n", "  1: 2\ndata:\n"), 5, "model.1: unknown key"),
        (("vision: some/encoder", "vision: []"), 3, "model.vision: must be a Hub name or a folder, or a list of them"),
        (("data:\n", "  image_size: 0\ndata:\n"), 5, "model.image_size: must be a side in pixels, {height"),
        (("data:\n", "  image_size: {height: 9}\ndata:\n"), 5, "model.image_size: must be a side in pixels, {height"),
        (("data:\n", "  image_size: [9, 9]\ndata:\n"), 5, "model.image_size: has 2 sizes, and `vision` names 1"),
        (("data:\n", "  vision_feature_layer: []\ndata:\n"), 5, "vision_feature_layer: must be a whole number such"),
        (("data:\n", "  vision_feature_layer: [mllama]\ndata:\n"), 5, "a list of them, or mllama, not ['mllama']"),
        (("data:\n", "  vision_feature_layer: [-2, x]\ndata:\n"), 5, "vision_feature_layer: must be a whole number"),
        (("data:\n", "data:\n  augmentation: {}\n"), 6, "data.augmentation: changes nothing; name one of random_res"),
        (("data:\n", "data:\n  augmentation: {color_jiter: {hue: 1}}\n"), 6, "color_jiter: unknown key; did you mean"),
        (("data:\n", "data:\n  augmentation: {color_jitter: {hue: 1}}\n"), 6, "hue: must be at most 0.5, not 1"),
        (("data:\n", "data:\n  augmentation: {random_horizontal_flip: true}\n"), 6, "flip: must be a number"),
        (
            ("data:\n", "data:\n  augmentation: {random_resized_crop: {scale: [0.5, 2]}}\n"),
            6,
            "scale: must be the least and the largest number of at most 1",
        ),
        (
            ("data:\n", "data:\n  augmentation: {random_resized_crop: {ratio: 2}}\n"),
            6,
            "ratio: must be the least and the largest number, such as",
        ),
        (
            ("data:\n", "data:\n  cache_features: true\n  augmentation: {random_horizontal_flip: 0.5}\n"),
            6,
            "data.cache_features: does not go with `augmentation`",
        ),
        (("some/encoder\n", "[a, b]\n  vision_feature_select_strategy: full\n"), 4, "full is for one encoder"),
        (("data:\n", "  tiling: {type: tile}\ndata:\n"), 5, "model.tiling.type: "),
        (("data:\n", "  tiling: {max_tiles: 1}\ndata:\n"), 5, "model.tiling.max_tiles: "),
        (("data:\n", "  tiling: {grids: [[2]]}\ndata:\n"), 5, "each is [rows, columns], of at most"),
        (("data:\n", "  tiling: {grids: [[2, 4]]}\ndata:\n"), 5, "at most `max_tiles` tiles (6); not [2, 4]"),
        (("data:\n", "  tiling: {type: internvl, grids: [[2, 2]]}\ndata:\n"), 5, "has a rule of its own"),
        (("data:\n", "  tiling: {type: idefics3, max_tiles: 3}\ndata:\n"), 5, "4 is the smallest of several"),
        (("data:\n", "  image_aspect_ratio: pad\n  tiling: {}\ndata:\n"), 5, "pad does not go with `tiling`"),
        (
            ("data:\n", "  adapter: {fusion: cross_attention}\n  tiling: {type: anyres}\ndata:\n"),
            6,
            "model.tiling.type: anyres puts tokens in reading order",
        ),
        (
            ("data:\n", "  tiling: {type: anyres}\n  vision_feature_select_strategy: full\ndata:\n"),
            6,
            "full keeps class tokens",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(tmp_path: Path, change: tuple[str, str], line: int, message: str) -> None:
    assert GOOD.count(change[0]) == 1
    said = refusal(tmp_path, GOOD.replace(*change))
    assert f"mine.yaml:{line} " in said
    assert message in said
    assert "pydantic" not in said.lower()
    assert "Input should" not in said


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, GOOD.replace("vision:", "visoin:").replace("max_steps", "max_stps"), "seed=x")
    assert "3 problems" in said
    assert "command line  seed: must be a whole number" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("- a\n- b\n", "a recipe is a list of `key: value` lines"),
        ("model: {vision: x\n", "not valid YAML"),
        ("model:\n\tvision: x\n", "indent with spaces"),
        ("seed: 1\nmodel: {}\nseed: 2\n", "mine.yaml:3  seed: written twice, first at mine.yaml:1"),
        ("model: &a [*a]\n", "contains itself"),
        ("a: !!python/object/apply:os.getcwd []\n", "os.getcwd has no meaning in a recipe"),
        ("? [a]\n: 1\n", "a key must be a plain word"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_overrides(tmp_path: Path) -> None:
    loaded = load(tmp_path, STAGES, "stages.0.train.max_steps=9", "stages.1.lora.r=4", "evaluation.limit=3", "seed=7")
    assert loaded.stages[0].train["max_steps"] == 9
    assert loaded.stages[1].lora is not None
    assert loaded.stages[1].lora.r == 4
    assert (loaded.evaluation.limit, loaded.seed) == (3, 7)
    assert load(tmp_path, GOOD, "trainable.projector=5e-4").stages[0].learning_rates == {"projector": 5e-4}
    assert load(tmp_path, GOOD, "stages.0.train.max_steps=9").stages[0].train == {"max_steps": 9}
    assert load(tmp_path, GOOD, "lora={r: 4}").stages[0].lora is not None


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("true", True), ("false", False)])
def test_whether_features_are_kept(tmp_path: Path, text: str, value: object) -> None:
    assert load(tmp_path, GOOD).data.cache_features == "auto"
    chosen = load(tmp_path, GOOD, f"data.cache_features={text}").data.cache_features
    assert (chosen, type(chosen)) == (value, type(value))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_stps=1", "command line  train.max_stps: no such field of TrainingArguments; did you mean"),
        ("evalution.limit=1", "command line  evalution: unknown key; did you mean 'evaluation'?"),
        ("train.max_steps", "an override looks like key=value"),
        ("=1", "an override looks like key=value"),
        ("seed=[", "command line  seed=["),
        ("seed.x=1", "command line  seed: must be a whole number"),
        ("model.vision.x=1", "model.vision is 'some/encoder', which has nothing inside"),
        ("stages.1.train.max_steps=1", "mine.yaml has one stage"),
    ],
)
def test_overrides_that_are_wrong(tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal(tmp_path, GOOD, override)


def test_an_override_of_a_stage_that_is_not_there(tmp_path: Path) -> None:
    assert "stages has items 0 to 1, there is no '2'" in refusal(tmp_path, STAGES, "stages.2.train.max_steps=1")
    assert "train: this recipe has `stages`" in refusal(tmp_path, STAGES, "train.max_steps=1")


def test_contradictions_between_stages(tmp_path: Path) -> None:
    assert "two stages called 'align'" in refusal(tmp_path, STAGES.replace("tune", "align"))
    assert "LoRA trains the language model already" in refusal(tmp_path, STAGES, "stages.1.trainable={language: 1e-5}")
    assert "stages.0.trainable: nothing would learn" in refusal(tmp_path, STAGES, "stages.0.trainable={}")


def test_paths_are_looked_for_beside_the_recipe_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside / "images", here / "images", here / "llm", beside / "some" / "encoder"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    text = GOOD.replace("some/llm", "llm")
    loaded = load(beside, text)
    assert loaded.data.train["path"] == str(beside / "images")
    assert loaded.data.base_dir == str(beside)
    assert loaded.model.vision == str(beside / "some" / "encoder")
    assert loaded.model.language == str(here / "llm")
    assert load(beside, text, "model.language=org/name").model.language == "org/name"
    (beside / "images").rmdir()
    assert load(beside, text).data.train["path"] == str(here / "images")
    assert load(beside, text, "data.base_dir=/elsewhere").data.base_dir == "/elsewhere"


def test_the_cache_folder_and_home_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_HOME", "/cache")
    monkeypatch.setenv("HOME", "/home/me")
    loaded = load(tmp_path, GOOD.replace("some/llm", "${VLM_HOME}/llm"), "data.train.path=~/photos")
    assert loaded.model.language == "/cache/llm"
    assert loaded.data.train["path"] == "/home/me/photos"
    monkeypatch.delenv("VLM_HOME")
    assert recipe_paths.home() == Path("/home/me/.cache/vlm")


def test_a_model_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_HOME", str(tmp_path))
    recipe.require_models(load(tmp_path, GOOD))  # Hub names: not looked up
    loaded = load(tmp_path, GOOD, "model.vision=${VLM_HOME}/clip", "model.language=./llm")
    with pytest.raises(RecipeError) as caught:
        recipe.require_models(loaded)
    assert str(caught.value).splitlines() == [
        f"model.vision: there is no folder {tmp_path}/clip; `vlm fetch clip` gets it",
        "model.language: there is no folder ./llm",
    ]


def test_the_builder_of_data_files_is_not_taken_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "a.jsonl").touch()
    source = "{format: dataset, path: json, data_files: '*.jsonl', columns: {image: i, caption: c}}"
    train = load(tmp_path, GOOD.replace("{format: image_folder, path: images}", source)).data.train
    assert train["path"] == "json"
    assert train["data_files"] == str(tmp_path / "*.jsonl")


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        recipe.load("quikstart")


def test_data_from_the_command_line() -> None:
    data = recipe.parse_data(["format=image_folder", "path=/x", "limit=3"])
    assert data.train == {"format": "image_folder", "path": "/x", "limit": 3}
    with pytest.raises(RecipeError, match="command line  pth: unknown key; did you mean 'path'"):
        recipe.parse_data(["format=image_folder", "pth=/x"])
    assert recipe.parse_data(["quickstart"]).train["format"] == "image_folder"


def test_every_field_of_training_arguments_is_either_set_by_us_or_settable() -> None:
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(recipe_train.training_fields()) | recipe_train.REFUSED.keys() == names | recipe_train.STOPPING.keys()
    assert not set(recipe_train.training_fields()) & recipe_train.REFUSED.keys()


def test_every_default_of_training_arguments_passes_the_check() -> None:
    defaults = {
        field.name: field.default if field.default is not dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(TrainingArguments)
        if field.name not in recipe_train.REFUSED
    }
    assert recipe_train.check(defaults) == []


def test_several_encoders_layers_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "eyes").mkdir()
    model = "vision: [./eyes, ./more, some/encoder]\n  vision_feature_layer: [-2, -8]\n  image_size: [224, 256, 256]"
    loaded = load(tmp_path, GOOD.replace("vision: some/encoder", model))
    assert loaded.model.encoders == [str(tmp_path / "eyes"), "./more", "some/encoder"]
    assert (loaded.model.vision_feature_layer, loaded.model.image_size) == ([-2, -8], [224, 256, 256])
    with pytest.raises(recipe.RecipeError, match=r"model\.vision: there is no folder \./more$"):
        recipe.require_models(loaded)


def test_every_option_of_a_new_model_is_a_key_of_the_model_section() -> None:
    from vlm.build import build
    from vlm.configuration import VLMConfig

    made = recipe_model.Model(vision="v", language="l")
    keys = {**dict(made), **dict(made.adapter)}
    parameters = inspect.signature(build).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
    config = VLMConfig()
    bridge = {name: getattr(config, name) for name in VLMConfig.__annotations__}
    of_training = {"data_dependent_init", "quantization_config"}
    assert keys.keys() - {*options, *bridge} == {"preset", "pretrained", "adapter", *of_training}
    found_while_building = {"image_token_id", "image_seq_length", "vision_hidden_size", "tie_word_embeddings"}
    assert bridge.keys() - keys.keys() == {"vision_config", "text_config", *found_while_building}
    assert options.keys() <= keys.keys()
    for name, default in (options | bridge).items():
        if name in keys and default is not inspect.Parameter.empty:
            assert keys[name] == default


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        ("per_device_train_batch_size: 0", 10, "train.per_device_train_batch_size: must be at least 1, not 0"),
        ("gradient_accumulation_steps: 0", 10, "train.gradient_accumulation_steps: must be at least 1, not 0"),
        ("num_train_epochs: .inf", 10, "train.num_train_epochs: must be a finite number, not inf"),
        ("num_train_epochs: 0", 10, "train.num_train_epochs: must be more than 0, not 0"),
        ("max_steps: 0", 10, "train.max_steps: must be at least 1, or -1"),
        ("weight_decay: .nan", 10, "train.weight_decay: must be a finite number, not nan"),
        ("save_steps: 1.5", 10, "train.save_steps: must be a whole number of steps"),
        ("adam_beta1: 5", 10, "train.adam_beta1: must be less than 1, not 5"),
        ("dataloader_num_workers: -1", 10, "train.dataloader_num_workers: must be at least 0, not -1"),
        ("ddp_timeout: 1000000000000", 10, "train.ddp_timeout: must be at most 1000000000, not"),
        ("log_level: loud", 10, "train.log_level: 'loud' is not one of its values"),
        ("report_to: [1]", 10, "train.report_to: must be a list of names, not [1]"),
        ("max_steps: " + "9" * 5000, 10, "has 5,000 digits; write a shorter number"),
        ("max_steps: " + "9" * 30, 10, "train.max_steps: must be a smaller number, not 999"),
        ("max_steps: " + "[" * 300 + "]" * 300, 1, "values inside values, over 50 deep"),
        ("max_steps: " + "[" * 60 + "]" * 60, 10, "values inside values, over 50 deep"),
        ("bf16: !!bool maybe", 10, "'maybe' is not what the tag !!bool says"),
        ("run_name: !!timestamp x", 10, "the tag !!timestamp has no meaning in a recipe"),
        ("run_name: !!set {a}", 10, "the tag !!set has no meaning in a recipe"),
        ("run_name: \x00", 10, "not valid YAML: the character '\\x00' (column 13)"),
        ('run_name: "\\ud800"', 10, "train.run_name: must be valid Unicode, not '\\ud800'"),
        ("run_name: a: b", 10, "put text with special characters in quotes (column 14)"),
        ("<<: 3", 10, "`<<` merges sections of `key: value` lines"),
        ("<<: {[a]: 1}", 10, "a key must be a plain word"),
    ],
)
def test_a_value_that_fails_late_is_refused(tmp_path: Path, change: str, line: int, message: str) -> None:
    said = refusal(tmp_path, GOOD.replace("max_steps: 5", change))
    assert message in said
    assert len(said) < 500
    assert line == 1 or f"mine.yaml:{line}" in said


@pytest.mark.parametrize("key", ["trainable.projector", "data.max_bad", "evaluation.limit", "data.train.limit", "seed"])
def test_a_number_that_is_none_on_the_command_line(tmp_path: Path, key: str) -> None:
    assert f"command line  {key}: must be a finite number, not nan" in refusal(tmp_path, GOOD, f"{key}=.nan")


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    for name, message in {
        str(tmp_path): f"is a folder; its recipe is {tmp_path / 'recipe.yaml'}",
        "/dev/null": "/dev/null is no file",
        "x" * 5000: "there is no file 'xxx",
        f"/{'folder/' * 20}mine.yaml": "folder/mine.yaml'",
        "~no-such-user/x\x00": "there is no file",
    }.items():
        with pytest.raises(RecipeError, match=re.escape(message)):
            recipe.load(name)
    (tmp_path / "wide.yaml").write_bytes(GOOD.encode("utf-16"))
    with pytest.raises(RecipeError, match="cannot be read as text"):
        recipe.load(tmp_path / "wide.yaml")


def test_paths_that_no_file_can_have(tmp_path: Path) -> None:
    for path in ("x" * 300, "~no-such-user/x", "**x/*", "a" * 5000 + "*"):
        assert load(tmp_path, GOOD, f"data.train.path='{path}'").data.sources[0]["path"] == path


@pytest.mark.parametrize(
    ("option", "value"),
    [("num_image_tokens", 0), ("num_image_tokens", "9"), ("depth", True), ("variant", "x"), ("rms_norm_eps", 2)],
)
def test_options_of_a_projector_are_checked(tmp_path: Path, option: str, value: object) -> None:
    projector = f"model.adapter={{projector: {{type: resampler, {option}: {value}}}}}"
    if value == "9":
        projector = projector.replace("9", "'9'")
    assert f"model.adapter.projector.{option}: must be " in refusal(tmp_path, GOOD, projector)


def _garbage() -> list[str]:
    return ["3", "-1", "1.5", "'x y'", "[]", "[[3]]", "[x, 3]", "{a: 1}", "true", "null", "'1'", "1e9"]


def test_no_message_is_in_the_words_of_a_library(tmp_path: Path) -> None:
    """Any value under any key of a section or a data source."""
    keys = [
        *(f"model.{key}" for key in recipe_model.Model.model_fields),
        *(f"model.adapter.{key}" for key in recipe_model.Adapter.model_fields),
        *(f"model.tiling.{key}" for key in recipe_model.Tiling.model_fields),
        *(f"data.{key}" for key in recipe_data.Data.model_fields),
        *(f"data.train.{key}" for key in DatasetSource.model_fields),
        *(f"evaluation.{key}" for key in Evaluation.model_fields),
        *(f"lora.{key}" for key in recipe.Lora.model_fields),
        *(f"contrastive.{key}" for key in Contrastive.model_fields),
        *("name", "seed", "output_dir", "trainable", "lora", "data.train.columns.image", "evaluation.classification.a"),
    ]
    text = GOOD.replace("{format: image_folder, path: images}", "{format: dataset, path: a, columns: {caption: b}}")
    found = []
    for key in keys:
        for value in _garbage():
            try:
                load(tmp_path, text, f"{key}={value}")
            except RecipeError as error:
                found.append(str(error))
    assert len(found) > len(keys)
    for said in found:
        assert not re.search(
            "Input should|validation error|Value error|[Pp]ydantic|at most .* after|pattern|str\\b", said
        ), said
        assert not re.search(r"\.(str|int|float|list\[.*?\]|dict\[.*?\]|literal\[.*?\]|constrained-.*)[.:]", said), said


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (("path: images", "path: images, limit: x"), 6, "data.train.limit: must be a whole number, not 'x'"),
        (("path: images", "path: images, limit: '3'"), 6, "data.train.limit: must be a whole number, not '3'"),
        (("path: images", "path: images, allow_outside: yes"), 6, "allow_outside: must be true or false, not 'yes'"),
        (("train:\n  max", "name: a b\ntrain:\n  max"), 9, "name: must be letters, digits, `.`, `-` and `_`"),
        (("data:\n", "  image_markers: [a]\ndata:\n"), 5, "image_markers: must have at least 2 items, not 1"),
        (("data:\n", "  image_markers: [a, b, c]\ndata:\n"), 5, "image_markers: must have at most 2 items, not 3"),
        (
            ("data:\n", "  adapter: {fusion: cross_attention, cross_attention_layers: [x]}\ndata:\n"),
            5,
            "cross_attention_layers: must be a list of whole numbers or mllama, not ['x']",
        ),
        (("max_steps: 5", "max_steps: 5\n---\na: 1"), 11, "a second document begins here (---)"),
        (
            ("  max_steps: 5", "  max_steps:5"),
            9,
            "must be a section of `key: value` lines, not 'max_steps:5'; put a space",
        ),
        (
            ("{format: image_folder, path: images}", "null"),
            6,
            "data.train: must be a section of `key: value` lines or a",
        ),
    ],
)
def test_a_value_of_another_form_is_named_once(
    tmp_path: Path, change: tuple[str, str], line: int, message: str
) -> None:
    said = refusal(tmp_path, GOOD.replace(*change))
    assert f"mine.yaml:{line}" in said
    assert message in said
    assert "problems" not in said
