"""The folder of a run: which ones are refused before anything is loaded, and what is replaced."""

from pathlib import Path

import pytest
import yaml

from tests.training.helpers import train
from vlm import recipe
from vlm.errors import UserError
from vlm.recipe_source import write_yaml
from vlm.training.claim import require_free, require_place


def _nothing_is_loaded(monkeypatch):
    monkeypatch.setattr("vlm.training.run.read", lambda *args, **kwargs: pytest.fail("the data were read"))
    monkeypatch.setattr("vlm.training.run.build", lambda *args, **kwargs: pytest.fail("a model was loaded"))


def _notes(folder):
    (folder / "model").mkdir(parents=True)
    (folder / "model/notes.txt").write_text("mine")


PLACES = {
    "a file": (lambda run: run.write_text(""), "is a file; choose another"),
    "a folder with a model": (_notes, r"is no run, and it holds model, which a run would replace\. Choose another"),
}


@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
@pytest.mark.parametrize("name", PLACES)
def test_a_folder_that_is_no_run_is_refused_before_anything_is_loaded(values, monkeypatch, name, options):
    make, why = PLACES[name]
    folder = Path(values["output_dir"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    make(folder)
    _nothing_is_loaded(monkeypatch)
    with pytest.raises(UserError, match=why):
        train(values, **options)
    assert name == "a file" or (folder / "model/notes.txt").read_text() == "mine"


def _recipe_of_mine(folder, values):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("# mine\n" + yaml.safe_dump(values))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("resolved", [False, True])
def test_a_recipe_of_the_user_in_the_folder_is_no_run(values, monkeypatch, options, resolved):
    folder = Path(values["output_dir"])
    mine = _recipe_of_mine(folder, recipe.from_dict(values).resolved() if resolved else values)
    (folder / "model").mkdir()
    before = mine.read_text()
    _nothing_is_loaded(monkeypatch)
    with pytest.raises(UserError, match=r"is no run, and it holds recipe\.yaml, model"):
        train(values, **options)
    with pytest.raises(UserError, match=r"the recipe .*recipe\.yaml is in output_dir .* would replace it"):
        train(values, recipe_file=mine, **options)
    assert mine.read_text() == before


def test_the_recipe_of_a_run_is_replaced_only_by_itself(values, monkeypatch):
    folder = Path(values["output_dir"])
    loaded = recipe.from_dict(values)
    folder.mkdir(parents=True)
    file = folder / "recipe.yaml"
    file.write_text(write_yaml(loaded.resolved()))
    for text in (None, '{"packages": {}}'):  # killed as it began, and later
        if text:
            (folder / "environment.json").write_text(text)
        with pytest.raises(UserError, match="holds a stopped run"):
            require_free(folder, loaded, recipe_file=file, resume=False, overwrite=False)
        for options in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            require_free(folder, loaded, recipe_file=file, **options)
    other = recipe.from_dict(values, ["seed=5"])
    require_free(folder, other, recipe_file=file, resume=True, overwrite=False)
    with pytest.raises(UserError, match="would replace it"):
        require_free(folder, other, recipe_file=file, resume=False, overwrite=True)
    inside = folder / "samples" / "mine.yaml"
    inside.parent.mkdir()
    inside.write_text("")
    with pytest.raises(UserError, match="would replace it"):
        require_free(folder, loaded, recipe_file=inside, resume=False, overwrite=True)


@pytest.mark.parametrize(
    ("name", "why"), [("x" * 256, "File name too long"), ("a/" * 2048 + "a", "File name too long"), ("a\0b", "null")]
)
def test_a_folder_with_a_name_that_no_folder_can_have_is_refused(values, monkeypatch, tmp_path, name, why):
    _nothing_is_loaded(monkeypatch)
    for options in ({}, {"dry_run": True}):
        with pytest.raises(UserError, match=f"output_dir.*{why}"):
            train(values | {"output_dir": str(tmp_path / name)}, **options)


@pytest.mark.parametrize("key", ["data.train.path", "model.vision"])
def test_a_run_does_not_write_into_what_it_reads(values, monkeypatch, key):
    section, *rest = key.split(".")
    place = values[section]
    for name in rest:
        place = place[name]
    _nothing_is_loaded(monkeypatch)
    with pytest.raises(UserError, match=rf"output_dir: .* is the folder that {key} reads"):
        train(values | {"output_dir": str(place)})


def test_a_run_may_be_next_to_the_files_that_its_data_names(values, tmp_path):
    """A folder of which all files are read is another matter: those of the run would be among them."""
    folder = tmp_path / "project" / "runs" / "x"
    (tmp_path / "project").mkdir()
    rows = {"format": "llava", "path": "train.json", "images": "."}
    whole = {"format": "dataset", "path": str(tmp_path / "project"), "columns": {"caption": "text"}}
    values["data"] |= {"base_dir": str(tmp_path / "project"), "train": rows}
    require_place(folder, recipe.from_dict(values))
    values["data"] |= {"train": whole}
    with pytest.raises(UserError, match=r"all of which data\.train\.path reads"):
        require_place(folder, recipe.from_dict(values))


def test_a_folder_that_another_process_trains_in_is_refused(values, monkeypatch):
    from vlm.locks import locked_folder

    _nothing_is_loaded(monkeypatch)
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with locked_folder(Path(values["output_dir"])), pytest.raises(UserError, match="is in use by process"):
            train(values, **options)
    assert not Path(values["output_dir"]).exists()
