"""A checkpoint with its code loads where this package cannot be imported, and answers as it does here."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.counterparts import PHOTO, export, fit
from tests.tiny import continuation, encode, logits, small_projector, tiny, user
from vlm import generation
from vlm.errors import UserError
from vlm.modeling import VLMForConditionalGeneration
from vlm.processing import VLMProcessor
from vlm.remote_code import code, write
from vlm.vision_towers import VisionTowersConfig

CASES = {
    "flamingo": {"projector": small_projector("resampler"), "fusion": "cross_attention"},
    "mllama": {
        "projector": small_projector("qformer") | {"use_qformer_text_input": True},
        "fusion": "cross_attention_layers",
    },
    "tiles": {"projector": "pixel_shuffle", "tiling": {"type": "tiles", "max_tiles": 4}},
    "gemma3": {"decoder": "gemma3", "projector": "linear", "image_attention": "bidirectional"},
    "paligemma": {"decoder": "gemma2", "image_attention": "prefix_lm", "chat_template": "paligemma"},
}

WITHOUT_VLM = """
import sys
sys.modules["vlm"] = None  # any import of it fails
import json, torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

for folder in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(folder + "/out", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder + "/out", trust_remote_code=True)
    inputs = processor.apply_chat_template(json.load(open(folder + "/messages.json")), tokenize=True, return_dict=True,
        add_generation_prompt=True, processor_kwargs={"return_tensors": "pt"})
    with torch.no_grad():
        logits = model(**inputs).logits
    said = model.generate(**inputs, do_sample=False, min_new_tokens=5, max_new_tokens=5)
    said = said[:, inputs["input_ids"].shape[1] :].contiguous()
    save_file({"input_ids": inputs["input_ids"], "logits": logits, "said": said}, folder + "/found.safetensors")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    made = {}
    for name, options in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        model, processor = tiny(**options)
        fit(model)
        export(model, processor, "remote_code", folder)
        made[name] = model, processor, folder
    cache = {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    folders = [str(folder) for *_, folder in made.values()]
    subprocess.run([sys.executable, "-c", WITHOUT_VLM, *folders], check=True, cwd=folder, env=os.environ | cache)
    return made


@pytest.mark.parametrize("name", CASES)
def test_it_answers_as_here(exported, name):
    model, processor, folder = exported[name]
    found = load_file(folder / "found.safetensors")
    inputs = encode(processor, [[user(PHOTO, "what is it ?")]])
    assert torch.equal(found["input_ids"], inputs["input_ids"])
    assert (found["logits"] - logits(model, **inputs)).abs().max() < 1e-5
    assert found["said"].tolist() == continuation(model, inputs, 5)


def test_here_it_loads_as_the_model_of_this_package(exported):
    model, processor = generation.load(str(exported["flamingo"][2] / "out"), device="cpu")
    assert type(model) is VLMForConditionalGeneration
    assert type(processor) is VLMProcessor


def test_several_encoders_are_refused(tmp_path):
    model, processor = tiny()
    model.config.vision_config = VisionTowersConfig()
    with pytest.raises(UserError, match="several encoders side by side"):
        write(model, processor, tmp_path)


def test_the_code_is_that_of_the_model_and_no_more():
    files = code()
    assert {"modeling.py", "configuration.py", "processing.py", "adapters_projectors.py"} <= files.keys()
    assert not {"recipe.py", "cli.py", "data_dataset.py", "training_trainer.py"} & files.keys()
    for name, text in files.items():
        compile(text, name, "exec")
        assert "from vlm" not in text
        assert "import vlm" not in text
