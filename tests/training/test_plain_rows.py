"""One row an answer: for which models, found how, and that it trains what trees would."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import JambaConfig, Lfm2Config

from tests.data.test_tree_masks import examples as mixed_examples
from tests.data.test_tree_masks import one_conversation_at_a_time, paligemma, prefixed
from tests.data.test_trees import assert_close, gradients
from tests.stock import stock
from tests.tiny import VOCABULARY, image, text_config, tiny
from tests.training.helpers import (
    TRAIN,
    Killed,
    examples,
    kill_in,
    recipe_values,
    rows_of,
    save_images,
    train,
    trainer_of,
    weights,
)
from vlm import generation
from vlm.data.dataset import TreeCollator, TreeDataset, TreeItem, make_items, one_row_an_answer
from vlm.data.tree_masks import TreeMasks
from vlm.data.trees import make_tree
from vlm.training.checks import why_not_trees
from vlm.training.trainer import supervised_loss
from vlm.tree_attention import tree_attention

X = -100
CPU = torch.device("cpu")
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def lfm2(**changes):
    """Convolutions over the row, and attention."""
    return Lfm2Config(**(COMMON | {"layer_types": ["conv", "full_attention"]} | changes))


def jamba():
    """A recurrent layer, and attention."""
    options = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 4}
    return JambaConfig(**COMMON, **options, use_mamba_kernels=False)


def items_of(processor, made):
    return make_items(
        made, processor, max_length=1000, too_long="error", report=print, progress=lambda steps, total: steps
    )[0]


def why(model, processor, made):
    with tree_attention(model):
        return why_not_trees(model, TreeCollator(processor, masks=TreeMasks(model)), items_of(processor, made), CPU)


@pytest.mark.parametrize("config", [lfm2, jamba])
@pytest.mark.parametrize("branches", [1, 3])
def test_recurrent_layers_are_found(config, branches):
    """Also with an answer an image, where only the row's examples would run into each other."""
    model, processor = tiny(text=config())
    assert "do not follow the mask" in why(model, processor, examples(4, branches))


def test_positions_of_a_models_own_are_found():
    assert "do not follow the mask" in why(*stock("qwen2_vl"), examples(4))


@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3"])
def test_stock_models_for_which_trees_are_exact(name):
    assert why(*stock(name), examples(4)) is None


@pytest.mark.parametrize("decoder", ["llama", "gpt2", "gemma3"])
def test_decoders_for_which_trees_are_exact(decoder):
    assert why(*tiny(decoder, "prefix+cross_attention"), examples(4)) is None


def test_a_prefix_that_sees_ahead_is_found():
    model, (_, processor) = paligemma(), tiny()
    branches = [prefixed([1, 2], [4, 5]), prefixed([1, 3], [6, 7, 8])]
    item = TreeItem(make_tree(branches), examples(1)[0])
    collator = TreeCollator(processor, masks=TreeMasks(model))
    collator.images = lambda items: {"pixel_values": torch.randn(len(items), 3, 32, 32)}
    assert "what the answers about an image share" in why_not_trees(model, collator, [item], CPU)


def test_a_model_that_takes_no_mask_of_trees_is_found():
    model, processor = tiny()
    forward = model.forward

    def two_dimensions_only(*args, attention_mask, **kwargs):
        _, _ = attention_mask.shape
        return forward(*args, attention_mask=attention_mask, **kwargs)

    model.forward = two_dimensions_only
    assert "takes no mask of trees (ValueError: too many values" in why(model, processor, examples(4))


# --- the rows themselves


def test_a_plain_batch_by_hand():
    _, processor = tiny()
    items = one_row_an_answer(items_of(processor, examples(2)))
    assert [item.answers for item in items] == [1, 1, 1, 1]
    assert [item.answers_of_example for item in items] == [2, 2, 2, 2]
    batch = TreeCollator(processor, plain=True)([items[:3], items[3:]])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "pixel_values"}
    sizes = [len(item.tree) for item in items]
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (max(sizes) - n) for n in sizes]
    for row, item in enumerate(items):
        assert batch["input_ids"][row, : sizes[row]].tolist() == item.tree.input_ids
        assert batch["labels"][row].tolist() == item.tree.labels + [X] * (max(sizes) - sizes[row])
    pixels = processor.image_processor([image(0), image(0), image(1), image(1)], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], pixels)


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "lfm2", "llama"])
def test_plain_rows_equal_one_conversation_at_a_time(name):
    made = stock(name) if name in ("qwen2_vl", "gemma3") else tiny(text=lfm2() if name == "lfm2" else text_config())
    model, processor = made
    wanted = one_conversation_at_a_time(model, processor, mixed_examples())
    rows = TreeDataset(one_row_an_answer(items_of(processor, mixed_examples())), 200).rows
    assert max(map(len, rows)) > 1, "several answers an index: a batch has about as many tokens as with trees"
    batch = TreeCollator(processor, plain=True)(rows)
    labels = batch.pop("labels")
    keep = F.pad(labels[:, 1:], (0, 1), value=X) != X
    loss = supervised_loss(model(**batch, logits_to_keep=keep, use_cache=False), labels)
    loss.backward()
    assert_close((float(loss.detach()), gradients(model)), wanted)


def test_training_on_plain_rows_equals_training_on_trees(tmp_path):
    """The same weights after the same examples, whichever way they are laid out."""
    results = []
    for plain in (False, True):
        model, processor = tiny()
        trainer = trainer_of(
            tmp_path,
            {"projector": 1e-2, "language": 1e-2},
            made=(model, processor),
            optim="sgd",
            per_device_train_batch_size=8,
            max_steps=2,
        )
        if plain:
            items = [item for row in rows_of(processor, examples()).rows for item in row]
            trainer.train_dataset = TreeDataset(one_row_an_answer(items), 10_000)
            trainer.data_collator = TreeCollator(processor, plain=True)
        trainer.train()
        results.append(weights(model))
    assert max(float((results[0][name] - results[1][name]).abs().max()) for name in results[0]) < 1e-5


# --- whole runs


def save_stock(name, folder):
    model, processor = stock(name)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def values(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    folder = save_stock("qwen2_vl", tmp_path / "qwen2_vl")
    made = recipe_values(folder, save_images(tmp_path / "images"), tmp_path / "run")
    return made | {"model": {"pretrained": str(folder)}, "train": dict(TRAIN)}


def test_a_stock_model_with_positions_of_its_own_trains(values, tmp_path):
    said = train(values)
    assert said.count("no trees for Qwen2VLForConditionalGeneration, a row for each answer: ") == 1
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < losses[0]
    assert len([entry for entry in entries if "eval_loss" in entry]) == 2
    assert (tmp_path / "run/evaluation/summary.json").is_file()
    assert (tmp_path / "run/adapter").is_dir()


@pytest.mark.slow
def test_plain_rows_resume_to_the_same_weights(values, tmp_path, monkeypatch):
    values |= {"evaluation": {}, "train": TRAIN | {"eval_strategy": "no"}}
    train(values | {"output_dir": str(tmp_path / "undisturbed")})
    with monkeypatch.context() as patch:
        kill_in(patch, "train", 3)
        with pytest.raises(Killed):
            train(values)
    train(values, resume=True)
    wanted, found = (generation.load(str(tmp_path / name), device="cpu")[0] for name in ("undisturbed", "run"))
    for (name, p), (_, q) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.slow
def test_kept_features_serve_plain_rows(tmp_path, monkeypatch):
    """A recurrent decoder under our own model: the encoder runs once an image, the rows repeat what it said."""
    from transformers import AutoModelForCausalLM

    from tests.tiny import byte_level_tokenizer
    from tests.training.helpers import save_parts

    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    parts = save_parts(tmp_path / "parts")
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    config = lfm2(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(parts / "language")
    values = recipe_values(parts, save_images(tmp_path / "images"), tmp_path / "run") | {"lora": None, "evaluation": {}}
    models = []
    for kept in (True, False):
        values["data"]["cache_features"] = kept
        run = tmp_path / str(kept)
        assert "no trees for Lfm2ForCausalLM" in train(copy.deepcopy(values) | {"output_dir": str(run)})
        models.append(generation.load(str(run), device="cpu")[0])
    for (name, p), (_, q) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name
