import pytest
import torch

from vlm.adapters import GatedCrossAttention, VisionStates


@pytest.fixture
def block():
    torch.manual_seed(0)
    return GatedCrossAttention(hidden_size=8, num_heads=2, index=3).eval()


@torch.no_grad()
def opened(block):
    block.attention_gate.fill_(0.7)
    block.feed_forward_gate.fill_(-0.4)
    return block


def test_closed_gates_change_nothing(block):
    hidden = torch.randn(2, 5, 8)
    vision = VisionStates.of(torch.randn(2, 3, 8), torch.tensor([[0] * 5, [1] * 5]))
    assert torch.equal(block(hidden, vision), hidden)


def test_equals_the_formula_by_hand(block):
    """Flamingo's block written out with loops over tokens and heads."""
    opened(block)
    hidden, images = torch.randn(1, 3, 8), torch.randn(2, 4, 8)
    vision = VisionStates.of(images, torch.tensor([[-1, 0, 1]]))
    with torch.no_grad():
        actual = block(hidden, vision)[0]
        assert torch.equal(actual[0], hidden[0, 0]), "a token before the first image sees nothing"
        for token, image in ((1, 0), (2, 1)):
            x, states = hidden[0, token], block.states_norm(images[image])
            query, keys, values = block.q_proj(block.norm(x)), block.k_proj(states), block.v_proj(states)
            heads = []
            for head in (slice(0, 4), slice(4, 8)):
                weights = (keys[:, head] @ query[head] / 2).softmax(dim=0)
                heads.append(weights @ values[:, head])
            x = x + torch.tanh(torch.tensor(0.7)) * block.o_proj(torch.cat(heads))
            x = x + torch.tanh(torch.tensor(-0.4)) * block.feed_forward(x)
            assert torch.allclose(actual[token], x, atol=1e-6)


def test_going_on_with_another_image_equals_having_both_from_the_start(block):
    opened(block)
    images, hidden = torch.randn(3, 4, 8), torch.randn(2, 5, 8)
    whole = VisionStates.of(images, torch.tensor([[0, 0, 0, 1, 1], [-1, 2, 2, 2, 2]]))
    before = VisionStates.of(images[[0, 2]], torch.tensor([[0, 0], [-1, 1]]))
    after = before.followed_by(VisionStates.of(images[1:2], torch.tensor([[-1, 0, 0], [-1, -1, -1]])))
    with torch.no_grad():
        assert torch.allclose(block(hidden[:, 2:], after), block(hidden, whole)[:, 2:], atol=1e-6)


def test_selected_rows_are_the_rows_and_compute_nothing_again(block):
    opened(block)
    images, hidden = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    index, rows = torch.tensor([[0, 1], [-1, -1], [2, 2]]), torch.tensor([2, 0, 2, 1])
    with torch.no_grad():
        block(hidden, vision := VisionStates.of(images, index))
        computed = []
        block.k_proj.register_forward_hook(lambda *_: computed.append(1))
        found = block(hidden[rows], vision.select(rows))
        assert not computed
        for row, result in zip(rows.tolist(), found, strict=True):
            alone = VisionStates.of(images, index[row : row + 1])
            assert torch.allclose(result, block(hidden[row : row + 1], alone)[0], atol=1e-6)


def test_rows_see_their_own_images_whatever_their_number(block):
    opened(block)
    images = torch.randn(3, 4, 8)
    index = torch.tensor([[0, 1, 1], [-1, -1, -1], [-1, 2, 2]])  # two images, none, one
    hidden = torch.randn(3, 3, 8)
    vision = VisionStates.of(images, index)
    assert vision.states.shape == (3, 8, 8)
    assert vision.mask.shape == (3, 3, 8)
    with torch.no_grad():
        together = block(hidden, vision)
        assert torch.equal(together[1], hidden[1])
        assert torch.allclose(together[:1], block(hidden[:1], VisionStates.of(images[:2], index[:1])), atol=1e-6)
        alone = block(hidden[2:], VisionStates.of(images[2:], index[2:].clamp(max=0)))
        assert torch.allclose(together[2:], alone, atol=1e-6)


def test_gradients_reach_gates_first_then_everything(block):
    vision = VisionStates.of(torch.randn(1, 4, 8), torch.tensor([[-1, 0]]))
    block(torch.randn(1, 2, 8), vision).square().sum().backward()
    assert block.attention_gate.grad.abs() > 0
    assert block.feed_forward_gate.grad.abs() > 0
    opened(block).zero_grad()
    vision = VisionStates.of(torch.randn(1, 4, 8), torch.tensor([[-1, 0]]))
    block(torch.randn(1, 2, 8), vision).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())


def test_keys_and_values_are_kept_for_the_next_tokens_only_without_gradients(block):
    calls = []
    block.k_proj.register_forward_hook(lambda *_: calls.append(1))
    vision = VisionStates.of(torch.randn(1, 4, 8), torch.tensor([[0, 0]]))
    block(torch.randn(1, 2, 8), vision)
    assert vision.keys_values == {}
    with torch.no_grad():
        block(torch.randn(1, 2, 8), vision)
        for _ in range(3):
            vision = vision.for_next_tokens(1)
            block(torch.randn(1, 1, 8), vision)
    assert len(calls) == 2
    block.train()
    with torch.no_grad():  # the first run of a reentrant checkpoint
        fresh = VisionStates.of(torch.randn(1, 4, 8), torch.tensor([[0, 0]]))
        block(torch.randn(1, 2, 8), fresh)
    assert fresh.keys_values == {}


def test_accelerate_moves_vision_states_between_devices():
    from accelerate.utils import send_to_device

    vision = VisionStates.of(torch.randn(1, 4, 8), torch.tensor([[0, 0]]))
    moved = send_to_device({"vision_states": vision}, "meta")["vision_states"]
    assert moved.states.device.type == moved.mask.device.type == "meta"
    assert moved.keys_values is vision.keys_values
    assert moved.read_by is vision.read_by
    assert send_to_device(vision, "cpu") is vision
