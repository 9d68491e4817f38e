"""What runs on tiny models start from."""

import pytest
import torch
from transformers import BertConfig, BertModel

from tests.dual_encoders import text_sizes, tokenizer
from tests.training.helpers import TRAIN, lora_trainer, recipe_values, save_images, save_parts


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


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(2)
    BertModel(BertConfig(**text_sizes())).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def pair_values(parts, images, text_encoder, tmp_path):
    """A recipe of contrastive training."""
    values = recipe_values(parts, images, tmp_path / "run")
    values["model"]["language"] = str(text_encoder)
    del values["data"]["max_tokens_per_row"], values["evaluation"], values["lora"]
    values["contrastive"] = {"projection_dim": 16}
    values["trainable"] = {"projector": 1e-2, "language": 1e-3}
    values["train"] = TRAIN | {"per_device_train_batch_size": 5}
    return values
