"""The README and the guides say what is so: their commands, links, recipes, tables and code are checked against ours.

docs/data.md has more tests of its own in tests/data/test_docs.py.
"""

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image, ImageChops, ImageStat

from vlm import recipe, recipe_data, recipe_evaluation, recipe_model
from vlm.cli import app
from vlm.data import augmentation
from vlm.recipe_source import read_yaml

ROOT = Path(__file__).parents[1]
GUIDES = {path.relative_to(ROOT).as_posix(): path for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in GUIDES.items()}


SECTIONS = (
    recipe_model.Model, recipe_model.Adapter, recipe_model.Quantization, recipe_data.Data,
    recipe.Lora, recipe.Evaluation, recipe_evaluation.Classification,
    augmentation.Augmentation, augmentation.RandomResizedCrop, augmentation.ColorJitter,
)  # fmt: skip


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def command_lines(text: str) -> list[list[str]]:
    """The words of each line in the bash blocks, comments off, with pipes and redirections ending a command."""
    lines = []
    for line in "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "|" in words:
            at = words.index("|")
            lines.append(words[:at])
            words = words[at + 1 :]
        lines.append(words[: words.index(">")] if ">" in words else words)
    return [words for words in lines if words]


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `words` after `vlm` name, and its own words. Fails for a name that no command has."""
    command: Any = typer.main.get_command(app)
    words = list(words)
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        assert words[0] in command.commands, f"there is no command {words[0]!r}; there are {sorted(command.commands)}"
        command = command.commands[words.pop(0)]
    return command, words


SHOWN = [(name, words) for name, text in TEXTS.items() for words in command_lines(text)]
SHOWN_VLM = [(name, words[1:]) for name, words in SHOWN if words[0] == "vlm"]
SHOWN_VLM += [(name, words[words.index("vlm") + 1 :]) for name, words in SHOWN if "-m vlm" in " ".join(words)]
INLINE = [
    (name, found.split())
    for name, text in TEXTS.items()
    for found in re.findall(r"`vlm ([^`]+)`", " ".join(prose(text).split()))
]


def case(value: tuple[str, list[str]]) -> str:
    return f"{value[0]}: vlm {' '.join(value[1])}"


def the_recipe() -> dict[str, Any]:
    """The recipe at the head of docs/training.md, of which the other snippets change a section."""
    return read_yaml(blocks(TEXTS["docs/training.md"], "yaml")[0], "docs/training.md")[0]


def test_there_is_something_to_check() -> None:
    assert len(SHOWN_VLM) > 20
    assert len(INLINE) > 5
    assert {words[0] for _, words in SHOWN_VLM} == set(find_command([])[0].commands) - {"quickstart"}


@pytest.mark.parametrize("shown", SHOWN_VLM, ids=case)
def test_a_shown_command_is_understood(shown: tuple[str, list[str]]) -> None:
    command, words = find_command(shown[1])
    context = command.make_context("vlm", list(words))  # raises for options and arguments that it does not know
    values = context.params
    if command.name == "train":
        if values["recipe"] in recipe.packaged():
            recipe.load(values["recipe"], values["overrides"] or [])
        else:
            recipe.from_dict(the_recipe(), values["overrides"] or [])
    if command.name == "show":
        assert recipe.packaged_text(values["name"])
    if command.name == "check" and "=" in values["source"][0]:
        recipe.parse_data(values["source"])
    if command.name == "eval":
        data = shlex.split(values["data"])
        if "=" in data[0]:
            recipe.parse_data(data)
        else:
            assert data[0] in recipe.packaged() or data[0].endswith(".yaml")
        if values["metrics"]:
            from vlm.eval import METRICS

            assert set(values["metrics"].split(",")) <= set(METRICS)


@pytest.mark.parametrize("shown", INLINE, ids=case)
def test_a_command_in_a_sentence_exists(shown: tuple[str, list[str]]) -> None:
    command, words = find_command(shown[1])
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= options


def test_shown_make_targets_exist() -> None:
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", rules, flags=re.MULTILINE))
    shown = {words[1] for _, words in SHOWN if words[0] == "make"}
    shown |= set(re.findall(r"`make ([\w-]+)`", " ".join(TEXTS.values())))
    assert {"quickstart", "test"} <= shown <= targets


def test_the_readme_sets_up_with_two_commands() -> None:
    setup = TEXTS["README.md"].split("## Set up\n")[1].split("\n## ")[0]
    assert command_lines(setup) == [["make", "quickstart"], ["make", "test"]]
    assert "make test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The anchors of a text's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name: str) -> None:
    missing = set()
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[name])):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        file = (GUIDES[name].parent / path).resolve() if path else GUIDES[name]
        place = file.relative_to(ROOT).as_posix()
        if not file.exists():
            missing.add(place)
        elif anchor:
            assert anchor in anchors(TEXTS[place]), f"{target}: no such heading"
    assert not missing


SNIPPETS = [
    pytest.param(name, text, id=f"{name}-{number}")
    for name in ("README.md", "docs/training.md")
    for number, text in enumerate(blocks(TEXTS[name], "yaml"))
]


@pytest.mark.parametrize(("name", "snippet"), SNIPPETS)
def test_a_shown_recipe_is_valid(name: str, snippet: str) -> None:
    changed, places = read_yaml(snippet, name)
    whole = changed if {"model", "data"} <= changed.keys() else the_recipe() | changed
    if "stages" in changed:
        whole = {key: value for key, value in whole.items() if key not in recipe.Recipe.shorthand}
    recipe.from_dict(whole, places=places, file=name)


@pytest.mark.parametrize("snippet", blocks(TEXTS["docs/bridges.md"], "yaml"))
def test_a_shown_bridge_is_valid(snippet: str) -> None:
    changed, _ = read_yaml(snippet, "docs/bridges.md")
    whole = the_recipe()
    bridge = recipe.from_dict(whole | {"model": whole["model"] | changed}).model.adapter
    assert bridge.fusion in ("prefix", "cross_attention", "prefix+cross_attention")


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_a_recipe_is_explained(section: Any) -> None:
    text = TEXTS["docs/training.md"]
    missing = [key for key in section.model_fields if f"`{key}`" not in text and f" {key}:" not in text]
    assert not missing


def first_column(text: str, header: str) -> set[str]:
    """The names in the first column of the table whose first header cell is `header`."""
    [table] = re.findall(rf"^\| {header} \|.*\n\| ---.*\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    return {re.sub(r"\W", "", row.split("|")[1]) for row in table.splitlines()}


def test_tables_list_all_there_is_and_nothing_else() -> None:
    from vlm.adapters import PROJECTORS
    from vlm.data.readers import READERS
    from vlm.eval import METRICS
    from vlm.presets import PRESETS
    from vlm.recipe import PARTS

    assert first_column(TEXTS["README.md"], "projector") == set(PROJECTORS)
    assert first_column(TEXTS["README.md"], "format") == set(READERS)
    assert first_column(TEXTS["docs/training.md"], "projector") == set(PROJECTORS)
    assert first_column(TEXTS["docs/training.md"], "part") == set(PARTS)
    assert first_column(TEXTS["docs/bridges.md"], "preset") == set(PRESETS)
    assert first_column(TEXTS["docs/using.md"], "metric") == set(METRICS)


def test_the_guide_to_bridges_has_them_all_and_their_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    from vlm.adapters import PROJECTORS
    from vlm.configuration import FUSIONS

    text = TEXTS["docs/bridges.md"]
    assert set(re.findall(r"^### (.*)$", text, flags=re.MULTILINE)) == {*PROJECTORS, *FUSIONS}
    exec(compile(blocks(text, "python")[0], "docs/bridges.md", "exec"), {})
    assert blocks(text, "text") == [capsys.readouterr().out]


def test_the_guide_to_tiling_has_its_keys_and_counts_right(capsys: pytest.CaptureFixture[str]) -> None:
    text = TEXTS["docs/tiling.md"]
    assert first_column(text, "key") == set(recipe_model.Tiling.model_fields)
    changed, _ = read_yaml(blocks(text, "yaml")[0], "docs/tiling.md")
    assert recipe.from_dict(the_recipe() | changed).model.tiling == recipe_model.Tiling()
    exec(compile(blocks(text, "python")[0], "docs/tiling.md", "exec"), {})
    assert blocks(text, "text") == [capsys.readouterr().out]


def test_the_picture_of_tiling_is_as_drawn() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "images" / "tiling.py"))["draw"]()
    with Image.open(ROOT / "docs" / "images" / "tiling.png") as kept:
        apart = ImageChops.difference(kept.convert("RGB"), drawn)
    assert ImageStat.Stat(apart).mean < [2, 2, 2], "but for the number of colours, and how letters are drawn"


def test_the_projector_to_add_works() -> None:
    import torch

    names: dict[str, Any] = {}
    exec(compile(blocks(TEXTS["docs/bridges.md"], "python")[1], "docs/bridges.md", "exec"), names)
    projector = names["LDPv2Projector"](12, 20, num_image_tokens=4)
    features = torch.randn(9, 24, 12)
    projector.initialize(features, (4, 6), 0.5)
    tokens = projector(features, (4, 6))
    assert tokens.shape == (9, projector.num_tokens(0, (4, 6)), 20)
    assert projector.token_grid((4, 6)) == (2, 2)
    assert tokens.square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-3)


def test_pictures_of_bridges_are_as_drawn() -> None:
    pictures = runpy.run_path(str(ROOT / "docs" / "images" / "bridges.py"))["PICTURES"]
    for name, draw in pictures.items():
        assert (ROOT / "docs" / "images" / f"bridge_{name}.svg").read_text(encoding="utf-8") == draw().svg(), name
        assert f"images/bridge_{name}.svg" in TEXTS["docs/bridges.md"]


def test_code_to_load_a_pushed_model_is_that_of_the_model_card(tmp_path: Path) -> None:
    """tests/vlm/test_hub.py runs the card's code."""
    from vlm.model_card import model_card

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "vlm"}))
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    assert blocks(TEXTS["README.md"], "python") == blocks(model_card(tmp_path, "me/my-vlm").text, "python")


@pytest.mark.parametrize("name", GUIDES)
def test_shown_python_compiles(name: str) -> None:
    for code in blocks(TEXTS[name], "python"):
        compile(code, name, "exec")


def test_the_map_of_the_files_is_whole() -> None:
    text = TEXTS["CONTRIBUTING.md"]
    named = {path for path in re.findall(r"`([\w./]+)`", text) if "/" in path}
    gone = [path for path in named if not (ROOT / path).exists()]
    assert not gone
    modules = [
        path.relative_to(ROOT).as_posix()
        for folder in ("adapters", "eval", "vlm", "vlm/data", "vlm/training")
        for path in (ROOT / folder).glob("*.py")
        if path.name != "__init__.py" and not path.name.startswith("readers_")
    ]
    missing = sorted(set(modules) - named)
    assert not missing, f"CONTRIBUTING.md does not say what is in {missing}"
