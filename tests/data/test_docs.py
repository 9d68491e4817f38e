"""docs/data.md is read by the readers: each shown format, with the files shown for it."""

import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vlm.data.images import open_image
from vlm.data.readers import READERS, read
from vlm.recipe import Data

DOC = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0].strip(): part for part in re.split(r"^## ", DOC, flags=re.MULTILINE)[1:]}
YAML_BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", DOC, flags=re.DOTALL)]


def test_each_format_has_a_section():
    assert set(READERS) <= set(SECTIONS)


@pytest.mark.parametrize("name", READERS)
def test_shown_files_are_read_as_the_text_says(name, tmp_path):
    section = SECTIONS[name]
    for file, text in re.findall(r"^`([^`\n]+)`:\n\n```jsonl?\n(.*?)```", section, flags=re.DOTALL | re.MULTILINE):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text, encoding="utf-8")
    [images] = re.findall(r"^With the images (.*)\.$", section, flags=re.MULTILINE)
    for number, image in enumerate(re.findall(r"`([^`]+)`", images)):
        (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 40, 0, 0)).save(tmp_path / image)
    source = yaml.safe_load(re.search(r"```yaml\n(.*?)```", section, flags=re.DOTALL)[1])["train"]
    assert source["format"] == name

    examples, problems = read(source, base_dir=tmp_path)

    assert problems == []
    [(said_examples, said_branches)] = re.findall(r"This is read as (\d+) examples? with (\d+) branch", section)
    assert len(examples) == int(said_examples)
    assert sum(len(example.branches) for example in examples) == int(said_branches)
    for example in examples:
        assert all(open_image(image).size == (8, 8) for image in example.images)


def test_shown_rows_of_several_images_are_read(tmp_path):
    [rows] = re.findall(
        r"```jsonl\n(.*?)```", SECTIONS["Several images, few-shot prompts, text alone"], flags=re.DOTALL
    )
    (tmp_path / "metadata.jsonl").write_text(rows, encoding="utf-8")
    for name in ("cat.jpg", "dog.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    examples, problems = read({"format": "image_folder", "path": str(tmp_path)}, base_dir=tmp_path)
    assert problems == []
    assert [len(example.images) for example in examples] == [2, 2, 0]
    first, second = (example.branches[0].messages for example in examples[:2])
    assert [part["type"] for part in first[0]["content"]] == ["text", "image", "text", "image"]
    assert [message["role"] for message in second] == ["user", "assistant"] * 2


def test_each_option_of_each_format_is_named():
    for name, source in READERS.items():
        for option in source.model_fields:
            assert f"`{option}`" in SECTIONS[name] or f"  {option}:" in SECTIONS[name], (name, option)


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=range(len(YAML_BLOCKS)))
def test_each_shown_source_is_valid(block):
    Data(train=block.get("data", block)["train"])
