"""`vlm export --to gguf`: the files have all that the model computes with, where llama.cpp looks for it."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.counterparts import EXPRESSIBLE, IDEFICS3_MARKERS, fit, siglip
from tests.tiny import metaspace_tokenizer, tiny
from vlm.cli import app
from vlm.errors import UserError
from vlm.interop.gguf import write

gguf = pytest.importorskip("gguf")

CASES = {
    "mlp, llama": EXPRESSIBLE["llava"],
    "mlp, output of SigLIP, qwen2": lambda: siglip("mlp", decoder="qwen2"),
    "pixel_shuffle, qwen3": lambda: siglip({"type": "pixel_shuffle"}, decoder="qwen3", image_markers=IDEFICS3_MARKERS),
}


def read(path):
    """Its keys, and its tensors as torch has them."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    model, processor = CASES[request.param]()
    fit(model)
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    result = CliRunner().invoke(app, ["export", str(folder), "--to", "gguf"])
    assert result.exit_code == 0, result.output
    out = folder / "exported-gguf"
    return model, processor, read(out / "model.gguf"), read(out / "mmproj.gguf")


def test_every_tensor_of_the_language_model_is_there(written):
    model, _, (fields, tensors), _ = written
    left = dict(tensors)
    decoder = model.model.language_model
    for name, parameter in [("token_embd", decoder.embed_tokens), ("output_norm", decoder.norm)]:
        assert torch.allclose(left.pop(f"{name}.weight").float(), parameter.weight, rtol=1e-3, atol=1e-6)
    assert torch.allclose(left.pop("output.weight").float(), model.lm_head.weight, rtol=1e-3, atol=1e-6)
    for number, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        parts = {"attn_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm}
        parts |= {"attn_v": attention.v_proj, "attn_output": attention.o_proj, "ffn_gate": mlp.gate_proj}
        parts |= {"ffn_up": mlp.up_proj, "ffn_down": mlp.down_proj}
        parts |= {"attn_q": attention.q_proj, "attn_k": attention.k_proj}
        if hasattr(attention, "q_norm"):
            parts |= {"attn_q_norm": attention.q_norm, "attn_k_norm": attention.k_norm}
        for name, part in parts.items():
            for kind, wanted in part.named_parameters():
                if fields["general.architecture"] == "llama" and name in ("attn_q", "attn_k"):
                    # Pairs that are rotated together: rows i and i + 4 of a head, neighbours in the file.
                    heads = wanted.reshape(-1, 8, wanted.shape[1])
                    wanted = heads[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(wanted.shape)
                assert torch.allclose(left.pop(f"blk.{number}.{name}.{kind}").float(), wanted, rtol=1e-3, atol=1e-6)
    assert not left


def test_every_tensor_of_the_encoder_that_is_used_is_there(written):
    model, _, _, (fields, tensors) = written
    tower = model.model.vision_tower
    layers = 2
    assert fields["clip.vision.block_count"] == layers
    if fields["clip.projector_type"] == "mlp":
        assert fields["clip.has_llava_projector"]
        assert fields["clip.vision.feature_layer"] == [layers]
    left = dict(tensors)

    def take(name, wanted):
        assert torch.allclose(left.pop(name).float(), wanted.detach(), rtol=1e-3, atol=1e-6), name

    embeddings = tower.embeddings
    take("v.patch_embd.weight", embeddings.patch_embedding.weight)
    take("v.position_embd.weight", embeddings.position_embedding.weight)
    if hasattr(embeddings, "class_embedding"):
        take("v.class_embd", embeddings.class_embedding)
        take("v.pre_ln.weight", tower.pre_layrnorm.weight)
        take("v.pre_ln.bias", tower.pre_layrnorm.bias)
    else:
        take("v.patch_embd.bias", embeddings.patch_embedding.bias)
    for number, layer in enumerate(tower.encoder.layers[:layers]):
        attention = layer.self_attn
        parts = {"ln1": layer.layer_norm1, "ln2": layer.layer_norm2, "attn_q": attention.q_proj}
        parts |= {"attn_k": attention.k_proj, "attn_v": attention.v_proj, "attn_out": attention.out_proj}
        parts |= {"ffn_up": layer.mlp.fc1, "ffn_down": layer.mlp.fc2}
        for name, part in parts.items():
            take(f"v.blk.{number}.{name}.weight", part.weight)
            take(f"v.blk.{number}.{name}.bias", part.bias)
    kind = model.config.projector["type"]
    projector = {"mlp": {"mm.0", "mm.2"}, "pixel_shuffle": {"mm.model.fc"}}[kind]
    wanted = {f"{name}.{part}" for name in projector for part in (["weight", "bias"] if kind == "mlp" else ["weight"])}
    assert left.keys() - {"v.post_ln.weight", "v.post_ln.bias"} == wanted
    assert ("v.post_ln.weight" in left) == (model.config.vision_config.model_type != "clip_vision_model")


def test_statistics_are_folded_in(written):
    """What the first layer behind them does to standardised features, it does to features as they are."""
    model, _, _, (_, tensors) = written
    features = torch.randn(1, 16, 24, generator=torch.Generator().manual_seed(0))
    standardized = model.model.multi_modal_projector.standardize(features, (4, 4))
    if model.config.projector["type"] == "mlp":
        wanted = model.model.multi_modal_projector.linear_1(standardized)
        found = torch.nn.functional.linear(features, tensors["mm.0.weight"].float(), tensors["mm.0.bias"])
    else:
        norm = model.model.vision_tower.post_layernorm
        wanted = model.model.multi_modal_projector.standardize(norm(features), (4, 4))
        found = torch.nn.functional.layer_norm(
            features, (24,), tensors["v.post_ln.weight"], tensors["v.post_ln.bias"], norm.eps
        )
    assert (found - wanted).abs().max() < 2e-2 * wanted.abs().max()


def test_the_tokenizer_is_whole(written):
    model, processor, (fields, _), _ = written
    tokenizer = processor.tokenizer
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == model.get_input_embeddings().num_embeddings
    assert tokens[: len(tokenizer)] == [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    assert types[tokenizer.convert_tokens_to_ids("<image>")] == gguf.TokenType.CONTROL
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.chat_template"].startswith("{% for message in messages %}{{ '<|im_start|>'")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(projector="linear"), "the projector is linear"),
        (lambda: tiny(fusion="cross_attention"), "fusion: prefix"),
        (lambda: tiny("gpt2"), "the language model is gpt2"),
        (lambda: tiny(vision_feature_select_strategy="full"), "leaves the class token out"),
        (lambda: siglip({"type": "pixel_shuffle"}), "image_markers"),
        (lambda: tiny(tiling={"type": "tiles", "max_tiles": 4}), "cut into tiles"),
        (lambda: tiny(tokenizer=metaspace_tokenizer()), "byte-level"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        write(*make(), tmp_path)
