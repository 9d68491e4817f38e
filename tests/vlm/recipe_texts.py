"""Recipes for tests, loaded or refused."""

from pathlib import Path

import pytest

from vlm import recipe
from vlm.recipe import RecipeError

GOOD = """\
# A recipe for the tests.
model:
  vision: some/encoder
  language: some/llm
data:
  train: {format: image_folder, path: images}
trainable:
  projector: 1e-3
train:
  max_steps: 5
"""


STAGES = """\
model: {vision: some/encoder, language: some/llm}
data:
  train: {format: image_folder, path: images}
stages:
  - {name: align, trainable: {projector: 1e-3}}
  - {name: tune, trainable: [projector], lora: {r: 8}, train: {learning_rate: 2e-4, max_steps: 5}}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> recipe.Recipe:
    (tmp_path / "mine.yaml").write_text(text)
    return recipe.load(tmp_path / "mine.yaml", overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")
