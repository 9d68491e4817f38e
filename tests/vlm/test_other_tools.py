"""What other tools ask of a model: compiled decoding, tensor parallelism, pipelines, servers' counts of tokens."""

import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CompileConfig, pipeline

from tests.counterparts import counterpart
from tests.tiny import ALL_FUSIONS, encode, image, logits, tiny, user
from vlm.interop import from_stock
from vlm.placeholders import image_types

# --- compiled decoding


@pytest.mark.slow
@pytest.mark.parametrize(
    ("decoder", "fusion"),
    [("llama", "prefix"), ("llama", "cross_attention"), ("qwen3", "prefix+cross_attention"), ("gemma3", "prefix")],
)
def test_decoding_with_a_static_cache_is_one_graph(decoder, fusion):
    """A break in the graph would be an error. Llama's steps have one graph, whatever the fusion; Gemma 3 counts the
    tokens of its window."""
    model, processor = tiny(decoder, fusion)
    inputs = encode(processor, [[user(image(0), "what is it")], [user("a dog", image(1), image(2))]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = model.generate(**inputs, **options)
    whole = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    whole._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = model.generate(**inputs, **options, cache_implementation="static", compile_config=whole)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(found, wanted)
    assert graphs == 1 or (decoder == "gemma3" and graphs > 1)


# --- tensor parallelism


@pytest.mark.parametrize("fusion", ALL_FUSIONS)
def test_the_plan_of_tensor_parallelism_names_modules_of_the_model(fusion):
    """The layers of the decoder and the output layer are split, also those with cross-attention before them."""
    model, _ = tiny(fusion=fusion)
    names = {re.sub(r"\d+", "*", name) for name, _ in model.named_modules()}
    assert model.tp_plan.keys() <= names
    linear = [name for name, module in model.model.language_model.named_modules() if name.endswith("_proj")]
    own = {re.sub(r"\d+", "*", f"model.language_model.{name}") for name in linear if "cross_attention" not in name}
    assert model.tp_plan.keys() == own | {"model.language_model.embed_tokens", "lm_head"}
    model.tp_plan = model.tp_plan  # which checks the styles


IN_PARTS = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig
import vlm

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=2))
queries = [weight for name, weight in model.named_parameters() if name.endswith("self_attn.q_proj.weight")]
halves = [weight.to_local() for weight in queries if hasattr(weight, "to_local")]
assert [half.shape for half in halves] == [(16, 32)] * 4, halves
with torch.no_grad():
    logits = model(**load_file(sys.argv[1] + "/inputs.safetensors")).logits
if torch.distributed.get_rank() == 0:
    save_file({"logits": logits.full_tensor() if hasattr(logits, "full_tensor") else logits}, sys.argv[1] + "/found")
"""


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_two_processes_with_half_of_each_layer(fusion, tmp_path):
    model, processor = tiny(fusion=fusion)
    inputs = dict(encode(processor, [[user(image(0), "what is it")], [user("a dog", image(1))]]))
    model.save_pretrained(tmp_path)
    save_file(inputs, tmp_path / "inputs.safetensors")
    (tmp_path / "worker.py").write_text(IN_PARTS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "worker.py")]
    subprocess.run([sys.executable, *launch, str(tmp_path)], check=True)
    assert torch.allclose(load_file(tmp_path / "found")["logits"], logits(model, **inputs), atol=1e-4)


# --- pipelines


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("model"))
    model, processor = tiny()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


def test_any_to_any(saved):
    folder, model, processor = saved
    messages = [user(image(0), "what is it")]
    made = pipeline("any-to-any", model=folder)(text=messages, max_new_tokens=4, return_full_text=False)
    inputs = encode(processor, [messages])
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert made[0]["generated_text"] == processor.decode(new[0], skip_special_tokens=True)


def test_feature_extraction(saved):
    folder, model, processor = saved
    found = torch.tensor(pipeline("feature-extraction", model=folder)("what is it"))
    with torch.no_grad():
        wanted = model.model(**processor.tokenizer("what is it", return_tensors="pt")).last_hidden_state
    assert torch.allclose(found, wanted, atol=1e-6)


# --- image features


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
def test_image_features_are_the_visual_tokens_and_what_they_are_made_of(fusion):
    model, processor = tiny(fusion=fusion)
    inputs = encode(processor, [[user(image(0), "what"), user(image(1), "is it")]])
    with torch.no_grad():
        found = model.get_image_features(inputs["pixel_values"])
        features, grid = model.get_vision_features(inputs["pixel_values"])
        tokens = model.model.multi_modal_projector(features, grid)
        assert torch.equal(torch.stack(found.pooler_output), tokens)
        assert torch.equal(found.last_hidden_state, features)
        assert torch.equal(torch.stack(model(**inputs).image_hidden_states), tokens)
        as_tuple = model.get_image_features(inputs["pixel_values"], return_dict=False)
    assert torch.equal(as_tuple[0], features)


# --- what servers count

SIZES = [(32, 32), (40, 90), (90, 40), (64, 64), (20, 200)]


@pytest.mark.parametrize("name", ["llava", "llava_next, tiles", "idefics3, tiles", "smolvlm, tiles"])
def test_images_take_as_many_tokens_as_the_processor_of_transformers_says(name):
    _, processor = from_stock(*(made := counterpart(name)))
    found = processor._get_num_multimodal_tokens(image_sizes=SIZES)
    wanted = made[1]._get_num_multimodal_tokens(image_sizes=SIZES)
    assert found["num_image_tokens"] == wanted["num_image_tokens"]
    if name != "llava_next, tiles":  # that of LLaVA-NeXT says one patch, however many there are
        assert found["num_image_patches"] == wanted["num_image_patches"]


TILINGS = [None, *({"type": kind, "max_tiles": 4} for kind in ("tiles", "idefics3", "anyres"))]


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: tiling["type"] if tiling else "none")
def test_images_are_where_the_types_say(tiling):
    """Each image is one run of tokens, as long as its count, and begins and ends with tokens of its own."""
    model, processor = tiny(tiling=tiling)
    pictures = [image(n, (width, height)) for n, (height, width) in enumerate(SIZES)]
    counts = processor._get_num_multimodal_tokens(image_sizes=SIZES)
    text = "\n a cat \n".join(["<image>"] * len(SIZES)) + "\n"
    inputs = processor(images=pictures, text=text, return_tensors="pt", return_mm_token_type_ids=True)
    types = inputs["mm_token_type_ids"][0]
    starts = torch.where(types.diff(prepend=torch.zeros(1, dtype=types.dtype)) == 1)[0]
    ends = torch.where(types.diff(append=torch.zeros(1, dtype=types.dtype)) == -1)[0]
    assert (ends - starts + 1).tolist() == counts["num_image_tokens"]
    assert sum(counts["num_image_patches"]) == len(inputs["pixel_values"])
    assert bool((types[inputs["input_ids"][0] == processor.image_token_id] == 1).all())
    assert "a cat" not in processor.decode(inputs["input_ids"][0][types == 1])
    del inputs["mm_token_type_ids"]
    assert logits(model, **inputs).isfinite().all()


def test_the_types_of_rows_in_tiles():
    """1 is the image token, 2 and 3 mark tiles, 4 the thumbnail, 9 breaks a line."""
    row = [9, 2, 1, 1, 3, 1, 1, 9, 9, 4, 1, 1, 9, 4, 1, 1, 7]
    assert image_types(row, {1}, {2, 3}, 4) == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0]
    assert image_types([7, 1, 1, 9, 1, 7], {1}, set(), None) == [0, 1, 1, 0, 1, 0]
