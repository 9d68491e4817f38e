"""Training as it runs, against one answer at a time through the stock model: the loss, every gradient, what it costs.

`tests/data/test_trees.py` and `test_tree_masks.py` have the model alone; here are LoRA, gradient checkpointing,
decoders that scale or cap their logits, and what is computed how often.
"""

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device

from tests.data.test_tree_masks import examples
from tests.data.test_trees import assert_close, gradients
from tests.stock import stock
from tests.tiny import ALL_FUSIONS, text_config, tiny
from tests.training.helpers import LORA, rows_of, trainer_of
from vlm.data.dataset import TreeCollator
from vlm.data.tree_masks import TreeMasks
from vlm.data.trees import paths
from vlm.training.parts import add_lora
from vlm.tree_attention import tree_attention

X = -100
RATES = {"projector": 1e-2, "language": 1e-2}


def trained_loss(folder, model, processor, rates, **changes):
    """Loss and gradients of a training step over all examples, as the trainer takes it."""
    rows = rows_of(processor, examples(), 400).rows
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    trainer = trainer_of(folder, rates, made=(model, processor), data=examples(), **changes)
    batch = trainer._prepare_inputs(TreeCollator(processor, masks=TreeMasks(base))(rows))
    model.train()
    with tree_attention(base):
        loss = trainer.compute_loss(model, batch)
        loss.backward()
    return float(loss.detach()), gradients(model)


def one_at_a_time(model, processor):
    """The stock way: all logits of each conversation, and cross-entropy over the supervised."""
    model.eval()
    total, count = torch.tensor(0.0, device=model.device), 0
    for row in rows_of(processor, examples()).rows:
        for item in row:
            pixels = send_to_device(TreeCollator(processor).images([item]), model.device)
            for path in paths(item.tree):
                ids = torch.tensor([path.input_ids], device=model.device)
                scores = model(input_ids=ids, use_cache=False, **pixels).logits[0, :-1]
                labels = torch.tensor(path.labels[1:], device=model.device)
                total = total + F.cross_entropy(scores.float(), labels, reduction="sum", ignore_index=X)
                count += int((labels != X).sum())
    loss = total / count
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
def test_lora(tmp_path, fusion):
    model, processor = tiny(fusion=fusion)
    rates = {"projector": 1e-2, "lora": 1e-2} | ({"fusion": 1e-2} if "cross" in fusion else {})
    adapted = add_lora(model, LORA, rates)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    found = trained_loss(tmp_path, adapted, processor, rates)
    assert any("lora_A" in name for name in found[1])
    assert_close(found, one_at_a_time(adapted, processor))


@pytest.mark.parametrize(("name", "lora"), [("llava", True), ("idefics3", False), ("gemma3", True)])
def test_lora_and_checkpointing_of_stock_models(tmp_path, name, lora):
    model, processor = stock(name)
    rates = {"projector": 1e-2, "lora": 1e-2} if lora else RATES
    if lora:
        model = add_lora(model, LORA, rates)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    found = trained_loss(tmp_path, model, processor, rates)
    model.activation_checkpointing_disable()
    if name == "gemma3":  # its reference has to be told the types of its tokens
        expected = trained_loss(tmp_path, model, processor, rates)
    else:
        expected = one_at_a_time(model, processor)
    assert_close(found, expected)


@pytest.mark.few(4)
@pytest.mark.parametrize("decoder", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("fusion", ["prefix", "cross_attention", "cross_attention_layers"])
def test_gradient_checkpointing(tmp_path, decoder, fusion):
    model, processor = tiny(decoder, fusion)
    rates = RATES | ({"fusion": 1e-2} if "cross" in fusion else {})
    expected = one_at_a_time(model, processor)
    runs = []
    mlp = next(module for module in model.model.language_model.modules() if type(module).__name__.endswith("MLP"))
    mlp.register_forward_pre_hook(lambda module, args: runs.append(1))
    model.activation_checkpointing_enable({"use_reentrant": False})
    found = trained_loss(tmp_path, model, processor, rates)
    assert_close(found, (expected[0], {name: expected[1][name] for name in found[1]}))
    assert len(runs) == 2, "forward, and once more for the gradients"


# --- logits that a decoder scales or caps

CAPPED = {
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "sliding_window": 8},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
}


@pytest.mark.parametrize("decoder", CAPPED)
def test_each_decoders_own_scaling_of_logits_is_kept(tmp_path, decoder):
    model, processor = tiny(text=text_config(decoder, 2, **CAPPED[decoder]))
    shapes = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    found = trained_loss(tmp_path, model, processor, RATES)
    hook.remove()
    supervised = sum(label != X for row in rows_of(processor, examples()).rows for i in row for label in i.tree.labels)
    assert shapes == [(supervised, model.config.text_config.vocab_size)], "no logits but those that are learnt from"
    expected = one_at_a_time(model, processor)
    assert_close(found, (expected[0], {name: expected[1][name] for name in found[1]}))
    without = tiny(text=text_config(decoder, 2))[0]
    assert one_at_a_time(without, processor)[0] != pytest.approx(expected[0], rel=1e-3), "the scaling matters here"


@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3", "qwen2_vl"])
def test_the_head_of_stock_models_runs_on_supervised_positions_only(tmp_path, name):
    model, processor = stock(name)
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    trained_loss(tmp_path, model, processor, RATES)
    supervised = sum(label != X for row in rows_of(processor, examples()).rows for i in row for label in i.tree.labels)
    assert [shape[:-1].numel() for shape in shapes] == [supervised]


# --- the image, once a tree


@pytest.mark.parametrize("fusion", ["cross_attention", "cross_attention_layers"])
def test_cross_attention_reads_each_image_once_a_tree(tmp_path, fusion):
    model, processor = tiny(fusion=fusion)
    blocks = [m for m in model.modules() if hasattr(m, "_keys_values")]
    seen = []
    for block in blocks:
        block.k_proj.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    trained_loss(tmp_path, model, processor, {"fusion": 1e-2})
    made = examples()
    images = sum(len(example.images) for example in made)
    assert sum(len(example.branches) * len(example.images) for example in made) > images
    rows = len(rows_of(processor, made, 400).rows)
    assert rows == 1, "else rows are padded to the one with most images"
    assert seen == [(1, images * 16, 32)] * len(blocks)


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_the_encoder_sees_each_image_once_a_tree(tmp_path, fusion):
    model, processor = tiny(fusion=fusion)
    seen = []
    model.model.vision_tower.embeddings.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    trained_loss(tmp_path, model, processor, {"projector": 1e-2})
    assert seen == [sum(len(example.images) for example in examples())]
