"""A checkpoint with its code loads where this package cannot be imported, and answers as it does here."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, Dinov2Config, SiglipImageProcessor, SiglipVisionConfig

from tests.counterparts import PHOTO, export, fit
from tests.tiny import (
    byte_level_tokenizer,
    continuation,
    encode,
    logits,
    small_projector,
    text_config,
    tiny,
    user,
    with_older_names,
)
from vlm import generation
from vlm.build import assemble
from vlm.modeling import VLMForConditionalGeneration
from vlm.processing import VLMProcessor
from vlm.remote_code import code
from vlm.vision_towers import side_by_side


def two_encoders():
    """A model whose vision tower is DINOv2 and SigLIP, each with its own image processor."""
    torch.manual_seed(0)
    common = {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    towers = [
        AutoModel.from_config(Dinov2Config(hidden_size=24, layerscale_value=1.0, **common)),
        AutoModel.from_config(SiglipVisionConfig(hidden_size=16, intermediate_size=32, **common)),
    ]
    size = {"height": 32, "width": 32}
    processors = [SiglipImageProcessor(size=size), SiglipImageProcessor(size=size, image_mean=[0.2, 0.3, 0.4])]
    language = AutoModelForCausalLM.from_config(text_config())
    tower, image_processor = side_by_side(towers, processors)
    return assemble(tower, language, image_processor, byte_level_tokenizer(), projector="mlp", fusion="prefix")


CASES = {
    "flamingo": {"projector": small_projector("resampler"), "fusion": "cross_attention"},
    "mllama": {
        "projector": small_projector("qformer") | {"use_qformer_text_input": True},
        "fusion": "cross_attention_layers",
    },
    "tiles": {"projector": "pixel_shuffle", "tiling": {"type": "tiles", "max_tiles": 4}},
    "gemma3": {"decoder": "gemma3", "projector": "linear", "image_attention": "bidirectional"},
    "paligemma": {"decoder": "gemma2", "image_attention": "prefix_lm", "chat_template": "paligemma"},
    "older names": {"fusion": "cross_attention"},
    "two encoders": None,
}

WITHOUT_VLM = """
import sys
sys.modules["vlm"] = None  # any import of it fails
import json, torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline

for folder in sys.argv[1:]:
    model = AutoModelForMultimodalLM.from_pretrained(folder + "/out", trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(folder + "/out", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder + "/out", trust_remote_code=True)
    messages = json.load(open(folder + "/messages.json"))
    answer = pipeline("image-text-to-text", model=folder + "/out", trust_remote_code=True)
    answered = answer(text=messages, return_full_text=False, do_sample=False, min_new_tokens=5, max_new_tokens=5)
    with open(folder + "/answered.json", "w") as file:
        json.dump(answered, file)
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True,
        add_generation_prompt=True, processor_kwargs={"return_tensors": "pt"})
    with torch.no_grad():
        logits = model(**inputs).logits
        states = base(**inputs).last_hidden_state
    said = model.generate(**inputs, do_sample=False, min_new_tokens=5, max_new_tokens=5)
    said = said[:, inputs["input_ids"].shape[1] :].contiguous()
    found = {"input_ids": inputs["input_ids"], "logits": logits, "states": states, "said": said}
    save_file(found, folder + "/found.safetensors")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    made = {}
    for name, options in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        model, processor = two_encoders() if options is None else tiny(**options)
        fit(model)
        export(model, processor, "remote_code", folder)
        if name == "older names":
            weights = folder / "out/model.safetensors"
            save_file(with_older_names(model, load_file(weights)), weights, metadata={"format": "pt"})
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
    [answered] = json.loads((folder / "answered.json").read_text(encoding="utf-8"))
    assert answered["generated_text"] == processor.decode(found["said"][0], skip_special_tokens=True)
    with torch.no_grad():
        assert (found["states"] - model.model(**inputs).last_hidden_state).abs().max() < 1e-5


def test_here_it_loads_as_the_model_of_this_package(exported):
    model, processor = generation.load(str(exported["flamingo"][2] / "out"), device="cpu")
    assert type(model) is VLMForConditionalGeneration
    assert type(processor) is VLMProcessor


def test_the_code_is_that_of_the_model_and_no_more():
    files = code({"model_type": "vlm"})
    assert {"modeling.py", "configuration.py", "processing.py", "adapters_projectors.py"} <= files.keys()
    assert not {"recipe.py", "cli.py", "data_dataset.py", "training_trainer.py"} & files.keys()
    for name, text in files.items():
        compile(text, name, "exec")
        assert "from vlm" not in text
        assert "import vlm" not in text
