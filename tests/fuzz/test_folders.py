"""Saved models with a damaged file: each loads and answers, or is refused with a message that names its folder."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.dual_encoders import save_clip, save_dual
from tests.fuzz.cases import changed, changed_bytes, parts, run, told
from tests.stock import stock
from tests.tiny import image, tiny
from vlm import generation
from vlm.embedding import load_embedder
from vlm.errors import UserError

REQUEST = ([image(0)], [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}])
JSON_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)


def answer(folder: Path) -> None:
    model, processor = generation.load(str(folder), device="cpu")
    generation.generate(model, processor, [REQUEST], max_new_tokens=2)


def embed(folder: Path) -> None:
    embedder = load_embedder(str(folder), device="cpu")
    list(embedder.embed_images({"x": REQUEST[0][0]}, broken={}))
    embedder.embed_texts(["a cat"])


def damaged(sound: Path, folder: Path, draw: random.Random) -> str:
    """Make `folder` a copy of the model in `sound` with one file changed; gives what was changed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder, copy_function=os.link)
    files = sorted(path.name for path in folder.iterdir())
    name = draw.choice([file for file in files if file in JSON_FILES] * 2 + files)
    path = folder / name
    content = path.read_bytes()
    path.unlink()  # it is a link to the sound one
    kind = draw.randrange(8)
    if kind == 0:
        return f"{name} removed"
    if kind == 1 or path.suffix != ".json":
        path.write_bytes(changed_bytes(content, draw))
        return f"{name}: other bytes"
    if kind == 2:
        text = draw.choice(("", "[]", "null", "7", '"x"', "{}", "[" * 100_000, "[{}]", "{" * 5, "NaN"))
        path.write_text(text)
        return f"{name}: {text[:20]}"
    values, change = changed(json.loads(content), draw)
    path.write_text(json.dumps(values))
    return f"{name}: {change}"


def check(sound: Path, folder: Path, use: Callable[[Path], None]) -> Callable[[random.Random], bool]:
    def case(draw: random.Random) -> bool:
        change, said = damaged(sound, folder, draw), None
        with told(change):
            try:
                use(folder)
            except UserError as error:
                said = str(error)
            assert said is None or str(folder) in said
        return said is None

    return case


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    for name, (model, processor) in {
        "ours": tiny(),
        "looks": tiny("gpt2", "prefix+cross_attention", {"type": "resampler", "num_image_tokens": 4, "num_heads": 2}),
        "llava": stock("llava"),
    }.items():
        model.save_pretrained(made / name)
        processor.save_pretrained(made / name)
    save_clip(made / "clip")
    save_dual(made / "dual")
    return {path.name: path for path in made.iterdir()}


USES: dict[str, Any] = {"ours": answer, "looks": answer, "llava": answer, "clip": embed, "dual": embed}


@pytest.mark.parametrize("name", USES)
@parts(fast=1, slow=400)
def test_a_damaged_file(numbers: range, name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    case = check(folders[name], tmp_path / "damaged model", USES[name])
    USES[name](folders[name])
    answered = run(f"folder {name}", numbers, case)
    assert any(answered) or len(answered) < 10
