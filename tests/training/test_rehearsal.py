"""What a dry run tries of the end of a run, with models that fail each part; and generation configs that cannot be
saved."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

from tests.tiny import text_config, tiny
from tests.training.helpers import train
from vlm.errors import UserError
from vlm.modeling import VLMForConditionalGeneration
from vlm.processing import VLMProcessor
from vlm.training import rehearsal
from vlm.training import run as running

VICUNA = {"bos_token_id": 1, "eos_token_id": 290, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}


@pytest.fixture
def short(values):
    values["train"] |= {"eval_strategy": "no", "max_steps": 2}
    return values | {"evaluation": {}}


# --- a dry run


def test_a_dry_run_tries_the_end_and_leaves_nothing(short, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    killed = tmp_path / f".{rehearsal.SCRATCH}.12345678.writing"
    killed.mkdir()
    said = train(short, dry_run=True)
    assert "tried the end of the run: pin a batch, save and load the model" in said
    assert "compared by name" not in said
    assert not [*tmp_path.glob(f"*{rehearsal.SCRATCH}*")], "nor what a killed one had left"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_large_weights_are_not_written(short, monkeypatch):
    written = []
    monkeypatch.setattr(rehearsal, "WHOLE", 1)
    monkeypatch.setattr(VLMForConditionalGeneration, "save_pretrained", lambda *args, **kwargs: written.append(args))
    assert "of weights, compared by name and shape, not written" in train(short, dry_run=True)
    assert not written


@pytest.mark.slow
def test_a_contrastive_dry_run(pair_values):
    assert "save and load the model" in (said := train(pair_values, dry_run=True))
    assert "encode two texts at once" in said


def refused(values, what):
    with pytest.raises(UserError, match=rf"(?s)^dry run: {what} failed, which training would end with: "):
        train(values, dry_run=True)


@pytest.mark.slow
def test_a_batch_that_cannot_be_pinned(short, monkeypatch):
    check = rehearsal.pin
    monkeypatch.setattr(rehearsal, "pin", lambda batch: check(batch | {"x": torch.zeros(1, 1).expand(2, 4)}))
    refused(short, "pinning a batch")


@pytest.mark.slow
def test_a_processor_that_cannot_be_saved(short, monkeypatch):
    def fails(self, *args, **kwargs):
        raise TypeError("Object of type dtype is not JSON serializable")

    monkeypatch.setattr(VLMProcessor, "save_pretrained", fails)
    refused(short, "saving the model")


@pytest.mark.slow
def test_a_generation_config_that_cannot_be_saved(short, monkeypatch):
    def breaks(model):
        model.generation_config.temperature = 0.5

    monkeypatch.setattr(running, "make_savable", breaks)
    refused(short, "saving the model")


@pytest.mark.few(1)
@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_do_not_come_back(short, monkeypatch, whole):
    """A layer that the configuration does not tell of."""
    start = running._start_model

    def extended(*args):
        model, processor = start(*args)
        model.model.multi_modal_projector.extra = torch.nn.Linear(2, 2)
        return model, processor

    monkeypatch.setattr(running, "_start_model", extended)
    monkeypatch.setattr(rehearsal, "WHOLE", 2e9 if whole else 1)
    refused(short, "loading the saved model")


@pytest.mark.slow
def test_a_checkpoint_that_does_not_load_in_4_bits(short, monkeypatch):
    pytest.importorskip("bitsandbytes")
    load = AutoModelForImageTextToText.from_pretrained

    def fails(*args, **kwargs):
        if kwargs.get("quantization_config"):
            raise RuntimeError("no kernel")
        return load(*args, **kwargs)

    monkeypatch.setattr(rehearsal.AutoModelForImageTextToText, "from_pretrained", fails)
    short["model"] |= {"quantization_config": {"load_in_8bit": True}}
    refused(short, "loading the saved model in 4 or 8 bits")


def test_a_decoder_that_sees_padding():
    model, processor = tiny()
    rehearsal.answer(model, processor)
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"attention_mask": None, "position_ids": None}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="an answer depends on what is in the batch"):
        rehearsal.answer(model, processor)


# --- generation configs that transformers refuses to save


@pytest.fixture
def vicuna(short, parts, tmp_path):
    """A recipe whose language model comes with settings as Vicuna's."""
    language = tmp_path / "language"
    shutil.copytree(parts / "language", language)
    (language / "generation_config.json").write_text(json.dumps(VICUNA))
    short["model"] |= {"language": str(language)}
    return short


def test_a_model_with_settings_without_effect_is_saved(vicuna, tmp_path):
    said = train(vicuna)
    assert "removed what has no effect, and what transformers refuses to save: temperature 0.9, top_p 0.6" in said
    saved = GenerationConfig.from_pretrained(tmp_path / "run/model")
    assert saved.temperature is None
    assert saved.bos_token_id == 1


@pytest.mark.slow
def test_a_pretrained_model_with_settings_without_effect_is_saved(vicuna, tmp_path):
    train(vicuna)
    pretrained = tmp_path / "run/model/generation_config.json"
    pretrained.write_text(json.dumps(json.loads(pretrained.read_text()) | {"top_k": 3}))
    values = vicuna | {"model": {"pretrained": str(tmp_path / "run/model")}, "output_dir": str(tmp_path / "second")}
    assert "top_k 3" in train(values)
    assert (tmp_path / "second/model/config.json").is_file()


@pytest.mark.slow
def test_a_run_that_could_not_be_saved_goes_on(vicuna, tmp_path, monkeypatch):
    """One that was trained to its end before such settings were removed."""
    with monkeypatch.context() as patch:
        patch.setattr(running, "make_savable", lambda model: None)
        with pytest.raises(ValueError, match="temperature"):
            train(vicuna)
    assert not (tmp_path / "run/model").exists()
    train(vicuna, resume=True)
    assert (tmp_path / "run/model/config.json").is_file()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2


def test_a_generation_config_that_does_not_load_is_named(vicuna, tmp_path):
    (tmp_path / "language/generation_config.json").write_text(json.dumps({"num_return_sequences": 2}))
    with pytest.raises(UserError, match="num_return_sequences"):
        train(vicuna)


@pytest.mark.parametrize("dry_run", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_is_longer_than_learned_positions_is_left_out(short, images, tmp_path, dry_run):
    """GPT-2 has 256: a caption and a prompt over them are left out before training, and the scores are of the rest."""
    model = AutoModelForCausalLM.from_config(text_config("gpt2"))
    model.save_pretrained(tmp_path / "gpt2")
    shutil.copytree(images, tmp_path / "images")
    AutoTokenizer.from_pretrained(short["model"]["language"]).save_pretrained(tmp_path / "gpt2")
    train_file, prompts = tmp_path / "images/train.jsonl", tmp_path / "test.json"
    rows = [json.loads(line) for line in train_file.read_text().splitlines()]
    rows[0]["captions"] = ["no " * 300]
    train_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [
        {"id": n, "image": f"{n}.png", "conversations": [
            {"from": "human", "value": "<image>" + text}, {"from": "gpt", "value": "a cat"}
        ]}
        for n, text in ((10, "What?"), (11, "no " * 300), (12, "What?"))
    ]  # fmt: skip
    prompts.write_text(json.dumps(asked))
    validation = {"format": "llava", "path": str(prompts), "images": str(tmp_path / "images")}
    train_source = short["data"]["train"] | {"path": str(tmp_path / "images")}
    short["data"] |= {"train": train_source, "validation": validation}
    short["model"] |= {"language": str(tmp_path / "gpt2")}
    short["evaluation"] = {"metrics": ["exact_match"], "max_new_tokens": 2}
    said = " ".join(train(short, dry_run=dry_run).split())
    assert "1 answers left out (1 whole examples)" in said
    assert "or the 256 positions of the model" in said
    assert re.search(r"test\.json:row 1 \(id 11\): the prompt has \d+ tokens.* and the model has 256 positions", said)
    if not dry_run:
        summary = json.loads((tmp_path / "run/evaluation/summary.json").read_text())
        assert (summary["n_items"], summary["n_broken"]) == (2, 1)
