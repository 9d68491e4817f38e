"""LoRA in the language model, the vision encoder, or both."""

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import encode, image, tiny, user
from tests.training.helpers import LORA, examples, train, trainer_of
from vlm import generation, recipe
from vlm.errors import UserError
from vlm.training.parts import add_lora, named_parts, set_trainable
from vlm.training.quantization import merged

RATES = {"projector": 1e-3, "lora": 2e-3, "lora_vision": 3e-3}


def adapted(parts, **changes):
    model, processor = tiny()
    trained = add_lora(model, {**LORA, "parts": parts, **changes}, RATES)
    set_trainable(trained, {part: RATES[part] for part in {part for part, _, _ in named_parts(trained)} & set(RATES)})
    return trained, processor


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        (["language"], {"lora"}),
        (["vision"], {"lora_vision"}),
        (["language", "vision"], {"lora", "lora_vision"}),
    ],
)
def test_it_is_where_it_is_asked_for(parts, found, recwarn):
    trained, _ = adapted(parts)
    assert not [str(warning.message) for warning in recwarn if warning.category is FutureWarning]
    learning = {part for part, _, parameter in named_parts(trained) if parameter.requires_grad}
    assert learning == found | {"projector"}
    for part, name, parameter in named_parts(trained):
        if part.startswith("lora"):
            assert parameter.requires_grad, name
            assert ("vision_tower" in name) == (part == "lora_vision")


def test_each_part_has_its_rate(tmp_path):
    trainer = trainer_of(tmp_path, RATES, made=adapted(["language", "vision"]), data=examples(2))
    groups = {group["part"]: group["lr"] for group in trainer.create_optimizer().param_groups}
    assert groups == RATES


def test_merged_it_computes_the_same():
    trained, processor = adapted(["language", "vision"])
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    inputs = encode(processor, [[user(image(1), "what is it?")]])
    with torch.no_grad():
        before = tiny()[0](**inputs).logits
        wanted = trained.eval()(**inputs).logits
        features = trained.get_vision_features(inputs["pixel_values"])[0]
        found = merged(trained)
        assert torch.allclose(found(**inputs).logits, wanted, atol=1e-5)
        assert torch.allclose(found.get_vision_features(inputs["pixel_values"])[0], features, atol=1e-5)
        assert not torch.allclose(tiny()[0].get_vision_features(inputs["pixel_values"])[0], features, atol=1e-2)
    assert not torch.allclose(before, wanted, atol=1e-2)


def test_names_are_looked_for_in_each_part():
    trained, _ = adapted(["language", "vision"], target_modules=["q_proj"])
    assert {name.split(".")[-1] for name in trained.peft_config["default"].target_modules} == {"q_proj"}
    with pytest.raises(UserError, match=r"the vision encoder has no linear layer named \['gate_proj'\]"):
        adapted(["language", "vision"], target_modules=["gate_proj"])


@pytest.mark.parametrize("targets", [["q_proj", "query_key_value"], ["q_prj", "v_proj"], ["v_proj", "lm_head"]])
def test_a_name_that_no_part_has_is_refused(targets):
    wrong = next(name for name in targets if name not in ("q_proj", "v_proj"))
    with pytest.raises(
        UserError, match=rf"no linear layer named '{wrong}' in language; (did you mean 'q_proj'|known: down_proj)"
    ):
        adapted(["language"], target_modules=targets)


def test_each_part_may_have_names_of_its_own():
    trained, _ = adapted(["language", "vision"], target_modules=["gate_proj", "fc1"])
    names = trained.peft_config["default"].target_modules
    assert {name.split(".")[-1] for name in names} == {"gate_proj", "fc1"}
    assert all(("vision_tower" in name) == name.endswith("fc1") for name in names)


def test_the_last_stage_is_checked_before_the_first_one_trains(values, tmp_path):
    stages = [
        {"name": "one", "trainable": {"projector": 1e-2}},
        {"name": "two", "lora": {"target_modules": ["no_proj"]}},
    ]
    changed = {key: value for key, value in values.items() if key not in ("trainable", "lora")} | {"stages": stages}
    train_options = changed.pop("train")
    for stage in stages:
        stage["train"] = train_options
    with pytest.raises(UserError, match="no_proj"):
        train(changed)
    assert not (tmp_path / "run").exists()


def test_a_run_with_both_encodes_images_in_each_step(values, tmp_path):
    """Features of an encoder that learns are not kept, and its LoRA is merged into the saved model as well."""
    lora = {"r": 4, "parts": {"language": 1e-2, "vision": 1e-2}}
    said = train(values | {"lora": lora, "evaluation": {}})
    assert "features:" not in said
    lines = [line.split() for line in said.splitlines()]
    assert any(line[:1] == ["lora_vision"] and line[-1] == "0.01" for line in lines)
    model, _ = generation.load(str(tmp_path / "run"), device="cpu")
    assert not any("lora" in name for name, _ in model.named_parameters())
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert any("vision_tower" in name and "lora_B" in name and tensor.any() for name, tensor in saved.items())


def of(values, **changes):
    return recipe.from_dict(values | changes).stages[0]


def test_rates_by_part_in_a_recipe(values):
    assert of(values, lora={"parts": ["vision"], "learning_rate": 1e-4}).learning_rates == {
        "projector": 1e-2,
        "lora_vision": 1e-4,
    }
    both = of(values, lora={"parts": {"language": 1e-4, "vision": None}}, train={"learning_rate": 5e-6})
    assert both.learning_rates == {"projector": 1e-2, "lora": 1e-4, "lora_vision": 5e-6}
    assert of(values, lora={"learning_rate": 1e-4}).learning_rates == {"projector": 1e-2, "lora": 1e-4}
    resolved = recipe.from_dict(values | {"lora": {"parts": ["language", "vision"]}}).resolved()
    assert recipe.from_dict(resolved).resolved() == resolved


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"lora": {"parts": ["projector"]}}, r"lora\.parts\.projector.*no such part"),
        ({"trainable": {"vision": 1e-5}, "lora": {"parts": ["vision"]}}, "LoRA trains the vision encoder already"),
        ({"lora": {"parts": {"vision": 1e-5}, "learning_rate": 1e-4}}, r"every part under `lora\.parts` has a rate"),
        ({"lora": {"parts": {"vision": 1e-5}}, "train": {"learning_rate": 1e-4}}, "has no effect"),
    ],
)
def test_contradictions(values, changes, why):
    with pytest.raises(recipe.RecipeError, match=why):
        recipe.from_dict(values | changes)
