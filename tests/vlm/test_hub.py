"""Pushing a run: to a stand-in Hub, and back by name with `from_pretrained` as a user would load it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests import fake_hub
from tests.fake_hub import TOKEN, FakeHub
from vlm.build import assemble
from vlm.errors import UserError
from vlm.hub import push

hub = fake_hub.hub

REPO = "someone/tiny"
SUMMARY = {
    "metrics": {
        "cider_d": {"score": 0.8125, "interval": [0.7, 0.9], "blind_score": 0.125, "blind_interval": [0.1, 0.15]},
        "exact_match": {"score": 0.5, "interval": None, "blind_score": None, "blind_interval": None},
    }
}

LOAD_BY_NAME = """
import sys, vlm, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
name, inputs, outputs = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(name)
AutoProcessor.from_pretrained(name)
with torch.no_grad():
    save_file({"logits": model(**load_file(inputs)).logits}, outputs)
"""


@pytest.fixture(scope="module")
def tiny():
    """A small model of ours, untrained, with its processor."""
    torch.manual_seed(0)
    words = ["<unk>", "<pad>", "<eos>", "user", "assistant", "Describe", "the", "image", ".", ":"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", chat_template=None
    )
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
    )
    language = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return assemble(vision, language, image_processor, tokenizer)


@pytest.fixture
def inputs(tiny):
    _, processor = tiny
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the image ."}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return dict(processor(images=[Image.new("RGB", (20, 16), "red")], text=text, return_tensors="pt"))


@pytest.fixture
def run_dir(tmp_path: Path, tiny) -> Path:
    """A finished run: checkpoint, resolved recipe, scores, environment, and what the trainer leaves beside them."""
    model, processor = tiny
    run = tmp_path / "run"
    model.save_pretrained(run / "model")
    processor.save_pretrained(run / "model")
    (run / "model" / "training_args.bin").write_bytes(b"pickled")
    local = tmp_path / "smollm2"
    local.mkdir()
    (local / "source.json").write_text(json.dumps({"model": "HuggingFaceTB/SmolLM2-135M-Instruct"}))
    recipe = {
        "model": {"vision": "openai/clip-vit-base-patch16", "language": str(local)},
        "data": {"train": {"format": "dataset", "path": "lmms-lab/COCO-Caption"}},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "environment.json").write_text(json.dumps({"packages": {"torch": "2.15.0"}}))
    (run / "evaluation").mkdir()
    (run / "evaluation" / "summary.json").write_text(json.dumps(SUMMARY))
    return run


def load_by_name(hub: FakeHub, tmp_path: Path, name: str, inputs: dict) -> torch.Tensor:
    """Logits of the model that a fresh process loads from the Hub by name."""
    save_file(inputs, tmp_path / "inputs.safetensors")
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    paths = [str(tmp_path / "inputs.safetensors"), str(tmp_path / "outputs.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_BY_NAME, name, *paths], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "outputs.safetensors")["logits"]


def card_of(hub: FakeHub, tmp_path: Path) -> ModelCard:
    path = tmp_path / "README.md"
    path.write_bytes(hub.repos[REPO].commits[-1].files["README.md"])
    return ModelCard.load(path)


def test_pushed_in_one_commit_and_loaded_back_by_name(hub, run_dir, tmp_path, tiny, inputs):
    url = push(run_dir, REPO, token=TOKEN)

    assert url == f"{hub.endpoint}/{REPO}"
    assert len(hub.repos[REPO].commits) == 2  # creation and one
    files = hub.repos[REPO].commits[-1].files
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "README.md"} <= files.keys()
    assert "evaluation/summary.json" in files
    assert not [name for name in files if name.endswith(".bin")]
    with torch.no_grad():
        expected = tiny[0](**inputs).logits
    assert torch.equal(load_by_name(hub, tmp_path, REPO, inputs), expected)


def test_card_says_what_it_is_and_how_it_scores(hub, run_dir, tmp_path):
    push(run_dir, REPO, token=TOKEN)

    card = card_of(hub, tmp_path)
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.library_name == "transformers"
    assert card.data.base_model == ["openai/clip-vit-base-patch16", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert card.data.datasets == ["lmms-lab/COCO-Caption"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"cider_d": 0.8125, "exact_match": 0.5}
    assert "| cider_d | 0.8125 | 0.7000 to 0.9000 | 0.1250 | 0.1000 to 0.1500 |" in card.text
    assert "import vlm" in card.text
    assert f'AutoModelForImageTextToText.from_pretrained("{REPO}")' in card.text
    recipe = card.text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == yaml.safe_load((run_dir / "recipe.yaml").read_text())


def test_the_cards_code_runs(run_dir, tmp_path, monkeypatch):
    """The code in the card is run as it stands, on the folder in place of the name."""
    from vlm.hub import model_card

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 16), "red").save("photo.jpg")
    name = str(run_dir / "model")
    code = model_card(run_dir, name).text.split("```python\n")[1].split("```")[0]
    exec(code, {})


def test_a_run_without_recipe_and_scores_has_a_card_too(hub, run_dir, tmp_path):
    for name in ("recipe.yaml", "environment.json", "evaluation/summary.json"):
        (run_dir / name).unlink()
    push(run_dir, REPO, token=TOKEN)

    assert card_of(hub, tmp_path).data.eval_results is None


@pytest.fixture
def lora_run(run_dir, tiny):
    """The run with LoRA weights that change the answer, and the logits of model and LoRA together."""
    model = AutoModelForImageTextToText.from_pretrained(run_dir / "model")
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    peft_model.save_pretrained(run_dir / "model" / "adapter")
    return run_dir, peft_model.eval()


def test_lora_is_merged(hub, lora_run, tmp_path, tiny, inputs):
    run, peft_model = lora_run
    push(run, REPO, token=TOKEN)

    assert not [name for name in hub.repos[REPO].commits[-1].files if "adapter" in name]
    assert len(hub.repos[REPO].commits) == 2
    logits = load_by_name(hub, tmp_path, REPO, inputs)
    with torch.no_grad():
        torch.testing.assert_close(logits, peft_model(**inputs).logits, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(logits, tiny[0](**inputs).logits, atol=1e-3)


def test_lora_is_kept_apart_when_asked(hub, lora_run, tmp_path):
    run, _ = lora_run
    push(run, REPO, token=TOKEN, merge_lora=False)

    files = hub.repos[REPO].commits[-1].files
    assert files["adapter/adapter_model.safetensors"] == (run / "model/adapter/adapter_model.safetensors").read_bytes()
    assert "model.safetensors" in files
    assert 'subfolder="adapter"' in card_of(hub, tmp_path).text


def test_a_merged_push_takes_the_place_of_an_unmerged_one(hub, lora_run):
    """Stale weights go in the same commit; files that are none of ours stay."""
    run, _ = lora_run
    push(run, REPO, token=TOKEN, merge_lora=False)
    hub.repos[REPO].commits[-1].files["notes.txt"] = b"mine"
    push(run, REPO, token=TOKEN)

    files = hub.repos[REPO].commits[-1].files
    assert len(hub.repos[REPO].commits) == 3
    assert not [name for name in files if name.startswith("adapter/") and name.endswith(".safetensors")]
    assert "adapter/adapter_config.json" not in files
    assert files["notes.txt"] == b"mine"


def test_private(hub, run_dir):
    push(run_dir, REPO, token=TOKEN, private=True)
    assert hub.repos[REPO].private


def test_without_a_token_it_says_how_to_log_in(hub, run_dir, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"hf auth login.*HF_TOKEN"):
        push(run_dir, REPO)
    assert hub.requests == []


def test_a_wrong_token_is_refused(hub, run_dir):
    with pytest.raises(UserError, match="refused the upload to someone/tiny: Invalid username or password"):
        push(run_dir, REPO, token="hf_wrong")


def test_no_server(run_dir, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        push(run_dir, REPO, token=TOKEN)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no model/config\.json"):
        push(tmp_path, REPO, token=TOKEN)


def test_a_bad_name(hub, run_dir):
    with pytest.raises(UserError, match="is not a name for a repository"):
        push(run_dir, "a/b/c", token=TOKEN)


def test_processor_loads_from_what_was_pushed(hub, run_dir, tmp_path, tiny):
    push(run_dir, REPO, token=TOKEN)
    for name, content in hub.repos[REPO].commits[-1].files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    processor = AutoProcessor.from_pretrained(tmp_path / "back")
    assert processor.tokenizer.get_vocab() == tiny[1].tokenizer.get_vocab()
    assert processor.chat_template == tiny[1].chat_template
