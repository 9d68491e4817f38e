"""`vlm export` writes what stock transformers loads without this package, and what it loads answers as ours does."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.counterparts import EXPRESSIBLE, PHOTO, PROMPTED, WITHOUT_STATISTICS, export, fit
from tests.tiny import encode, logits, user
from vlm.cli import app

WITHOUT_VLM = """
import sys
sys.modules["vlm"] = None  # any import of it fails
import json, torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

for folder in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder + "/out", output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(folder + "/out")
    messages = json.load(open(folder + "/messages.json"))
    if processor.chat_template is None:
        photo, question = messages[0]["content"]
        text = question["text"] if "Blip" in type(processor).__name__ else "<image>" + question["text"]
        inputs = processor(images=Image.open(photo["path"]), text=text, return_tensors="pt")
        inputs.pop("labels", None)
    else:
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True,
            processor_kwargs={"return_tensors": "pt", "padding": True})
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    said = model.generate(**inputs, do_sample=False, min_new_tokens=5, max_new_tokens=5)
    found = {"input_ids": inputs["input_ids"], "pixels": inputs["pixel_values"].flatten()}
    found |= {"logits": logits, "said": said}
    save_file({k: v.contiguous() for k, v in found.items()}, folder + "/found.safetensors")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """For each of `EXPRESSIBLE` the model of ours, its processor, messages, and the folder that it was exported to."""
    made = {}
    for name, make in EXPRESSIBLE.items():
        folder = tmp_path_factory.mktemp(name.replace(", ", "-"))
        model, processor = make()
        if name not in WITHOUT_STATISTICS:
            fit(model)
        export(model, processor, name, folder)
        made[name] = model, processor, folder
    folders = [str(folder) for *_, folder in made.values()]
    subprocess.run([sys.executable, "-c", WITHOUT_VLM, *folders], check=True, cwd=folder)
    return made


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_transformers_alone_answers_as_ours_does(exported, name):
    model, processor, folder = exported[name]
    found = load_file(folder / "found.safetensors")
    inputs = encode(processor, [[user(PHOTO, "what is it ?")]])
    assert processor.tiler is None or len(inputs["pixel_values"]) > 2
    assert torch.equal(found["input_ids"], inputs["input_ids"])
    assert torch.allclose(found["pixels"], inputs["pixel_values"].flatten(), atol=1e-6)
    assert (found["logits"] - logits(model, **inputs)).abs().max() < 1e-4
    said = model.generate(**inputs, do_sample=False, min_new_tokens=5, max_new_tokens=5)
    assert torch.equal(found["said"], said)
    assert (folder / "out" / "chat_template.jinja").exists() == (name not in PROMPTED)


def test_tensors_have_the_names_that_other_programs_read(exported):
    with safe_open(exported["llava"][2] / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
    } <= names
    read = json.loads((exported["llava"][2] / "out" / "preprocessor_config.json").read_text())
    assert read["image_processor_type"] == "CLIPImageProcessor"


def test_mistakes_are_told(exported):
    folder = exported["llava"][2]
    for command, message in (
        (["export", str(folder / "run"), "--to", "lava"], "did you mean 'llava'?"),
        (["export", str(folder / "run"), "--to", "llava", "--output", str(folder / "out")], "exists already"),
        (["export", str(folder / "out"), "--to", "llava", "--output", str(folder / "new")], "already"),
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert message in result.output
