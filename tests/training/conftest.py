"""What runs on tiny models start from."""

import pytest

from tests.training.helpers import lora_trainer, recipe_values, save_images, save_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(autouse=True)
def vlm_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def values(parts, images, tmp_path):
    return recipe_values(parts, images, tmp_path / "run")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """`lora_trainer` after a run that nothing disturbed."""
    trainer = lora_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer
