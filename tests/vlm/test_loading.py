"""A damaged checkpoint is refused with a message that names its folder and file; a bug of ours is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.dual_encoders import save_clip
from tests.tiny import byte_level_tokenizer, clip_config, image, image_processor, text_config, tiny
from vlm import generation, loading
from vlm.build import build, load_vision
from vlm.dual_encoder import load_text_encoder
from vlm.embedding import load_embedder
from vlm.errors import UserError
from vlm.processing import VLMProcessor

REQUEST = ([image(0)], [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    for part in tiny():
        part.save_pretrained(folder / "model")
    AutoModel.from_config(clip_config()).save_pretrained(folder / "vision")
    image_processor().save_pretrained(folder / "vision")
    tokenizer = byte_level_tokenizer()
    config = text_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    save_clip(folder / "clip")
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """Copies, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "copies"))


def refusal(load: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        load()
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


LOADS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "model": ("model", lambda folder: generation.load(str(folder / "model"), device="cpu")),
    "clip": ("clip", lambda folder: load_embedder(str(folder / "clip"), device="cpu")),
    "encoder": ("vision", lambda folder: load_embedder(str(folder / "vision"), device="cpu")),
    "vision": ("vision", lambda folder: load_vision(str(folder / "vision"))),
    "language": ("language", lambda folder: build(str(folder / "vision"), str(folder / "language"))),
    "text": ("language", lambda folder: load_text_encoder(str(folder / "language"), pooled=False)),
}


@pytest.mark.parametrize("name", LOADS)
@pytest.mark.parametrize("content", ["[]", "{", "\xff", "[" * 100_000, "7"])
def test_a_file_that_is_no_object(name: str, content: str, folder: Path) -> None:
    part, load = LOADS[name]
    (folder / part / "config.json").write_text(content, encoding="latin-1")
    said = refusal(lambda: load(folder))
    assert f"cannot load '{folder / part}'" in said
    assert "config.json is damaged" in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("name", "other", "said"),
    [
        ("language", "vision", "its config.json is that of another kind of model (CLIPVision)"),
        ("language", "model", "its config.json is that of another kind of model (VLM)"),
        ("vision", "language", "it has no files of an image processor; is it a model of another kind?"),
    ],
)
def test_a_model_of_another_kind_is_named_in_a_line(name: str, other: str, said: str, folder: Path) -> None:
    """Where transformers lists all the models that it has."""
    part, load = LOADS[name]
    shutil.rmtree(folder / part)
    shutil.copytree(folder / other, folder / part)
    found = refusal(lambda: load(folder))
    assert said in found
    assert len(found) < 300


@pytest.mark.parametrize("name", LOADS)
def test_weights_that_are_cut(name: str, folder: Path) -> None:
    part, load = LOADS[name]
    weights = folder / part / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = refusal(lambda: load(folder))
    assert f"cannot load '{folder / part}'" in said
    assert "model.safetensors is damaged" in said


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"vision_config": 7}),
        ("config.json", {"text_config": {"model_type": "llama", "hidden_size": "wide"}}),
        ("config.json", {"projector": {"type": "nothing"}}),
        ("config.json", {"projector": {"type": "resampler", "num_image_tokens": "many"}}),
        ("config.json", {"projector": [1]}),
        ("config.json", {"fusion": "sideways"}),
        ("config.json", {"image_seq_length": 1.5}),
        ("config.json", {"tiling": {"type": "tiles", "max_tiles": 10**12, "tile_size": [32, 32]}}),
        ("config.json", {"tiling": {"type": "tiles", "max_tiles": 4}}),
        ("processor_config.json", {"image_processor": {"image_processor_type": "NoSuchProcessor"}}),
        ("processor_config.json", {"image_seq_length": float("nan")}),
        ("processor_config.json", {"tiling": 7}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": 7}}),
    ],
)
def test_a_wrong_value(file: str, changes: dict[str, Any], folder: Path) -> None:
    edit(folder / "model" / file, **changes)
    assert f"cannot load '{folder / 'model'}'" in refusal(lambda: LOADS["model"][1](folder))


def test_a_damaged_generation_config_is_not_left_out(folder: Path) -> None:
    """transformers makes one of its own then, and says so in its log only."""
    (folder / "model" / "generation_config.json").write_text("{")
    assert "generation_config.json is damaged" in refusal(lambda: LOADS["model"][1](folder))


def test_an_index_without_its_shards(folder: Path) -> None:
    (folder / "model" / "model.safetensors").rename(folder / "model" / "other.safetensors")
    index = folder / "model" / "model.safetensors.index.json"
    for weight_map, said in {"x": "does not say which file", ("x",): "names a file that is not there: gone"}.items():
        value = {"a": "gone.safetensors"} if weight_map == ("x",) else weight_map
        index.write_text(json.dumps({"weight_map": value}))
        assert f"model.safetensors.index.json {'is damaged: its weight_map ' * (weight_map == 'x')}{said}" in refusal(
            lambda: LOADS["model"][1](folder)
        )


@pytest.mark.parametrize(
    ("file", "changes"),
    [("config.json", {"image_seq_length": 3}), ("tokenizer_config.json", {"model_max_length": [1]})],
)
def test_a_model_that_loads_and_cannot_answer_is_named(file: str, changes: dict[str, Any], folder: Path) -> None:
    edit(folder / "model" / file, **changes)
    model, processor = generation.load(str(folder / "model"), device="cpu")
    said = refusal(lambda: generation.generate(model, processor, [REQUEST], max_new_tokens=1))
    assert f"the model {folder / 'model'} loads, but fails on a blank image too" in said


def test_an_error_of_one_question_keeps_its_traceback(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model answers another one, so that it is not at fault."""
    model, processor = generation.load(str(sound / "model"), device="cpu")
    answer, calls = generation._answers, []

    def fails_once(*args: Any) -> list[str]:
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("of this question")
        return answer(*args)

    monkeypatch.setattr(generation, "_answers", fails_once)
    with pytest.raises(RuntimeError, match="of this question"):
        generation.generate(model, processor, [REQUEST], max_new_tokens=1)
    assert len(calls) == 2


def test_a_bug_of_ours_keeps_its_traceback(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = eval("lambda self, *args, **kwargs: {}['x']", {"__name__": "vlm.processing"})
    monkeypatch.setattr(VLMProcessor, "__init__", inner)
    with pytest.raises(KeyError, match="x"):
        generation.load(str(sound / "model"), device="cpu")


def test_memory_that_runs_out_is_no_damage(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(AutoConfig, "from_pretrained", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        generation.load_config(str(sound / "model"))


def test_a_sound_folder_has_no_damage(sound: Path) -> None:
    assert all(loading.damage(folder, whole=True) is None for folder in sound.iterdir())


def test_files_that_transformers_does_not_read_are_no_damage(folder: Path) -> None:
    """As in repositories of sentence-transformers, and in downloads of some files only."""
    (folder / "language" / "modules.json").write_text('[{"idx": 0}]')
    (folder / "language" / "notes.json").write_text("{,")
    shards = {"metadata": {}, "weight_map": {"weight": "consolidated-1.safetensors"}}
    (folder / "language" / "consolidated.safetensors.index.json").write_text(json.dumps(shards))
    build(str(folder / "vision"), str(folder / "language"))


def test_a_folder_that_is_no_checkpoint_is_named_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    (tmp_path / "config.json").write_text("{}")
    found = refusal(lambda: generation.load(str(tmp_path)))
    assert found.endswith("its config.json does not say of which type it is (model_type), or is not there")
