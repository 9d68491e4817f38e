"""What a checkpoint lacks is initialized as in a new model, and what it has stays as it is. Commands refuse it."""

import math
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, BertConfig

import vlm  # noqa: F401 - registers the Auto classes
from tests.dual_encoders import text_sizes
from tests.stock import STOCK, stock
from tests.stock_prompted import PROMPTED
from tests.tiny import ALL_FUSIONS, DECODERS, clip_config, small_projector, tiny
from vlm.adapters import PROJECTORS
from vlm.dual_encoder import DualEncoderConfig, DualEncoderModel
from vlm.errors import UserError
from vlm.generation import load

TILES = {"type": "tiles", "max_tiles": 2}
BRIDGES = {
    **{
        f"resampler-{variant}": {"projector": {**small_projector("resampler"), "variant": variant}}
        for variant in ("idefics", "idefics2")
    },
    **{name: {"projector": small_projector(name)} for name in PROJECTORS},
    **{f"{name}-tiles": {"fusion": name, "tiling": TILES} for name in ALL_FUSIONS},
    **{f"cross_attention-{decoder}": {"fusion": "cross_attention", "decoder": decoder} for decoder in DECODERS},
    "qformer-text": {"projector": {**small_projector("qformer"), "use_qformer_text_input": True}},
    "anyres": {"tiling": {"type": "anyres", "max_tiles": 2}},
    "anyres-both": {"fusion": "prefix+cross_attention", "tiling": {"type": "anyres", "max_tiles": 2}},
}
OWN = ("multi_modal_projector", "cross_attention", "tile_positions", "anyres_merger")


@pytest.fixture(autouse=True)
def nan_in_memory() -> Iterator[None]:
    """Memory that nothing was written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def without(folder, names):
    """Take the tensors `names` out of the checkpoint in `folder`, and load it."""
    path = folder / "model.safetensors"
    whole = load_file(path)
    save_file({key: value for key, value in whole.items() if key not in names}, path, metadata={"format": "pt"})
    loaded = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    save_file(whole, path, metadata={"format": "pt"})
    return loaded


def alike(found, new):
    """Whether two tensors are equal constants, or drawn from one normal distribution around 0."""
    if new.numel() == 1 or new.std() == 0:
        return torch.equal(found, new)
    far = 6 * new.std() / math.sqrt(new.numel())
    return found.mean().abs() < far and (found.std() - new.std()).abs() < far


@torch.no_grad()
def saved(folder, bridge):
    """What a model has of its own, all of it unlike what a new model has, by name; and that of a new one."""
    options = {"gates": False, **BRIDGES[bridge]}
    model, _ = tiny(**options)
    trained = {name: tensor.fill_(7) for name, tensor in model.state_dict().items() if {*OWN} & {*name.split(".")}}
    model.save_pretrained(folder)
    return trained, tiny(**options, seed=1)[0].state_dict()


@pytest.mark.few(3)
@pytest.mark.parametrize("bridge", BRIDGES)
def test_all_that_is_missing_is_as_in_a_new_model(bridge, tmp_path):
    trained, new = saved(tmp_path, bridge)
    loaded = without(tmp_path, trained)
    wrong = [name for name in trained if not alike(loaded[name], new[name])]
    assert not wrong
    gates = [name for name in trained if name.endswith("gate")]
    assert all(not loaded[name].any() for name in gates)
    assert all((loaded[name] == 1).all() for name in trained if "cross_attention" in name and "norm.weight" in name)


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("bridge", BRIDGES)
def test_every_second_tensor_is_missing_and_the_others_stay(bridge, half, tmp_path):
    trained, new = saved(tmp_path, bridge)
    missing = {*list(trained)[half::2]}
    loaded = without(tmp_path, missing)
    assert all(alike(loaded[name], new[name]) for name in missing)
    assert all((loaded[name] == 7).all() for name in trained if name not in missing)


@pytest.mark.parametrize("missing", ["logit_bias", "text_projection.weight"])
def test_of_a_dual_encoder(missing, tmp_path):
    texts = BertConfig(**text_sizes())
    shape = {"vision_pooled_size": 24, "projection_dim": 16, "logit_bias_init_value": -10.0}
    config = DualEncoderConfig(vision_config=clip_config(), text_config=texts, **shape)
    new = DualEncoderModel(config).state_dict()
    model = DualEncoderModel(config)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != missing}, path, metadata={"format": "pt"})
    loaded = AutoModel.from_pretrained(tmp_path).state_dict()
    assert alike(loaded[missing], new[missing])
    own = ("logit_scale", "logit_bias", "text_projection.weight", "visual_projection.weight")
    assert all((loaded[name] == 7).all() for name in own if name != missing)


def refused(folder, name):
    """Whether a checkpoint without the weight `name` is refused by it."""
    path = folder / "model.safetensors"
    whole = load_file(path)
    save_file({key: value for key, value in whole.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks weights of ") as raised:
        load(str(folder), device="cpu")
    save_file(whole, path, metadata={"format": "pt"})
    return str(raised.value)


def test_a_checkpoint_that_lacks_weights_is_not_loaded(tmp_path):
    for part in tiny(fusion="prefix+cross_attention", tie_word_embeddings=True):
        part.save_pretrained(tmp_path)
    names = [*load_file(tmp_path / "model.safetensors")]
    assert not [name for name in names if "lm_head" in name], "it is tied, and need not be there"
    load(str(tmp_path), device="cpu")
    for part in ("vision_tower", "multi_modal_projector", "gate", "embed_tokens"):
        name = next(name for name in names if part in name and "pooler" not in name)
        said = refused(tmp_path, name)
        assert f"cannot load '{tmp_path}'" in said
        assert name.rpartition(".")[0].rpartition(".")[2] in said


@pytest.mark.few(3)
@pytest.mark.parametrize("name", [*STOCK, *PROMPTED])
def test_of_a_transformers_model_too(name, tmp_path):
    for part in stock(name):
        part.save_pretrained(tmp_path)
    load(str(tmp_path), device="cpu")
    names = sorted(load_file(tmp_path / "model.safetensors"))
    for gone in names[:: max(1, len(names) // 3)]:
        assert gone.rpartition(".")[2] in refused(tmp_path, gone)
