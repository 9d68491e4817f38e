"""TRL's trainers with our model: supervised fine-tuning, preferences and rewards, with every fusion.

Where transformers has a model that computes the same, the losses are those of that model. Otherwise they are computed
from the logits of a plain forward pass.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from tests.tiny import ALL_FUSIONS, image, tiny
from vlm.interop import to_stock

trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
pytestmark = pytest.mark.slow

ANSWERS = ("a cat", "a dog on the street", "a cat and a dog", "0 1 2")
BETA = 0.3


def asked():
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}]


def said(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def options(folder, **others):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        **others,
    }


def made(fusion):
    """The same weights each time."""
    return tiny(fusion=fusion, vision_feature_layer=-2)


def trained(trainer):
    """The loss of each step, and the first batch that it was computed from."""
    batches, compute = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *rest, **kw: (
        batches.append(copy.deepcopy(inputs)) or compute(model, inputs, *rest, **kw)
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], batches[0]


def sft(model, processor, folder):
    rows = [[*asked(), *said(answer)] for answer in ANSWERS]
    data = Dataset.from_dict({"images": [[image(n)] for n in range(4)], "messages": rows})
    config = trl.SFTConfig(**options(folder), max_length=None)
    return trl.SFTTrainer(model=model, args=config, train_dataset=data, processing_class=processor)


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
def test_supervised_fine_tuning(fusion, tmp_path):
    losses, batch = trained(sft(*made(fusion), tmp_path))
    model, processor = made(fusion)
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert losses[0] == pytest.approx(float(wanted), abs=1e-4)
    assert losses[1] < losses[0]
    if fusion == "prefix":
        llava = trained(sft(*trainable(to_stock(model, processor, "llava")), tmp_path))
        assert losses == pytest.approx(llava[0], abs=1e-5)


def trainable(pair):
    model, processor = pair
    return model.requires_grad_(True), processor


def dpo(model, reference, processor, folder):
    rows = {
        "images": [[image(n)] for n in range(4)],
        "prompt": [asked() for _ in range(4)],
        "chosen": [said(answer) for answer in ANSWERS],
        "rejected": [said(answer) for answer in ANSWERS[::-1]],
    }
    config = trl.DPOConfig(**options(folder), beta=BETA, max_length=None)
    return trl.DPOTrainer(
        model=model, ref_model=reference, args=config, train_dataset=Dataset.from_dict(rows), processing_class=processor
    )


def other(model):
    """A model a little away, so that the first loss is not log 2, whatever the model."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "k_proj" in name or "lm_head" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@torch.no_grad()
def log_likelihoods(model, batch):
    """`[B]`, of the answers, whose tokens `completion_mask` says."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    scores = model(**inputs).logits[:, :-1].log_softmax(dim=-1)
    taken = scores.gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return (taken * batch["completion_mask"][:, 1:]).sum(dim=1)


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
def test_preferences(fusion, tmp_path):
    model, processor = made(fusion)
    losses, batch = trained(dpo(model, other(model), processor, tmp_path))
    model, processor = made(fusion)
    policy, reference = log_likelihoods(model, batch), log_likelihoods(other(model), batch)
    chosen, rejected = (policy - reference).chunk(2)
    wanted = -F.logsigmoid(BETA * (chosen - rejected)).mean()
    assert abs(float(wanted) - 0.6931) > 1e-3
    assert losses[0] == pytest.approx(float(wanted), abs=1e-4)
    if fusion == "prefix":
        llava, stock_processor = to_stock(model, processor, "llava")
        reference = to_stock(other(model), processor, "llava")[0]
        found, _ = trained(dpo(llava.requires_grad_(True), reference, stock_processor, tmp_path))
        assert losses == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
def test_rewards(fusion, tmp_path):
    """Answers are sampled, rewarded and learned from: what was rewarded becomes likelier."""
    model, processor = made(fusion)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data = Dataset.from_dict({"image": [image(n) for n in range(4)], "prompt": [asked() for _ in range(4)]})
    config = trl.GRPOConfig(
        **options(tmp_path, per_device_train_batch_size=4), num_generations=2, max_completion_length=5, beta=0.0
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [float(n % 2) for n in range(len(completions))],
        args=config,
        train_dataset=data,
        processing_class=processor,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert [entry["reward"] for entry in logged] == [0.5, 0.5]
    assert all(entry["grad_norm"] > 0 for entry in logged)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    for part in ("vision_tower", "multi_modal_projector", "language_model", "lm_head"):
        assert any(part in name for name in moved), part
    assert fusion == "prefix" or any("cross_attention" in name for name in moved)
