"""Cross-attention by hand, and against transformers: Idefics' is near Flamingo's, Mllama is Llama 3.2 Vision."""

import pytest
import torch
from torch import nn
from transformers import IdeficsConfig, LlamaConfig, LlamaForCausalLM, MllamaForCausalLM
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import _prepare_cross_attention_mask

from vlm.adapters import FlamingoCrossAttention, IdeficsCrossAttention, MllamaCrossAttention, VisionStates
from vlm.fusion import insert_cross_attention

BLOCKS = {
    "flamingo": lambda: FlamingoCrossAttention(hidden_size=8, num_heads=2, index=3),
    "mllama": lambda: MllamaCrossAttention(8, num_heads=2, num_key_value_heads=1, intermediate_size=12, index=3),
    "idefics": lambda: IdeficsCrossAttention(8, num_heads=2, intermediate_size=12, index=3),
}


@pytest.fixture(params=BLOCKS)
def block(request):
    torch.manual_seed(0)
    return BLOCKS[request.param]().eval()


@torch.no_grad()
def opened(block):
    block.attention_gate.fill_(0.7)
    block.feed_forward_gate.fill_(-0.4)
    return block


def test_closed_gates_change_nothing(block):
    hidden = torch.randn(2, 5, 8)
    vision = VisionStates.of(torch.randn(2, 3, 8), torch.tensor([[0] * 5, [1] * 5]))
    assert torch.equal(block(hidden, vision), hidden)


def test_flamingos_equals_the_formula_by_hand():
    """Flamingo's block written out with loops over tokens and heads."""
    torch.manual_seed(0)
    block = opened(BLOCKS["flamingo"]().eval())
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


@torch.no_grad()
def test_flamingos_equals_that_of_idefics(parity):
    """What differs: Idefics' visual tokens come normalised from its resampler, and its feed-forward has a gate, so ours
    gets none of the first and Idefics' own of the second; and a token that sees no image has a feed-forward there."""
    torch.manual_seed(0)
    config = IdeficsConfig(
        hidden_size=16, num_attention_heads=4, intermediate_size=24, alpha_type="float", vision_config={"embed_dim": 16}
    )
    config._attn_implementation = "eager"
    stock = IdeficsGatedCrossAttentionLayer(config, 0).eval()
    for parameter in stock.parameters():
        parameter.normal_(std=0.5)
    block = FlamingoCrossAttention(16, num_heads=4, index=0, norm_eps=config.rms_norm_eps).eval()
    take_weights(block, stock, stock.cross_attn, stock.alpha_cross_attn, stock.alpha_dense)
    block.states_norm = nn.Identity()
    block.feed_forward = nn.Sequential(block.feed_forward[0], stock.mlp)
    hidden, images, index = torch.randn(2, 5, 16), torch.randn(3, 4, 16), torch.tensor([[-1, 0, 0, 1, 1], [2] * 5])
    vision = VisionStates.of(images, index)
    expected = stock(
        hidden,
        image_hidden_states=vision.states,
        image_attention_mask=torch.zeros(vision.mask.shape).masked_fill(~vision.mask, -1e9)[:, None],
        cross_attention_gate=vision.mask.any(dim=-1).float(),
    )
    found = block(hidden, vision)
    sees = index >= 0
    assert (expected - hidden)[sees].std() > 0.1
    parity("Flamingo", "gated cross-attention, that of Idefics", (found - expected)[sees].abs().max())
    assert (found - expected)[sees].abs().max() < 1e-5
    unseeing = hidden + stock.alpha_dense.tanh() * stock.mlp(stock.post_attention_layernorm(hidden))
    assert (unseeing - expected)[~sees].abs().max() < 1e-5
    assert torch.equal(found[~sees], hidden[~sees])


@torch.no_grad()
@pytest.mark.parametrize("alpha_type", ["float", "vector"])
def test_that_of_idefics_equals_it(alpha_type):
    """Every token, those that see no image too, with visual tokens of another width."""
    torch.manual_seed(0)
    config = IdeficsConfig(
        hidden_size=16,
        num_attention_heads=4,
        intermediate_size=24,
        alpha_type=alpha_type,
        qk_layer_norms=True,
        vision_config={"embed_dim": 12},
    )
    config._attn_implementation = "eager"
    stock = IdeficsGatedCrossAttentionLayer(config, 0).eval()
    for parameter in stock.parameters():
        parameter.normal_(std=0.5)
    block = IdeficsCrossAttention(16, 4, 24, index=0, norm_eps=config.rms_norm_eps, states_size=12).eval()
    take_weights(block, stock, stock.cross_attn, stock.alpha_cross_attn.flatten(), stock.alpha_dense.flatten())
    block.q_norm.load_state_dict(stock.cross_attn.q_layer_norm.state_dict())
    block.k_norm.load_state_dict(stock.cross_attn.k_layer_norm.state_dict())
    block.feed_forward[1].load_state_dict(stock.mlp.state_dict())
    hidden, images, index = torch.randn(2, 5, 16), torch.randn(3, 4, 12), torch.tensor([[-1, 0, 0, 1, 1], [2] * 5])
    vision = VisionStates.of(images, index)
    expected = stock(
        hidden,
        image_hidden_states=vision.states,
        image_attention_mask=torch.zeros(vision.mask.shape).masked_fill(~vision.mask, -1e9)[:, None],
        cross_attention_gate=vision.mask.any(dim=-1).float(),
    )
    assert (expected - hidden).std() > 0.1
    assert (block(hidden, vision) - expected).abs().max() < 1e-5
    assert (block(hidden, None) - expected)[0, 0].abs().max() < 1e-5


@torch.no_grad()
def take_weights(block, stock, attention, attention_gate, feed_forward_gate):
    block.norm.load_state_dict(stock.input_layernorm.state_dict())
    block.feed_forward[0].load_state_dict(stock.post_attention_layernorm.state_dict())
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(block, name).load_state_dict(getattr(attention, name).state_dict())
    block.attention_gate.copy_(attention_gate)
    block.feed_forward_gate.copy_(feed_forward_gate)


@torch.no_grad()
def test_a_decoder_with_mllamas_layers_equals_mllama(parity):
    """The whole decoder, with layers of its own as Llama's. What differs: in Mllama a token that sees no image attends
    to all of them, so here each sees one."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "pad_token_id": None,
    }
    cross_attention_layers = [1, 4, 6]
    config = MllamaTextConfig(**shape, num_hidden_layers=8, cross_attention_layers=cross_attention_layers)
    stock = MllamaForCausalLM(config).eval()
    for parameter in stock.parameters():
        parameter.normal_(std=0.4)
    ours = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=5)).eval()
    layers, decoder = list(stock.model.layers), ours.model
    own = [layer for number, layer in enumerate(layers) if number not in cross_attention_layers]
    for mine, theirs in zip(decoder.layers, own, strict=True):
        mine.load_state_dict(theirs.state_dict())
    decoder.norm.load_state_dict(stock.model.norm.state_dict())
    decoder.embed_tokens.weight.copy_(stock.model.embed_tokens.weight[:50])  # Mllama has 8 more, for its image token
    ours.lm_head.load_state_dict(stock.lm_head.state_dict())
    insert_cross_attention(ours, 1, cross_attention_layers)
    blocks = [layer.cross_attention for layer in decoder.layers if hasattr(layer, "cross_attention")]
    for block, number in zip(blocks, cross_attention_layers, strict=True):
        theirs = layers[number]
        take_weights(block, theirs, theirs.cross_attn, theirs.cross_attn_attn_gate, theirs.cross_attn_mlp_gate)
        block.q_norm.load_state_dict(theirs.cross_attn.q_norm.state_dict())
        block.k_norm.load_state_dict(theirs.cross_attn.k_norm.state_dict())
        block.feed_forward[1].load_state_dict(theirs.mlp.state_dict())

    ids, images = torch.randint(0, 50, (2, 7)), torch.randn(3, 4, 16)
    index = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2] * 7])
    vision = VisionStates.of(images, index)
    mask = vision.mask.float()[:, :, ::4, None]  # by image, and one tile an image
    mask, rows = _prepare_cross_attention_mask(mask, num_vision_tokens=4, dtype=torch.float32)
    expected = stock(
        ids, cross_attention_states=vision.states, cross_attention_mask=mask, full_text_row_masked_out_mask=rows
    ).logits
    found = ours(ids, vision_states=vision).logits
    without = ours(ids).logits
    assert (without - expected).abs().max() > 0.1
    parity("Llama 3.2 Vision", "logits of its decoder", (found - expected).abs().max())
    assert (found - expected).abs().max() < 1e-5


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
        assert torch.equal(together[1], block(hidden, None)[1])
        assert torch.equal(together[1], hidden[1]) != block.feeds_every_token
        assert torch.allclose(together[:1], block(hidden[:1], VisionStates.of(images[:2], index[:1])), atol=1e-6)
        alone = block(hidden[2:], VisionStates.of(images[2:], index[2:].clamp(max=0)))
        assert torch.allclose(together[2:], alone, atol=1e-6)


def test_gradients_reach_gates_first_then_everything(block):
    vision = VisionStates.of(torch.randn(1, 4, 8), torch.tensor([[-1, 0]]))
    block(torch.randn(1, 2, 8), vision).square().sum().backward()
    assert (block.attention_gate.grad.abs() > 0).all()
    assert (block.feed_forward_gate.grad.abs() > 0).all()
    opened(block).zero_grad()
    vision = VisionStates.of(torch.randn(1, 4, 8), torch.tensor([[-1, 0]]))
    block(torch.randn(1, 2, 8), vision).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())


def test_blocks_work_in_bfloat16(block):
    opened(block)
    images, hidden, index = torch.randn(2, 4, 8), torch.randn(2, 3, 8), torch.tensor([[-1, 0, 0], [1, 1, 1]])
    with torch.no_grad():
        expected = block(hidden, VisionStates.of(images, index))
        found = block.bfloat16()(hidden.bfloat16(), VisionStates.of(images.bfloat16(), index))
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected, atol=0.1)


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
