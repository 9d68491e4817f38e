"""Every recipe that comes with vlm, through the same checks as a user's own."""

from pathlib import Path

import pytest
import yaml

from vlm import recipe
from vlm.recipe_source import read_yaml

FOLDER = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def test_all_are_packaged_and_say_what_they_do() -> None:
    assert sorted(recipe.packaged()) == NAMES
    assert {"quickstart", "easy_vqa", "caption", "vqa"} <= set(NAMES)
    assert all(len(about) > 20 for about in recipe.packaged().values())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_and_comes_back_unchanged(name: str) -> None:
    loaded = recipe.load(name)
    assert loaded == recipe.load(FOLDER / f"{name}.yaml", [f"data.base_dir={loaded.data.base_dir}"])
    assert recipe.from_dict(yaml.safe_load(yaml.safe_dump(loaded.resolved()))) == loaded
    assert loaded.evaluation.metrics, "a recipe of ours ends with a score"


@pytest.mark.parametrize("name", NAMES)
def test_it_asks_in_validation_what_it_asks_in_training(name: str) -> None:
    data = recipe.load(name).data
    assert data.validation is not None
    for key in ("format", "prompt", "question_prompt", "columns"):
        assert data.train.get(key) == data.validation.get(key)
    assert data.train != data.validation


@pytest.mark.parametrize("name", NAMES)
def test_it_means_the_same_to_other_readers_of_yaml(name: str) -> None:
    text = recipe.packaged_text(name)
    assert read_yaml(text, name)[0] == yaml.safe_load(text)
