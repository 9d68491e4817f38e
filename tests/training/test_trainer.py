"""The Trainer's overrides, each against what would be wrong without it."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import ResNetConfig, Trainer, TrainerCallback

from tests.tiny import clip_config, small_projector, tiny
from tests.training.helpers import LORA, examples, rows_of, trainer_of, weights
from vlm.adapters import PROJECTORS
from vlm.data.conversation import IGNORE
from vlm.data.dataset import TreeCollator, one_row_an_answer, shifted, supervised_tokens
from vlm.data.trees import paths
from vlm.training.finite import NonFiniteWeights
from vlm.training.part_trainer import NonFiniteGradients
from vlm.training.parts import add_lora, named_parts

RATES = {"vision": 1e-5, "projector": 1e-3, "fusion": 2e-3, "language": 3e-5}


def test_each_part_has_its_rate_and_decay_spares_norms_and_biases(tmp_path):
    made = tiny(fusion="prefix+cross_attention")
    trainer = trainer_of(tmp_path, RATES, made=made, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    by_parameter = {id(p): group for group in groups for p in group["params"]}
    names = list(named_parts(made[0]))
    assert len(by_parameter) == len(names)
    for part, name, parameter in names:
        group = by_parameter[id(parameter)]
        assert group["lr"] == RATES[part]
        assert group["part"] == part
        assert group["weight_decay"] == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name
    assert {part for part, _, _ in names} == set(RATES)


@pytest.mark.parametrize("projector", PROJECTORS)
def test_all_weights_of_a_projector_are_the_projector(projector):
    model, _ = tiny(fusion="cross_attention", projector=small_projector(projector))
    model.model.multi_modal_projector.cross_attention = torch.nn.Linear(2, 2)  # as a projector's own may be called
    for part, name, _ in named_parts(model):
        assert (part == "projector") == name.startswith("model.multi_modal_projector"), name
        assert (part == "fusion") == (".cross_attention." in name and part != "projector"), name


def test_frozen_parts_are_in_no_group_and_do_not_move(tmp_path):
    made = tiny(fusion="cross_attention")
    trainer = trainer_of(tmp_path, {"projector": 1e-2}, made=made)
    before = weights(made[0])
    trainer.train()
    moved = {name for name, value in weights(made[0]).items() if not torch.equal(value, before[name])}
    parameters = [name for name, _ in made[0].named_parameters()]
    assert moved == {name for name in parameters if name.startswith("model.multi_modal_projector")}


def uneven_examples():
    """One to four answers an image."""
    return [replace(made, branches=made.branches[: 1 + n % 4]) for n, made in enumerate(examples(8, 4))]


@pytest.mark.few(2)
@pytest.mark.parametrize("weighting", ["equal_tokens", "root_answers"])
@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_accumulating_equals_a_large_batch(tmp_path, fusion, weighting):
    """8 rows at once, or 4 times 2 with unequal numbers of supervised tokens: the same weights."""
    results = []
    for batch, accumulate in ((8, 1), (2, 4)):
        made = tiny(fusion=fusion)
        trainer = trainer_of(
            tmp_path,
            {"projector": 1e-2, "language": 1e-2},
            made=made,
            data=uneven_examples(),
            weighting=weighting,
            optim="sgd",
            max_grad_norm=0.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
        )
        trainer.train()
        results.append((weights(made[0]), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    (one, losses), (other, other_losses) = results
    assert losses == pytest.approx(other_losses, abs=1e-5)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6
    counts = {supervised_tokens(row) for row in rows_of(tiny()[1], uneven_examples()).rows}
    assert len(counts) > 2, "the numbers of supervised tokens must differ for this to say anything"


def test_the_loss_is_the_mean_over_supervised_tokens(tmp_path):
    made = tiny()
    trainer = trainer_of(tmp_path, made=made)
    batch = trainer._prepare_inputs(trainer.data_collator(trainer.train_dataset.rows))
    labels = batch["labels"]
    with torch.no_grad():
        scores = made[0](**{k: v for k, v in batch.items() if k != "labels"}).logits
        wanted = F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        assert trainer.compute_loss(made[0], batch).item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("plain", [False, True])
def test_an_answer_weighs_one_over_the_root_of_how_many_there_are(tmp_path, plain):
    """As in Molmo, and normalised by the sum of weights; by hand, from the scores of one answer at a time."""
    made = tiny()
    trainer = trainer_of(tmp_path, made=made, data=uneven_examples(), weighting="root_answers")
    items = [item for row in trainer.train_dataset.rows for item in row]
    assert sorted(item.answers for item in items) == [1, 1, 2, 2, 3, 3, 4, 4]
    total, weights = 0.0, 0.0
    for item in items:
        for path in paths(item.tree):
            pixels = trainer._prepare_inputs(TreeCollator(made[1]).images([item]))
            with torch.no_grad():
                ids = torch.tensor([path.input_ids], device=trainer.args.device)
                scores = made[0](ids, **pixels).logits[0, :-1].cpu()
            labels = torch.tensor(path.labels[1:])
            weight = 1 / math.sqrt(item.answers)
            total += weight * float(F.cross_entropy(scores, labels, ignore_index=IGNORE, reduction="sum"))
            weights += weight * int((labels != IGNORE).sum())
    if plain:
        items = one_row_an_answer(items)
        trainer.data_collator.plain = True
    batch = trainer._prepare_inputs(trainer.data_collator([items]))
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)
    assert float(count) == pytest.approx(weights, rel=1e-6)
    with torch.no_grad():
        for number in (None, count):
            loss = trainer.compute_loss(made[0], dict(batch), num_items_in_batch=number)
            assert float(loss) == pytest.approx(total / weights, rel=1e-5)


def test_the_held_out_loss_is_the_same_however_answers_are_weighed(tmp_path):
    losses = []
    for weighting in ("equal_tokens", "root_answers"):
        trainer = trainer_of(tmp_path, made=tiny(), eval_data=uneven_examples(), weighting=weighting)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_head_runs_on_supervised_positions_only(tmp_path):
    made = tiny()
    shapes = []
    made[0].get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    trainer = trainer_of(tmp_path, made=made, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    labels = trainer.data_collator(trainer.train_dataset.rows)["labels"]
    assert [math.prod(shape[:-1]) for shape in shapes] == [int((shifted(labels) != IGNORE).sum())]


# --- gradients that are not finite


class Spoil(TrainerCallback):
    """Makes the gradients of some steps NaN, as an overflow would."""

    def __init__(self, steps):
        self.steps = steps

    def hook(self, trainer):
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda grad: grad * math.nan if trainer.state.global_step in self.steps else grad)


def test_a_step_of_nan_gradients_changes_nothing_and_is_counted(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(weights(model))

    made = tiny()
    trainer = trainer_of(tmp_path, made=made, callbacks=[Watch()], max_steps=4, weight_decay=0.1)
    Spoil({1}).hook(trainer)
    trainer.train()
    assert trainer.skipped.count == 1
    names = [name for name in seen[0] if name.startswith("model.multi_modal_projector")]
    same = [all(torch.equal(seen[i][n], seen[i + 1][n]) for n in names) for i in range(3)]
    assert same == [True, False, False]
    assert all(torch.isfinite(value).all() for value in seen[-1].values())


def test_without_the_override_the_nan_is_applied(tmp_path, monkeypatch):
    from vlm.training.trainer import VLMTrainer

    monkeypatch.setattr(VLMTrainer, "_get_grad_norm", Trainer._get_grad_norm)
    made = tiny()
    trainer = trainer_of(tmp_path, made=made)
    Spoil({1}).hook(trainer)
    with pytest.raises(NonFiniteWeights):  # at the end
        trainer.train()
    assert not all(torch.isfinite(p).all() for p in made[0].parameters())


def test_many_steps_of_nan_in_a_row_stop_the_run(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=20)
    Spoil(set(range(2, 20))).hook(trainer)
    with pytest.raises(NonFiniteGradients, match=r"5 steps in a row up to step 7 .*lower the learning rates"):
        trainer.train()
    assert trainer.skipped.count == 5


def test_single_bad_steps_do_not_add_up(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=14)
    Spoil(set(range(0, 14, 2))).hook(trainer)
    trainer.train()
    assert trainer.skipped.count == 7


@pytest.mark.parametrize("scale", [2.0**16, 1.0])
def test_overflows_of_the_loss_scale_are_no_bad_steps(tmp_path, scale):
    """fp16's scaler halves its scale after a step that overflows; at a scale of 1 the gradients themselves are bad."""
    trainer = trainer_of(tmp_path, max_steps=10)
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def unscale(optimizer=None):
        scaler.unscale_(trainer.optimizer.optimizer)

    trainer.accelerator.unscale_gradients = unscale  # that of accelerate wants a GPU
    Spoil(set(range(8))).hook(trainer)
    if scale > 1:
        before = weights(trainer.model)
        trainer.train()
        after = weights(trainer.model)
        assert trainer.accelerator.scaler.get_scale() == 2.0 ** (16 - 8)
        assert trainer.skipped.count == 0
        assert all(torch.isfinite(value).all() for value in after.values())
        assert any(not torch.equal(after[name], before[name]) for name in before)
    else:
        with pytest.raises(NonFiniteGradients):
            trainer.train()
        assert trainer.skipped.count == 5


# --- frozen encoders


def test_a_frozen_encoder_stays_in_evaluation_mode(tmp_path):
    """Its batch statistics must not follow the training data, whatever Trainer does to the model's mode."""
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    made = tiny(vision_config=resnet)
    before = weights(made[0].model.vision_tower)
    trainer_of(tmp_path, made=made).train()
    after = weights(made[0].model.vision_tower)
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert made[0].training
    assert not made[0].model.vision_tower.training


def test_a_trained_encoder_is_in_training_mode(tmp_path):
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    made = tiny(vision_config=resnet)
    before = weights(made[0].model.vision_tower)
    trainer_of(tmp_path, {"vision": 1e-3}, made=made).train()
    after = weights(made[0].model.vision_tower)
    assert all(not torch.equal(before[name], after[name]) for name in before if "running_mean" in name)


def test_dropout_of_a_frozen_encoder_is_off(tmp_path):
    made = tiny(vision_config=clip_config(attention_dropout=0.9))
    trainer = trainer_of(tmp_path, made=made)
    batch = trainer._prepare_inputs(trainer.data_collator(trainer.train_dataset.rows))
    made[0].train()
    with torch.no_grad():
        losses = {trainer.compute_loss(made[0], copy.copy(batch)).item() for _ in range(3)}
    assert len(losses) == 1


# --- the loss on held-out data


def test_the_held_out_loss_counts_every_token_once(tmp_path):
    """Whatever the batches: 7 examples in rows of unequal numbers of supervised tokens."""
    losses = []
    for batch in (1, 2, 5):
        made = tiny()
        trainer = trainer_of(tmp_path, made=made, eval_data=examples(7), per_device_eval_batch_size=batch)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) == pytest.approx(losses[2], rel=1e-6)
    total, count = 0.0, 0
    model, processor = tiny()
    for row in rows_of(processor, examples(7)).rows:
        batch = TreeCollator(processor)([row])
        labels = batch.pop("labels")
        with torch.no_grad():
            scores = model(**batch).logits
        nll = F.cross_entropy(scores[0, :-1], labels[0, 1:], ignore_index=IGNORE, reduction="sum")
        total, count = total + float(nll), count + int((labels[:, 1:] != IGNORE).sum())
    assert losses[0] == pytest.approx(total / count, rel=1e-5)


# --- LoRA


def _some_logits(model, processor):
    batch = TreeCollator(processor)(rows_of(processor, examples(3), 500).rows)
    batch.pop("labels")
    with torch.no_grad():
        return model.cpu()(**batch).logits


@pytest.mark.few(3)
@pytest.mark.parametrize("decoder", ["llama", "gpt2"])
@pytest.mark.parametrize("fusion", ["prefix", "cross_attention_layers", "prefix+cross_attention"])
def test_lora_merged_equals_adapted_and_its_folder_loads_again(tmp_path, decoder, fusion):
    from peft import PeftModel

    model, processor = tiny(decoder, fusion)
    rates = {"projector": 1e-2, "lora": 1e-2} | ({"fusion": 1e-2} if "cross" in fusion else {})
    adapted = add_lora(model, LORA, rates)
    before = _some_logits(adapted.eval(), processor)
    trainer_of(tmp_path, rates, made=(adapted, processor)).train()
    adapted.eval()
    wanted = _some_logits(adapted, processor)
    assert not torch.allclose(before, wanted, atol=1e-3)
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(tiny(decoder, fusion)[0], tmp_path / "adapter").eval()
    assert torch.equal(_some_logits(fresh, processor), wanted)
    assert torch.allclose(_some_logits(adapted.merge_and_unload().eval(), processor), wanted, atol=1e-5)


def test_lora_is_on_the_decoder_alone(tmp_path):
    model, _ = tiny(fusion="cross_attention")
    adapted = add_lora(model, LORA, {"lora": 1e-3, "fusion": 1e-3})
    places = {name for name, _ in adapted.named_modules() if name.endswith("lora_A")}
    assert len(places) == 4 * 7  # layers x (q, k, v, o, gate, up, down)
    assert all(".layers." in name and "cross_attention" not in name for name in places)


def test_lora_on_named_layers_only():
    model, _ = tiny()
    adapted = add_lora(model, LORA | {"target_modules": ["q_proj", "v_proj"]}, {"lora": 1e-3})
    places = {name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith("lora_A")}
    assert places == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"lora\.target_modules: .*no linear layer named \['query'\]"):
        add_lora(tiny()[0], LORA | {"target_modules": ["query"]}, {"lora": 1e-3})
