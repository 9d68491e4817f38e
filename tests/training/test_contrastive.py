"""Contrastive training: the loss and gradients of published models, large batches in little memory."""

import pytest
import torch
from transformers import AutoModel, AutoProcessor, CLIPModel, SiglipModel

from tests.dual_encoders import SAVE
from tests.tiny import image
from tests.training.helpers import arguments
from vlm.adapters.contrastive_loss import infonce
from vlm.data.example import Example, question_and_answer
from vlm.data.pairs import PairCollator, PairDataset, make_pairs, positives, require_negatives
from vlm.errors import UserError
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
    batch = trainer._prepare_inputs(trainer.data_collator(items))
    with embedding_pairs(model, None):
        loss = trainer.compute_loss(model, batch)
        loss.backward()
    ours = gradients(model)
    model.zero_grad()
    alone = CLIPModel.from_pretrained(tmp_path / "clip").to(model.device).train()
    stock = alone(**{key: batch[key] for key in MODEL_INPUTS if key in batch}, return_loss=True)
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
    batch = trainer._prepare_inputs(trainer.data_collator(items))
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
    indices = (range(5), (0, 1, 2, 3, 4, ~0, ~3), (0, 1, 2, 3, 4, 0, 3))
    batches = [trainer._prepare_inputs(trainer.data_collator([rows[n] for n in each])) for each in indices]
    with embedding_pairs(model, None):
        whole, filled, copied = (trainer.compute_loss(model, batch) for batch in batches)
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
        trainer.compute_loss(model, trainer._prepare_inputs(trainer.data_collator(items)))
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


def test_batches_with_nothing_to_tell_apart_are_the_reason_for_no_gradient(tmp_path):
    model, processor = loaded(tmp_path / "clip", "clip")
    items = pairs(processor, model.config, [("a cat",), ("A CAT",), ("a dog",)])
    trainer = trainer_of(tmp_path, model, processor, items)
    assert trainer.why_no_gradient() == ""
    for batch, counted in ((items[1:], 0), (items[:2], 1)):
        with embedding_pairs(model, None):
            loss = trainer.compute_loss(model, trainer._prepare_inputs(trainer.data_collator(batch)))
        assert (loss.item() == 0.0) == bool(counted)
        assert trainer.all_positive == counted
    assert trainer.why_no_gradient().startswith("In 1 of the batches every text belongs to every image")
    require_negatives(items, 2)
    with pytest.raises(UserError, match=r"the texts of all images are the same \('a cat'\)"):
        require_negatives(items[:2], 2)
    with pytest.raises(UserError, match=r"a batch has one image only: raise train\.per_device_train_batch_size"):
        require_negatives(items, 1)
