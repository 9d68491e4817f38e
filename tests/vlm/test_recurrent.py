"""Language models with recurrent layers, which keep a state in place of keys and values."""

import pytest
import torch
from transformers import (
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    Lfm2Config,
    Mamba2Config,
    MambaConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

from tests.tiny import VOCABULARY, encode, image, tiny, user
from vlm import generation
from vlm.session import Session

STATE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
STATE |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
HYBRID = STATE | {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
CONFIGS = {
    "mamba": MambaConfig(**STATE, state_size=8),
    "mamba2": Mamba2Config(**STATE, state_size=8, num_heads=8, head_dim=8, n_groups=1),
    "recurrent_gemma": RecurrentGemmaConfig(
        **STATE | {"num_hidden_layers": 3}, num_attention_heads=4, intermediate_size=48, lru_width=32
    ),
    "lfm2": Lfm2Config(**HYBRID, layer_types=["conv", "full_attention"] * 2),
    "falcon_h1": FalconH1Config(**HYBRID, mamba_d_ssm=32, **MAMBA_2 | {"mamba_n_heads": 4}),
    "bamba": BambaConfig(**HYBRID, attn_layer_indices=[1, 3], **MAMBA_2),
    "jamba": JambaConfig(
        **HYBRID, mamba_d_state=8, mamba_dt_rank=4, num_experts=2, attn_layer_offset=1, attn_layer_period=2,
        use_mamba_kernels=False,
    ),
    "granitemoehybrid": GraniteMoeHybridConfig(
        **HYBRID, layer_types=["mamba", "attention"] * 2, num_local_experts=0, **MAMBA_2
    ),
    "qwen3_next": Qwen3NextConfig(
        **HYBRID, **EXPERTS, **LINEAR, head_dim=8, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"] * 2,
    ),
}  # fmt: skip


def asked(picture, text):
    return [picture], [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


@pytest.fixture(params=CONFIGS)
def made(request):
    model, processor = tiny(text=CONFIGS[request.param])
    model.generation_config.eos_token_id = None
    return model, processor


def test_a_batch_answers_as_each_alone_and_as_without_a_cache(made):
    """Prompts of several lengths, two of them about the same image."""
    first, second = image(1), image(2)
    requests = [asked(first, "what is this"), asked(first, "where is it now"), asked(second, "what")]
    together = generation.generate(*made, requests, max_new_tokens=8)
    assert together == [generation.generate(*made, [request], max_new_tokens=8)[0] for request in requests]
    assert together == generation.generate(*made, requests, max_new_tokens=8, use_cache=False)


def test_a_conversation_goes_on_as_if_read_anew(made):
    picture = image(1)
    messages = asked(picture, "what is this")[1]
    going_on = Session(*made)
    said = "".join(going_on.stream(([picture], messages), max_new_tokens=6))
    messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": said}]}]
    messages.append({"role": "user", "content": [{"type": "text", "text": "and where"}]})
    answers = ["".join(s.stream(([picture], messages), max_new_tokens=6)) for s in (going_on, Session(*made))]
    assert answers[0] == answers[1]


@torch.no_grad()
def test_the_image_matters(made):
    model, processor = made
    one, other = (model(**encode(processor, [[user(image(n), "what")]])).logits[0, -1] for n in (1, 2))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_cross_attention_where_it_has_a_place(name):
    if name in ("mamba", "mamba2"):
        with pytest.raises(ValueError, match=r"does not pass .* to its layers|has no attention"):
            tiny(text=CONFIGS[name], fusion="cross_attention")
        return
    model, processor = tiny(text=CONFIGS[name], fusion="cross_attention")
    model.generation_config.eos_token_id = None
    requests = [asked(image(1), "what is this"), asked(image(2), "what")]
    together = generation.generate(model, processor, requests, max_new_tokens=8)
    assert together == [generation.generate(model, processor, [one], max_new_tokens=8)[0] for one in requests]
    assert together == generation.generate(model, processor, requests, max_new_tokens=8, use_cache=False)
