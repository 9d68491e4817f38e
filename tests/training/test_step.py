"""The cost of a step, against FLOPs counted by hand; the peak of a device, with a clock that the test moves."""

import pytest
import torch
import torch.nn.functional as F
from transformers import ResNetConfig

from tests.tiny import tiny
from tests.training.helpers import examples, trainer_of, weights
from vlm.data.conversation import IGNORE
from vlm.data.dataset import TreeCollator
from vlm.data.tree_masks import TreeMasks
from vlm.training.peak import peak_flops
from vlm.training.step import flops_per_token, seconds_per_step
from vlm.tree_attention import tree_attention

LAYERS, WIDTH, HEADS, KEY_HEADS, HEAD, MLP, WORDS = 4, 32, 4, 2, 8, 48, 320
"""The decoder of `tests.tiny`."""


def linear(inputs, outputs, places, *, passes):
    """2 for a product with its addition, in each of the passes: forward, backward, and for the weights' gradient."""
    return 2 * inputs * outputs * places * passes


def encoder():
    """CLIP: 16 patches of 3 x 8 x 8, a class token, 3 layers 24 wide with 4 heads and an MLP of 48; forward alone."""
    patches, tokens = 16, 17
    layer = linear(24, 24, tokens, passes=4) + 2 * linear(24, 48, tokens, passes=1)
    scores = 4 * (2 * tokens * tokens * 6) * 2
    return linear(3 * 8 * 8, 24, patches, passes=1) + 3 * (layer + scores)


def projector():
    """Two layers for 16 patches. The features are frozen: the first layer gives no gradient to what is before it."""
    return linear(24, WIDTH, 16, passes=2) + linear(WIDTH, WIDTH, 16, passes=3)


def segments(tree):
    """Lengths of the trunk and of each branch."""
    return [tree.branch_ids.count(number) for number in range(max(tree.branch_ids) + 1)]


def scores(tree, by_trees):
    """How many pairs of tokens attention looks at, masked or not."""
    if not by_trees:
        return len(tree) ** 2
    trunk, *branches = segments(tree)
    return trunk**2 + len(branches) * max(branches) * (trunk + max(branches))


def decoder(tree, *, trained, by_trees):
    length, supervised = len(tree), sum(label != IGNORE for label in tree.labels)
    passes = 3 if trained else 2
    layer = 2 * linear(WIDTH, HEADS * HEAD, length, passes=passes)
    layer += 2 * linear(WIDTH, KEY_HEADS * HEAD, length, passes=passes)
    layer += 3 * linear(WIDTH, MLP, length, passes=passes)
    layer += HEADS * 2 * (2 * scores(tree, by_trees) * HEAD) * 3  # two products, forward and twice backward
    return LAYERS * layer + linear(WIDTH, WORDS, supervised, passes=passes)


@pytest.mark.few(4)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("by_trees", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_by_hand(tmp_path, trained, by_trees, checkpointing):
    made = tiny()
    rates = {"projector": 1e-3} | ({"language": 1e-3} if trained else {})
    trainer = trainer_of(tmp_path, rates, made=made, data=examples(8, 3), per_device_train_batch_size=8)
    if checkpointing:
        made[0].activation_checkpointing_enable()
        made[0].disable_input_require_grads()  # with which a frozen encoder would get a backward pass too
    trainer.data_collator = TreeCollator(made[1], masks=TreeMasks(made[0]) if by_trees else None)
    trees = [item.tree for row in trainer.train_dataset.rows for item in row]
    assert len({len(tree) for tree in trees}) > 1
    wanted = sum(encoder() + projector() + decoder(tree, trained=trained, by_trees=by_trees) for tree in trees)
    if by_trees:
        with tree_attention(made[0]):
            counted = flops_per_token(trainer, trainer.train_dataset)
    else:
        counted = flops_per_token(trainer, trainer.train_dataset)
    assert counted * sum(map(len, trees)) == pytest.approx(wanted, rel=1e-12)
    assert any(getattr(m, "gradient_checkpointing", False) for m in made[0].modules()) == checkpointing


def test_trying_a_step_changes_nothing(tmp_path):
    """Neither weights nor batch statistics nor random numbers, of which dropout takes some."""
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    made = tiny(vision_config=resnet)
    made[0].model.multi_modal_projector.register_forward_hook(lambda module, args, output: F.dropout(output, 0.1))
    trainer = trainer_of(tmp_path, {"vision": 1e-3, "projector": 1e-3, "language": 1e-3}, made=made)
    before, state = weights(made[0]), torch.get_rng_state()
    assert any("running_mean" in name for name in before)
    flops_per_token(trainer, trainer.train_dataset)
    assert seconds_per_step(trainer, trainer.train_dataset) > 0
    assert all(torch.equal(value, before[name]) for name, value in weights(made[0]).items())
    assert all(p.grad is None for p in made[0].parameters())
    assert torch.equal(torch.get_rng_state(), state)


def clock_of(*seconds):
    """A clock by which the products take so long, one after the other."""
    ticks = []
    for number, length in enumerate(seconds):
        ticks += [1000.0 * number, 1000.0 * number + length]
    ticks = iter(ticks)
    return lambda: next(ticks)


def test_the_peak_is_of_the_best_size_and_of_its_faster_products():
    cpu, state = torch.device("cpu"), torch.get_rng_state()
    one_size = clock_of(9, 0.3, 0.4, 0.1, 0.2, 0.5)  # the first one is not counted
    assert peak_flops(cpu, torch.float32, one_size) == pytest.approx(2 * 256**3 / 0.2)
    two_sizes = clock_of(*[0.02] * 6, *[0.1] * 6)
    assert peak_flops(cpu, torch.float32, two_sizes) == pytest.approx(2 * 512**3 / 0.1)
    slower = clock_of(*[0.02] * 6, *[0.2] * 6)
    assert peak_flops(cpu, torch.float32, slower) == pytest.approx(2 * 256**3 / 0.02)
    assert torch.equal(torch.get_rng_state(), state), "it is measured once a process, and no run may depend on which"
