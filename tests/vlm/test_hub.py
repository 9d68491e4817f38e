"""Pushing a run: to a stand-in Hub, and back by name with the code of its card, as a user would load it."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from tests import fake_hub, tiny
from tests.dual_encoders import save_dual
from tests.fake_hub import TOKEN, FakeHub
from tests.stock import stock
from tests.training.helpers import LORA
from vlm.dual_encoder import DualEncoderConfig, DualEncoderModel
from vlm.errors import UserError
from vlm.hub import push
from vlm.model_card import model_card
from vlm.publication import prepare
from vlm.training.parts import add_lora

hub = fake_hub.hub

REPO = "someone/tiny"
SUMMARY = {
    "metrics": {
        "cider_d": {"score": 0.8125, "interval": [0.7, 0.9], "blind_score": 0.125, "blind_interval": [0.1, 0.15]},
        "exact_match": {"score": 0.5, "interval": None, "blind_score": None, "blind_interval": None},
    }
}

AND_THEN = """
import torch
from safetensors.torch import load_file, save_file
with torch.no_grad():
    save_file({"logits": model.eval()(**load_file("inputs.safetensors")).logits}, "outputs.safetensors")
"""


@pytest.fixture(scope="module")
def made():
    """A small model of ours, with a bridge of both kinds, and its processor."""
    return tiny.tiny(fusion="prefix+cross_attention")


@pytest.fixture
def inputs(made):
    return dict(tiny.encode(made[1], [[tiny.user(tiny.image(), "Describe the image.")]]))


@pytest.fixture
def run_dir(tmp_path: Path, made) -> Path:
    """A finished run: checkpoint, resolved recipe, scores, environment, and what the trainer leaves beside them."""
    model, processor = made
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


AND_THEN_COMPARE = """
from safetensors.torch import save_file
save_file({"logits": model.eval()(**inputs).logits_per_image.detach()}, "outputs.safetensors")
"""


def load_by_name(hub: FakeHub, tmp_path: Path, inputs: dict, and_then: str = AND_THEN) -> torch.Tensor:
    """Logits of the model that a process without this package gets from the Hub by the code in the card, unchanged."""
    save_file(inputs, tmp_path / "inputs.safetensors")
    tiny.image().save(tmp_path / "photo.jpg")
    code = card_of(hub, tmp_path).text.split("```python\n")[1].split("```")[0]
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    visitor = "" if "from vlm." in code else 'import sys\nsys.modules["vlm"] = None  # any import of it fails\n'
    done = subprocess.run(
        [sys.executable, "-c", visitor + code + and_then], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "outputs.safetensors")["logits"]


def card_of(hub: FakeHub, tmp_path: Path) -> ModelCard:
    path = tmp_path / "README.md"
    path.write_bytes(hub.repos[REPO].commits[-1].files["README.md"])
    return ModelCard.load(path)


def test_pushed_in_one_commit_and_loaded_back_by_name(hub, run_dir, tmp_path, made, inputs):
    url = push(run_dir, REPO, token=TOKEN)

    assert url == f"{hub.endpoint}/{REPO}"
    assert len(hub.repos[REPO].commits) == 2  # creation and one
    files = hub.repos[REPO].commits[-1].files
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "README.md"} <= files.keys()
    assert "evaluation/summary.json" in files
    assert not [name for name in files if name.endswith(".bin")]
    assert torch.equal(load_by_name(hub, tmp_path, inputs), tiny.logits(made[0], **inputs))


@pytest.mark.slow
def test_a_model_without_a_chat_template_is_loaded_by_the_code_of_its_card(hub, run_dir, tmp_path):
    shutil.rmtree(run_dir / "model")
    model, processor = stock("paligemma")
    for part in (model, processor):
        part.save_pretrained(run_dir / "model")
    inputs = processor(images=tiny.image(), text="<image>Describe the image.", return_tensors="pt")
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    push(run_dir, REPO, token=TOKEN)

    assert torch.equal(load_by_name(hub, tmp_path, inputs), tiny.logits(model, **inputs))


@pytest.mark.slow
@pytest.mark.parametrize("ours", [True, False])
def test_a_dual_encoder_is_compared_by_the_code_of_its_card(hub, run_dir, tmp_path, ours):
    shutil.rmtree(run_dir / "model")
    save_dual(run_dir / "model")
    model, processor = (each.from_pretrained(run_dir / "model") for each in (AutoModel, AutoProcessor))
    if ours:
        config = DualEncoderConfig(
            vision_config=model.vision_model.config,
            text_config=model.text_model.config,
            vision_pooled_size=model.vision_model.config.hidden_size,
            projection_dim=16,
        )
        model = DualEncoderModel(config)
        model.save_pretrained(run_dir / "model")
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"contrastive": {"loss": "infonce"}}))
    push(run_dir, REPO, token=TOKEN)

    card = card_of(hub, tmp_path)
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert ("trust_remote_code=True" in card.text) == ours
    assert "Blind is a random order." in card.text
    texts = ["a photo of a cat.", "a photo of a dog."]
    tiny.image().save(tmp_path / "photo.jpg")
    photo = Image.open(tmp_path / "photo.jpg")
    expected = model.eval()(**processor(images=[photo], text=texts, return_tensors="pt", padding=True))
    found = load_by_name(hub, tmp_path, {}, AND_THEN_COMPARE)
    torch.testing.assert_close(found, expected.logits_per_image.detach())


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
    assert f'AutoModelForImageTextToText.from_pretrained("{REPO}", trust_remote_code=True)' in card.text
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    expected = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    expected["model"]["language"] = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the folder is a copy of
    assert recipe == expected
    assert yaml.safe_load(hub.repos[REPO].commits[-1].files["recipe.yaml"]) == expected


def test_a_run_without_recipe_and_scores_has_a_card_too(hub, run_dir, tmp_path):
    for name in ("recipe.yaml", "environment.json", "evaluation/summary.json"):
        (run_dir / name).unlink()
    push(run_dir, REPO, token=TOKEN)

    assert card_of(hub, tmp_path).data.eval_results is None


@pytest.fixture
def lora_run(run_dir, made):
    """The run with LoRA and a bridge trained beside it, laid out as training does, and the model it started from."""
    start = made[0]
    lora = LORA | {"r": 2, "use_rslora": True}
    trained = add_lora(copy.deepcopy(start), lora, {"projector": 1e-3, "fusion": 1e-3, "lora": 1e-3})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    trained.save_pretrained(str(run_dir / "adapter"))
    trained.merge_and_unload().save_pretrained(run_dir / "model")
    return run_dir


def model_of(run: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(run / "model").eval()


def test_lora_is_merged(hub, lora_run, made, inputs):
    push(lora_run, REPO, token=TOKEN)

    files = hub.repos[REPO].commits[-1].files
    assert not [name for name in files if name.startswith("adapter/")]
    assert files["model.safetensors"] == (lora_run / "model" / "model.safetensors").read_bytes()
    assert not torch.allclose(tiny.logits(model_of(lora_run), **inputs), tiny.logits(made[0], **inputs), atol=0.1)


@pytest.mark.slow
def test_lora_is_kept_apart_when_asked(hub, lora_run, tmp_path, made, inputs):
    """At the root the model that training started from, with the bridge as trained; with the adapter, the whole."""
    push(lora_run, REPO, token=TOKEN, merge_lora=False)

    files = hub.repos[REPO].commits[-1].files
    assert files["adapter/adapter_model.safetensors"] == (lora_run / "adapter/adapter_model.safetensors").read_bytes()
    assert json.loads(files["adapter/adapter_config.json"])["base_model_name_or_path"] == REPO
    (tmp_path / "root.safetensors").write_bytes(files["model.safetensors"])
    root, start = load_file(tmp_path / "root.safetensors"), load_file(weights_of(made[0], tmp_path))
    assert root.keys() == start.keys()
    bridge = {name for name in start if "multi_modal_projector" in name or "cross_attention" in name}
    merged = load_file(lora_run / "model" / "model.safetensors")
    for name in start:
        torch.testing.assert_close(root[name], (merged if name in bridge else start)[name], msg=name)
    learnt = {name for name in bridge if "standardize" not in name}
    assert not any(torch.equal(merged[name], start[name]) for name in learnt)
    torch.testing.assert_close(
        load_by_name(hub, tmp_path, inputs), tiny.logits(model_of(lora_run), **inputs), atol=1e-4, rtol=1e-4
    )


def weights_of(model: torch.nn.Module, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "start")
    return tmp_path / "start" / "model.safetensors"


def test_without_lora_there_is_nothing_to_keep_apart(hub, run_dir):
    with pytest.raises(UserError, match="nothing to keep apart"):
        push(run_dir, REPO, token=TOKEN, merge_lora=False)
    assert hub.requests == []


def test_a_merged_push_takes_the_place_of_an_unmerged_one(hub, lora_run):
    """Stale weights go in the same commit; files that are none of ours stay."""
    push(lora_run, REPO, token=TOKEN, merge_lora=False)
    hub.repos[REPO].commits[-1].files["notes.txt"] = b"mine"
    push(lora_run, REPO, token=TOKEN)

    files = hub.repos[REPO].commits[-1].files
    assert len(hub.repos[REPO].commits) == 3
    assert not [name for name in files if name.startswith("adapter/")]
    assert files["notes.txt"] == b"mine"


def test_only_files_of_the_model_are_pushed(hub, run_dir, tmp_path):
    model = run_dir / "model"
    left_out = ["notes.txt", "keys.json", "optimizer.pt", "pytorch_model.bin", ".env", "photos/cat.safetensors"]
    for name in left_out:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("MINE")
    (tmp_path / "elsewhere").write_text("MINE")
    (model / "vocab.txt").symlink_to(tmp_path / "elsewhere")
    (model / "adapter").symlink_to(tmp_path, target_is_directory=True)
    publication = prepare(run_dir, REPO, tmp_path / "scratch", merge_lora=True, target=None)

    assert {*left_out, "vocab.txt", "adapter", "training_args.bin"} == publication.left_out.keys()
    assert publication.left_out["vocab.txt"] == "a link"
    listing = publication.listing()
    assert "not uploaded: notes.txt (no file of the model)" in listing
    assert f"{(model / 'model.safetensors').stat().st_size:,} bytes  model.safetensors" in listing
    push(run_dir, REPO, token=TOKEN)
    files = hub.repos[REPO].commits[-1].files
    assert files.keys() == publication.files.keys() | {".gitattributes"} & files.keys()
    assert not any(b"MINE" in content for content in files.values())


def test_weights_that_are_a_link_are_not_pushed(hub, run_dir, tmp_path):
    (run_dir / "model" / "model.safetensors").rename(tmp_path / "weights")
    (run_dir / "model" / "model.safetensors").symlink_to(tmp_path / "weights")
    with pytest.raises(UserError, match=r"no weights that can be uploaded .*model\.safetensors is a link"):
        push(run_dir, REPO, token=TOKEN)
    assert hub.requests == []


def test_no_published_file_names_a_folder_or_a_credential(hub, run_dir, tmp_path):
    secrets = ["hf_AbCdEfGhIjKlMnOpQrSt", "me:pass@", "X-Amz-Signature", "hunter2"]
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe |= {
        "output_dir": str(tmp_path / "run"),
        "train": {"hub_token": secrets[0], "run_name": f"of {tmp_path}/run by {secrets[0]}"},
        "data": {
            "base_dir": str(tmp_path),
            "train": [
                {"format": "image_folder", "path": str(tmp_path / "photos" / "cats")},
                {"format": "dataset", "path": "webdataset", "data_files": "s3://me:pass@bucket/{0..9}.tar"},
                {"format": "dataset", "path": "json", "data_files": "https://x.org/a.json?v=2&X-Amz-Signature=5"},
                {"format": "image_folder", "path": "/mnt/elsewhere/dogs", "password": secrets[3]},
            ],
        },
    }
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = json.loads((run_dir / "model" / "config.json").read_text())
    config["text_config"]["_name_or_path"] = str(tmp_path / "smollm2")
    (run_dir / "model" / "config.json").write_text(json.dumps(config))
    summary = SUMMARY | {"data": f"format=image_folder path={tmp_path}/photos"}
    (run_dir / "evaluation" / "summary.json").write_text(json.dumps(summary))
    push(run_dir, REPO, token=TOKEN)

    files = hub.repos[REPO].commits[-1].files
    for name, content in files.items():
        for private in (str(tmp_path), "/mnt/elsewhere", *secrets):
            assert private.encode() not in content, (name, private)
    pushed = yaml.safe_load(files["recipe.yaml"])
    assert pushed["output_dir"] == "./run"
    assert pushed["data"]["base_dir"] == "."
    assert [source.get("path") for source in pushed["data"]["train"]] == [
        "./photos/cats", "webdataset", "json", "./dogs",
    ]  # fmt: skip
    assert [source.get("data_files") for source in pushed["data"]["train"][1:3]] == [
        "s3://bucket/{0..9}.tar", "https://x.org/a.json?v=2",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_model_is_pushed_as_one_of_transformers(hub, run_dir, tmp_path):
    """Nothing of this package is needed to load it, and nothing of its code is there."""
    model, processor = tiny.tiny(projector="mlp")
    shutil.rmtree(run_dir / "model")
    for part in (model, processor):
        part.save_pretrained(run_dir / "model")
    push(run_dir, REPO, token=TOKEN, target="llava")

    files = hub.repos[REPO].commits[-1].files
    assert json.loads(files["config.json"])["model_type"] == "llava"
    assert not [name for name in files if name.endswith(".py")]
    assert "trust_remote_code" not in files["README.md"].decode()
    inputs = dict(tiny.encode(processor, [[tiny.user(tiny.image(), "Describe the image.")]]))
    torch.testing.assert_close(load_by_name(hub, tmp_path, inputs), tiny.logits(model, **inputs), atol=1e-5, rtol=1e-5)


def test_what_a_model_cannot_be_pushed_as(hub, run_dir):
    with pytest.raises(UserError, match="cannot be exported to 'lava'"):
        push(run_dir, REPO, token=TOKEN, target="lava")
    with pytest.raises(UserError, match="leave out --keep-lora"):
        push(run_dir, REPO, token=TOKEN, target="llava", merge_lora=False)
    assert hub.requests == []


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
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 cannot be reached") as error:
        push(run_dir, REPO, token=TOKEN)
    assert f"`vlm push {run_dir} {REPO}`" in str(error.value)
    assert (run_dir / "model" / "config.json").is_file()


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no model/config\.json"):
        push(tmp_path, REPO, token=TOKEN)


@pytest.mark.parametrize("name", ["a/b/c", "nobody", "a/b c", ""])
def test_a_bad_name_is_refused_before_a_token_is_asked_for(hub, run_dir, name):
    with pytest.raises(UserError, match="is not a name for a repository"):
        push(run_dir, name)
    assert hub.requests == []


def test_processor_loads_from_what_was_pushed(hub, run_dir, tmp_path, made):
    push(run_dir, REPO, token=TOKEN)
    for name, content in hub.repos[REPO].commits[-1].files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content)
    processor = AutoProcessor.from_pretrained(tmp_path / "back")
    assert processor.tokenizer.get_vocab() == made[1].tokenizer.get_vocab()
    assert processor.chat_template == made[1].chat_template


@pytest.mark.slow
def test_without_trust_a_visitor_gets_an_error_and_no_bare_tokenizer(hub, run_dir, tmp_path):
    publication = prepare(run_dir, REPO, tmp_path, merge_lora=True, target=None)
    for name, content in publication.files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    visitor = 'import sys\nsys.modules["vlm"] = None\nfrom transformers import AutoProcessor\n'
    done = subprocess.run(
        [sys.executable, "-c", f"{visitor}AutoProcessor.from_pretrained({str(tmp_path / 'back')!r})"],
        env=os.environ | {"HF_HOME": str(tmp_path / "hf_home")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert "trust_remote_code=True" in done.stderr


def test_several_encoders_are_named(run_dir):
    text = (run_dir / "recipe.yaml").read_text()
    recipe = yaml.safe_load(text)
    recipe["model"]["vision"] = ["facebook/dinov2-base", "google/siglip2-base-patch16-224"]
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    card = model_card(run_dir, REPO)
    assert card.data.base_model == [*recipe["model"]["vision"], "HuggingFaceTB/SmolLM2-135M-Instruct"]
    said = (
        "made from `facebook/dinov2-base`, `google/siglip2-base-patch16-224` and `HuggingFaceTB/SmolLM2-135M-Instruct`"
    )
    assert said in card.text
