"""Contrastive training: the loss and gradients of published models, large batches in little memory, whole runs."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import top_k_accuracy_score
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel, CLIPModel, SiglipModel
from typer.testing import CliRunner

from tests.dual_encoders import SAVE, text_sizes, tokenizer
from tests.tiny import image, tiny
from tests.training.helpers import TRAIN, Killed, arguments, kill_in, recipe_values, train
from vlm import recipe
from vlm.adapters.contrastive_loss import infonce
from vlm.cli import app
from vlm.data.example import Example, question_and_answer
from vlm.data.pairs import PairCollator, PairDataset, make_pairs, positives
from vlm.errors import UserError
from vlm.recipe import RecipeError
from vlm.training import pair_embeddings
from vlm.training.contrastive_trainer import ContrastiveTrainer
from vlm.training.pair_embeddings import MODEL_INPUTS, can_keep, embed_pairs, embedding_pairs, logits_of

CAPTIONS = ["a cat", "a dog and a cat on the street", "2", "no", "a cat and a dog", "on the street", "a dog", "street"]


def pairs(processor, config, texts=tuple((caption,) for caption in CAPTIONS)):
    examples = [
        Example((image(n),), tuple(question_and_answer("", text) for text in mine), f"{n}", f"row {n}")
        for n, mine in enumerate(texts)
    ]
    return make_pairs(examples, processor, config, report=pytest.fail, progress=lambda steps, total: steps)[0]


def loaded(folder, name):
    torch.manual_seed(0)
    SAVE[name](folder)
    return AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def trainer_of(folder, model, processor, items, *, loss="infonce", rates=None, **changes):
    return ContrastiveTrainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=PairDataset(items),
        eval_dataset=PairDataset(items),
        data_collator=PairCollator(processor, model.config),
        loss=loss,
        held_out=items,
        rates=rates or {"vision": 1e-3, "language": 1e-3, "projector": 1e-3},
    )


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the loss


def test_loss_and_gradients_are_those_of_clip_itself(tmp_path):
    model, processor = loaded(tmp_path / "clip", "clip")
    items = pairs(processor, model.config)
    trainer = trainer_of(tmp_path, model, processor, items)
    batch = trainer.data_collator(items)
    with embedding_pairs(model, None):
        loss = trainer.compute_loss(model, batch)
        loss.backward()
    ours = gradients(model)
    model.zero_grad()
    stock = CLIPModel.from_pretrained(tmp_path / "clip").train()(
        **{key: batch[key] for key in MODEL_INPUTS if key in batch}, return_loss=True
    )
    assert stock.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    again = model(**{key: batch[key] for key in MODEL_INPUTS if key in batch}, return_loss=True)
    again.loss.backward()
    stocks = gradients(model)
    assert ours.keys() == stocks.keys()
    for name, gradient in stocks.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_loss_and_gradients_are_those_of_siglip_itself(tmp_path):
    model, processor = loaded(tmp_path / "siglip", "siglip")
    items = pairs(processor, model.config)
    trainer = trainer_of(tmp_path, model, processor, items, loss="sigmoid")
    batch = trainer.data_collator(items)
    with embedding_pairs(model, None):
        loss = trainer.compute_loss(model, batch)
        loss.backward()
    ours = gradients(model)
    model.zero_grad()
    assert isinstance(model, SiglipModel)
    stock = model(**{key: batch[key] for key in MODEL_INPUTS if key in batch}, return_loss=True)
    stock.loss.backward()
    assert stock.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert {"logit_scale", "logit_bias"} < ours.keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_whose_a_text_is():
    """Two texts of the first image, of which the second image says one too; a third image says something else."""
    image_ids, of, says = torch.tensor([5, 6, 7]), torch.tensor([5, 5, 6, 7]), torch.tensor([1, 2, 1, 3])
    expected = [[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert positives(image_ids, of, says).int().tolist() == expected


def test_the_same_words_in_other_letters_are_the_same(tmp_path):
    model, processor = loaded(tmp_path / "clip", "clip")
    batch = PairCollator(processor, model.config)(pairs(processor, model.config, [("A  Cat",), ("a cat", "no")]))
    found = positives(batch["image_ids"], batch["images_of_texts"], batch["text_ids"])
    assert found.int().tolist() == [[1, 1, 0], [1, 1, 1]]


def test_blank_items_count_nowhere(tmp_path):
    model, processor = loaded(tmp_path / "clip", "clip")
    items = pairs(processor, model.config)[:5]
    trainer = trainer_of(tmp_path, model, processor, items)
    rows = trainer.train_dataset
    with embedding_pairs(model, None):
        whole = trainer.compute_loss(model, trainer.data_collator([rows[n] for n in range(5)]))
        filled = trainer.compute_loss(model, trainer.data_collator([rows[n] for n in (0, 1, 2, 3, 4, ~0, ~3)]))
        copied = trainer.compute_loss(model, trainer.data_collator([rows[n] for n in (0, 1, 2, 3, 4, 0, 3)]))
    torch.testing.assert_close(whole, filled)
    assert not torch.isclose(whole, copied, rtol=1e-4), "a copy would count"
    assert trainer.data_collator([rows[0], rows[~1]])["counts"][1].tolist() == [0, 0, 0]
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 4
    assert len(trainer._get_train_sampler()) == 8


def test_the_temperature_keeps_below_clips_limit(tmp_path):
    model, processor = loaded(tmp_path / "clip", "clip")
    items = pairs(processor, model.config)
    trainer = trainer_of(tmp_path, model, processor, items)
    model.logit_scale.data.fill_(9.0)
    with embedding_pairs(model, None):
        trainer.compute_loss(model, trainer.data_collator(items))
    assert model.logit_scale.exp().item() == pytest.approx(100)


# --- large batches in little memory


@pytest.mark.parametrize("name", ["clip", "siglip", "dual"])
def test_chunks_give_the_gradients_of_the_whole(tmp_path, name):
    model, processor = loaded(tmp_path / name, name)
    model.eval()  # without dropout, whose numbers would be drawn in another order
    batch = PairCollator(processor, model.config)(pairs(processor, model.config))
    given = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    found = []
    for size in (None, 3):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            logits = logits_of(embed_pairs(model, size, **given))
        infonce(logits, torch.eye(8, dtype=torch.bool)).backward()
        found.append((logits.detach(), gradients(model), sum(kept)))
        model.zero_grad()
    (whole, direct, much), (same, chunked, little) = found
    torch.testing.assert_close(whole, same, rtol=1e-4, atol=1e-5)
    assert direct.keys() == chunked.keys()
    for key, gradient in direct.items():
        torch.testing.assert_close(gradient, chunked[key], rtol=1e-3, atol=1e-6, msg=key)
    assert little < much / 3


def test_dropout_in_a_chunk_is_the_same_when_it_is_computed_anew(tmp_path, monkeypatch):
    model, processor = loaded(tmp_path / "dual", "dual")
    model.train()
    batch = PairCollator(processor, model.config)(pairs(processor, model.config))
    given = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    found = []
    for kept in (False, True):
        if kept:
            monkeypatch.setattr(pair_embeddings, "checkpoint", lambda function, *args, use_reentrant: function(*args))
        torch.manual_seed(3)
        infonce(logits_of(embed_pairs(model, 3, **given)), torch.eye(8, dtype=torch.bool)).backward()
        found.append(gradients(model))
        model.zero_grad()
    for key, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][key], msg=key)


def test_texts_in_groups_of_a_length_are_the_texts_in_their_order(tmp_path):
    model, processor = loaded(tmp_path / "clip", "clip")
    model.eval()
    batch = PairCollator(processor, model.config)(pairs(processor, model.config))
    found = embed_pairs(model, None, **{key: batch[key] for key in MODEL_INPUTS if key in batch})
    expected = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    expected = torch.nn.functional.normalize(expected, dim=-1)
    torch.testing.assert_close(found["text_embeds"], expected, rtol=1e-4, atol=1e-5)


def test_padding_is_what_is_computed(tmp_path):
    """Of 15 short texts and a long one the long one pads its group alone."""
    model, processor = loaded(tmp_path / "clip", "clip")
    items = pairs(processor, model.config, [("a",)] * 15 + [("a cat and a dog on the street",)])
    trainer = trainer_of(tmp_path, model, processor, items)
    batch = trainer.data_collator(items)
    short, long = sorted({int(length) for length in batch["attention_mask"].sum(dim=1)})
    assert batch["input_ids"].numel() == 16 * long
    assert trainer.token_places(batch) == 12 * short + 4 * long
    SAVE["siglip"](tmp_path / "siglip")
    model = AutoModel.from_pretrained(tmp_path / "siglip")
    siglip = trainer_of(tmp_path, model, processor, items)
    batch = siglip.data_collator(items)
    assert siglip.token_places(batch) == batch["input_ids"].numel()


@pytest.mark.parametrize("name", ["clip", "siglip", "dual"])
def test_kept_features_are_all_that_a_locked_encoder_says(tmp_path, name):
    model, processor = loaded(tmp_path / name, name)
    model.eval()
    batch = PairCollator(processor, model.config)(pairs(processor, model.config))
    given = {key: batch[key] for key in MODEL_INPUTS if key in batch}
    assert can_keep(model, given["pixel_values"])
    pixels = given.pop("pixel_values")
    kept = embed_pairs(model, None, vision_features=pair_embeddings.pooled_features(model, pixels), **given)
    seen = embed_pairs(model, None, pixel_values=pixels, **given)
    torch.testing.assert_close(kept["image_embeds"], seen["image_embeds"])


def test_an_encoder_that_does_more_than_project_is_not_kept(tmp_path):
    model, _ = loaded(tmp_path / "clip", "clip")
    model.visual_projection.register_forward_hook(lambda module, given, out: out)
    original = model.get_image_features

    def other(pixel_values):
        seen = original(pixel_values=pixel_values)
        seen.pooler_output = seen.pooler_output * 2
        return seen

    model.get_image_features = other
    assert not can_keep(model.eval(), torch.rand(1, 3, 32, 32))


# --- whole runs


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(2)
    BertModel(BertConfig(**text_sizes())).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def pair_values(parts, images, text_encoder, tmp_path):
    values = recipe_values(parts, images, tmp_path / "run")
    values["model"]["language"] = str(text_encoder)
    del values["data"]["max_tokens_per_row"], values["evaluation"], values["lora"]
    values["contrastive"] = {"projection_dim": 16}
    values["trainable"] = {"projector": 1e-2, "language": 1e-3}
    values["train"] = TRAIN | {"per_device_train_batch_size": 5}
    return values


def test_a_run_and_what_it_leaves(pair_values, tmp_path):
    said = train(pair_values)
    run = tmp_path / "run"
    assert "image to text" in said
    for name in ("recipe.yaml", "metrics.jsonl", "loss.png", "model/config.json", "evaluation/samples.html"):
        assert (run / name).is_file(), name
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [entry for entry in logged if "eval_loss" in entry]
    assert held_out[-1]["eval_text_to_image_r10"] == 1.0
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    # The scores again, by the saved model and scikit-learn.
    model, processor = AutoModel.from_pretrained(run / "model").eval(), AutoProcessor.from_pretrained(run / "model")
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "evaluation" / "predictions.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 3
    texts = [text for row in rows for text in row["references"]]
    unique = list(dict.fromkeys(texts))
    inputs = processor(text=unique, images=[image(n) for n in range(10, 13)], return_tensors="pt", padding=True)
    scores = model(**inputs).logits_per_image.detach()
    for row, line in zip(rows, scores, strict=True):
        assert row["prediction"] == unique[int(line.argmax())]
    of_texts = [n for n, row in enumerate(rows) for _ in row["references"]]
    if len(unique) == len(texts):  # each text has one image
        expected = top_k_accuracy_score(of_texts, scores.T.numpy(), k=1, labels=range(3))
        assert summary["metrics"]["text_to_image_r1"]["score"] == pytest.approx(expected)
    assert held_out[-1]["eval_text_to_image_r1"] == pytest.approx(summary["metrics"]["text_to_image_r1"]["score"])


def test_what_is_frozen_stays_and_what_learns_moves(pair_values, parts, tmp_path):
    train(pair_values)
    before = load_file(parts / "vision" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[f"vision_model.{name}"])
    assert after["logit_scale"].item() != pytest.approx(math.log(1 / 0.07), abs=1e-6)


def test_kept_features_give_the_run_that_encoding_in_each_step_gives(pair_values, tmp_path):
    train(pair_values | {"output_dir": str(tmp_path / "kept")})
    data = pair_values["data"] | {"cache_features": False}
    said = train(pair_values | {"data": data, "output_dir": str(tmp_path / "anew")})
    assert "found on disk" not in said
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("kept", "anew"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 4, "lora_dropout": 0.1, "learning_rate": 1e-2},
        pytest.param(None, marks=pytest.mark.slow, id="no LoRA"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(pair_values, tmp_path, monkeypatch, lora):
    if lora:
        pair_values |= {"lora": lora, "trainable": {"projector": 1e-2}}
    pair_values["contrastive"]["chunk_size"] = 2
    train(pair_values | {"output_dir": str(tmp_path / "whole")})
    with monkeypatch.context() as patch:
        kill_in(patch, "train", 3)
        with pytest.raises(Killed):
            train(pair_values)
    train(pair_values, resume=True)
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert (tmp_path / "run" / "adapter").is_dir() == bool(lora)


def test_lora_is_kept_beside_the_model_that_it_is_merged_into(pair_values, text_encoder, tmp_path):
    """What the adapter says, taken from the merged weights, leaves the text encoder as it was before training."""
    lora = {"r": 4, "lora_alpha": 8, "learning_rate": 1e-2}
    train(pair_values | {"lora": lora, "trainable": {"projector": 1e-2}})
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    merged = load_file(tmp_path / "run" / "model" / "model.safetensors")
    before = load_file(text_encoder / "model.safetensors")
    prefix, ends = "base_model.model.", ".lora_A.weight"
    layers = [name.removeprefix(prefix).removesuffix(ends) for name in adapter if name.endswith(ends)]
    assert len(layers) == 2 * 6  # two layers of BERT, six linear ones in each
    for layer in layers:
        low, high = (adapter[f"{prefix}{layer}.lora_{side}.weight"] for side in "AB")
        delta = 8 / 4 * high @ low
        assert delta.abs().max() > 1e-4
        start = before[f"{layer.removeprefix('text_model.')}.weight"]
        torch.testing.assert_close(merged[f"{layer}.weight"] - delta, start, rtol=1e-4, atol=1e-5)


def test_a_pretrained_dual_encoder_with_the_sigmoid_loss(pair_values, tmp_path):
    SAVE["siglip"](tmp_path / "siglip")
    pair_values["model"] = {"pretrained": str(tmp_path / "siglip")}
    pair_values["contrastive"] = {"loss": "sigmoid", "chunk_size": 2}
    pair_values["trainable"] = {"projector": 1e-2, "language": 1e-3, "vision": 1e-3}
    train(pair_values)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "run" / "model"), SiglipModel)


def test_the_sigmoid_loss_needs_a_bias(pair_values, tmp_path):
    SAVE["clip"](tmp_path / "clip")
    pair_values["model"] = {"pretrained": str(tmp_path / "clip")}
    pair_values["contrastive"] = {"loss": "sigmoid"}
    with pytest.raises(UserError, match="has no bias, which the sigmoid loss needs; use infonce"):
        train(pair_values)


@pytest.mark.slow
def test_stages_go_on_from_one_another(pair_values, tmp_path):
    first = {"name": "lock", "trainable": pair_values.pop("trainable"), "train": pair_values.pop("train")}
    second = {
        "name": "tune",
        "trainable": {"vision": 1e-4, "language": 1e-4, "projector": 1e-3},
        "train": first["train"],
    }
    train(pair_values | {"stages": [first, second]})
    assert (tmp_path / "run" / "stages" / "lock" / "evaluation" / "summary.json").is_file()
    assert (tmp_path / "run" / "evaluation" / "summary.json").is_file()


def test_texts_that_are_cut_are_counted(pair_values, images, tmp_path):
    for name, rows in (("train", 10), ("test", 3)):
        lines = [json.loads(line) for line in (images / f"{name}.jsonl").read_text().splitlines()]
        assert len(lines) == rows
        lines[0]["captions"] = ["a cat and a dog " * 9, "no"]
        (images / f"long-{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        part = "train" if name == "train" else "validation"
        pair_values["data"][part] = pair_values["data"][part] | {"metadata": f"long-{name}.jsonl"}
    said = train(pair_values)
    assert "training: 1 texts are cut to the 24 tokens" in said
    assert said.count("1 texts are cut to the 24 tokens") == 3  # of training, held out, and as they are scored


def test_its_eye_is_that_of_a_caption_recipe_and_of_vlm_encode(pair_values, parts, images, tmp_path):
    pair_values["trainable"] = {"vision": 1e-2, "language": 1e-3, "projector": 1e-2}
    train(pair_values)
    captions = recipe_values(parts, images, tmp_path / "captions")
    captions["model"]["vision"] = str(tmp_path / "run")
    captions["lora"] = None
    train(captions)
    eye = load_file(tmp_path / "run" / "model" / "model.safetensors")
    written = load_file(tmp_path / "captions" / "model" / "model.safetensors")
    tower = {name: tensor for name, tensor in written.items() if name.startswith("vision_tower.")}
    assert tower
    for name, tensor in tower.items():
        assert torch.equal(tensor, eye[name.replace("vision_tower.", "vision_model.", 1)])
    words = [
        "encode",
        str(images / "0.png"),
        "--encoder",
        str(tmp_path / "run"),
        "--output",
        str(tmp_path / "f.safetensors"),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    model = AutoModel.from_pretrained(tmp_path / "run" / "model").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "run" / "model")
    pixels = processor.image_processor(images=[image(0)], return_tensors="pt")["pixel_values"]
    expected = model.vision_model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(
        load_file(tmp_path / "f.safetensors")["features"], expected.detach(), rtol=1e-4, atol=1e-4
    )


def test_a_broken_image_is_named(pair_values, images, tmp_path):
    rows = [json.loads(line) for line in (images / "train.jsonl").read_text().splitlines()]
    (images / "bad.png").write_bytes(b"no image")
    (images / "worse.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"file_name": "bad.png", "captions": ["x"]}])
    )
    pair_values["data"]["train"]["metadata"] = "worse.jsonl"
    said = train(pair_values)
    assert "bad.png" in said
    problems = json.loads((tmp_path / "run" / "data_problems.json").read_text())
    assert len(problems) == 1


# --- recipes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable": {"fusion": 1e-3}}, "trainable.fusion: a dual encoder has none"),
        ({"train": {"gradient_accumulation_steps": 2}}, "gradient_accumulation_steps: pairs are told only from those"),
        ({"train": {"auto_find_batch_size": True}}, "auto_find_batch_size: a smaller batch is another loss"),
        ({"evaluation": {"metrics": ["cider_d"]}}, "evaluation.metrics: does not go with `contrastive`"),
        ({"contrastive": {"loss": "nce"}}, "contrastive.loss"),
        ({"contrastive": {"chunks": 2}}, "contrastive.chunks"),
        ({"train": TRAIN | {"metric_for_best_model": "image_to_text_r2"}}, "did you mean 'image_to_text_r"),
    ],
)
def test_what_does_not_go_with_it_is_said_before_anything_is_loaded(pair_values, change, message):
    with pytest.raises(RecipeError, match=message):
        recipe.from_dict(pair_values | change)


def test_keys_of_a_model_that_writes_are_refused(pair_values):
    pair_values["model"] |= {"adapter": {"projector": "linear"}, "tiling": {"type": "tiles"}}
    pair_values["data"] |= {"max_length": 7}
    with pytest.raises(RecipeError) as raised:
        recipe.from_dict(pair_values)
    for key in ("model.adapter", "model.tiling", "data.max_length"):
        assert f"{key}: does not go with `contrastive`" in str(raised.value)


def test_projections_of_a_pretrained_model_are_its_own(pair_values):
    pair_values["model"] = {"pretrained": "openai/clip-vit-base-patch16"}
    with pytest.raises(RecipeError, match=r"contrastive\.projection_dim: is that of the `pretrained` model already"):
        recipe.from_dict(pair_values)


def test_no_model_that_writes_is_trained_so(pair_values, tmp_path):
    tiny()[0].save_pretrained(tmp_path / "writer")
    pair_values["model"] = {"pretrained": str(tmp_path / "writer")}
    pair_values["contrastive"] = {}
    with pytest.raises(UserError, match="is of type vlm, which is no dual encoder"):
        train(pair_values)


def test_a_dry_run_leaves_nothing(pair_values, tmp_path):
    assert "nothing was trained" in train(pair_values, dry_run=True)
    assert not (tmp_path / "run").exists()
