"""Chat templates with an error: every command that renders one names it, with the line."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from tests.stock import stock
from tests.tiny import tiny
from tests.training.helpers import recipe_values, save_images, save_parts
from vlm.cli import app

BROKEN = {
    "syntax": ("{# one #}\n{% for %}", "line 2: TemplateSyntaxError"),
    "undefined": ("\n\n{{ messages[0].missing.name }}", "line 3: UndefinedError"),
    "python": ("\n{{ 'a' + 1 }}", "line 2: TypeError"),
    "raised": ("{% if messages %}\n{{ raise_exception('only for tools') }}{% endif %}", "line 2, refuses the conv"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("broken")
    for name, (model, processor) in {"ours": tiny(), "llava": stock("llava")}.items():
        model.save_pretrained(made / name)
        processor.save_pretrained(made / name)
    save_parts(made / "parts")
    save_images(made / "images")
    return made


def invoke(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    return result.output


def commands(folder, model, output):
    photo, data = folder / "images/0.png", f"format=image_folder path={folder / 'images'} metadata=train.jsonl"
    values = recipe_values(folder / "parts", folder / "images", output / "run")
    values["model"] = {"pretrained": str(model)}
    (output / "mine.yaml").write_text(yaml.safe_dump(values))
    return {
        "chat": ("chat", model, "what is it?", "--image", photo),
        "predict": ("predict", model, photo, "--prompt", "what is it?", "--output", output / "rows.jsonl"),
        "eval": ("eval", model, "--data", data, "--metrics", "exact_match", "--output", output / "scores"),
        "classify": ("classify", model, photo, "--labels", "cat,dog"),
        "train": ("train", output / "mine.yaml"),
        "check": ("data", "check", *data.split(), "--model", model),
    }


COMMANDS = ["chat", "predict", "eval", "classify", "train", "check"]
CASES = [(model, kind, name) for name in COMMANDS for kind in BROKEN for model in ("ours", "llava")]
CASES = [case for case in CASES if case[1:] != ("raised", "check")]  # there it is rows that are bad


@pytest.mark.few(2)
@pytest.mark.parametrize(("model", "kind", "name"), CASES)
def test_a_broken_template_is_named(folder, model, kind, name, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    template, told = BROKEN[kind]
    (folder / model / "chat_template.jinja").write_text(template)
    said = invoke(*commands(folder, folder / model, tmp_path)[name])
    assert f"the chat template of {folder / model}, {told}" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in BROKEN if kind != "raised"])
def test_the_template_of_a_language_model(folder, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    template, told = BROKEN[kind]
    (folder / "parts/language/chat_template.jinja").write_text(template)
    values = recipe_values(folder / "parts", folder / "images", tmp_path / "run")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    assert f"the chat template of {folder / 'parts/language'}, {told}" in invoke("train", tmp_path / "mine.yaml")


def test_refused_rows_are_bad_rows(folder, tmp_path):
    texts = ("a cat", "a tool", "a dog")
    rows = [json.dumps({"file_name": f"{n}.png", "caption": text}) for n, text in enumerate(texts)]
    (folder / "images/mixed.jsonl").write_text("\n".join(rows))
    template = (
        "{% for m in messages %}{% for part in m.content %}{% if part.text == 'a tool' %}"
        "{{ raise_exception('no tools') }}{% endif %}{{ part.text or '<image>' }}{% endfor %}{% endfor %}"
    )
    (folder / "ours/chat_template.jinja").write_text(template)
    words = ("data", "check", "format=image_folder", f"path={folder / 'images'}", "metadata=mixed.jsonl")
    result = CliRunner().invoke(app, [*words, "--model", str(folder / "ours")])
    assert result.exit_code == 1, result.output
    assert "mixed.jsonl:2: the chat template" in result.output
    assert "mixed.jsonl:1: the chat template" not in result.output
    assert "refuses the conversation: no tools" in " ".join(result.output.split())
