"""Checkpoints of earlier versions, whose weights have other names: training goes on from them."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.tiny import tiny, with_older_names
from vlm.training.parts import add_lora, loose_parameters, set_trainable
from vlm.training.weights import LOOSE, load_checkpoint

LORA = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "use_rslora": False, "parts": ["language"]}
RATES = {"projector": 1e-3, "lora": 1e-3}
IN_PEFT = "base_model.model."


def moved(model, seed):
    """Other weights in what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_a_checkpoint_of_the_whole_model(fusion, tmp_path):
    model, _ = tiny(fusion=fusion, projector={"type": "resampler", "num_image_tokens": 4})
    set_trainable(model, {"projector": 1e-3, "language": 1e-3})
    wanted = moved(model, 1)
    model.save_pretrained(tmp_path, save_original_format=False)
    path = tmp_path / "model.safetensors"
    save_file(with_older_names(model, load_file(path)), path, metadata={"format": "pt"})
    moved(model, 2)
    load_checkpoint(model, tmp_path)
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("projector", ["mlp", {"type": "resampler", "num_image_tokens": 4}], ids=str)
def test_a_checkpoint_with_lora(projector, tmp_path):
    model, _ = tiny(projector=projector)
    trained = add_lora(model, LORA | {"target_modules": "all-linear"}, RATES)
    set_trainable(trained, RATES)
    assert isinstance(trained, PeftModel)
    wanted = moved(trained, 1)
    trained.save_pretrained(tmp_path)
    if loose := loose_parameters(trained):
        save_file({name: parameter.detach() for name, parameter in loose.items()}, tmp_path / LOOSE)
    for path in tmp_path.glob("*.safetensors"):
        named = {name.removeprefix(IN_PEFT): tensor for name, tensor in load_file(path).items()}
        save_file({IN_PEFT + name: tensor for name, tensor in with_older_names(model, named).items()}, path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = [*with_older_names(model, dict.fromkeys(config["target_modules"]))]
    config["modules_to_save"] = ["multi_modal_projector"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    moved(trained, 2)
    load_checkpoint(trained, tmp_path)
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in trained.named_parameters())
