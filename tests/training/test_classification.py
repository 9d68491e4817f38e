"""Labelled images as tasks of a recipe: accuracy against CLIPModel and scikit-learn, in a run and in `vlm eval`."""

import json
import threading
from functools import partial
from io import StringIO

import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.metrics import top_k_accuracy_score
from transformers import CLIPModel, CLIPProcessor

from tests.dual_encoders import save_clip
from tests.tiny import image
from tests.training.helpers import recipe_values, train
from vlm import classify, evaluate, recipe
from vlm.embedding import load_embedder
from vlm.errors import UserError
from vlm.eval.runner import Processes
from vlm.model_card import model_card
from vlm.recipe_evaluation import Classification
from vlm.recognition.labels import TEMPLATES
from vlm.recognition.likelihood import label_likelihood
from vlm.recognition.tasks import measure
from vlm.recognition.zero_shot import zero_shot

LABELS = ["cat", "dog", "e", "bird", "house", "tree", "sun"]


@pytest.fixture
def photos(tmp_path):
    """Seven labels, three images each, one of which does not open."""
    for number, label in enumerate(LABELS):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for n in range(3):
            image(10 * number + n).save(tmp_path / "photos" / label / f"{n}.png")
    (tmp_path / "photos" / "sun" / "2.png").write_bytes(b"not an image")
    return tmp_path / "photos"


@pytest.fixture
def clip(tmp_path):
    torch.manual_seed(0)
    save_clip(tmp_path / "clip")
    return tmp_path / "clip"


def quiet():
    return Console(file=StringIO(), width=200)


def test_accuracy_is_that_of_clip_and_scikit_learn(clip, photos):
    task = Classification(data=str(photos), templates=["art of the {}."])
    console = quiet()
    rows = measure({"things": task}, partial(zero_shot, load_embedder(str(clip))), console=console)
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    paths = [path for path in sorted(photos.glob("*/*.png")) if path.parent.name != "sun" or path.stem != "2"]
    names = sorted(LABELS)
    inputs = processor(
        text=[f"art of the {name}." for name in names],
        images=[Image.open(path) for path in paths],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.numpy()
    targets = [names.index(path.parent.name) for path in paths]
    for k in (1, 5):
        row = rows[f"things_top_{k}"]
        assert row["score"] == pytest.approx(top_k_accuracy_score(targets, logits, k=k, labels=range(7)))
        assert row["interval"][0] <= row["score"] <= row["interval"][1]
        assert row["blind_score"] == pytest.approx(k / 7)
        assert (row["n_images"], row["n_broken"], row["data"]) == (20, 1, "photos")
    assert "left out:" in console.file.getvalue()
    assert "2.png" in console.file.getvalue()


def test_several_processes_share_the_images(clip, photos):
    tasks = {"things": Classification(data=str(photos))}
    embedder = load_embedder(str(clip))
    seen = []

    class Counted:
        def __init__(self, labels, task):
            self.inner = zero_shot(embedder, labels, task)

        def scores(self, images):
            seen.append(len(images))
            return self.inner.scores(images)

    alone = measure(tasks, Counted, console=quiet())
    assert sum(seen) == 20
    seen.clear()
    barrier, given, found = threading.Barrier(2), {}, {}

    def gather(rank, values):
        given[rank] = values
        barrier.wait()
        together = given[0] + given[1]
        barrier.wait()
        return together

    def run(rank):
        found[rank] = measure(tasks, Counted, console=quiet(), processes=Processes(rank, 2, partial(gather, rank)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found[0] == found[1]
    assert {name: row["score"] for name, row in found[0].items()} == {n: row["score"] for n, row in alone.items()}
    assert sum(seen) == 20, "no image twice"


def said_by_classify(run, photos, **options):
    console = quiet()
    classify.run(str(run), [], data=str(photos), console=console, **options)
    return [line for line in console.file.getvalue().splitlines() if line.startswith("top-")]


def said_of_task(text):
    return [line.removeprefix("things: ") for line in text.splitlines() if line.startswith("things: ")]


def test_a_dual_encoders_run_measures_them_and_so_does_vlm_eval(pair_values, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    pair_values["evaluation"] = {"classification": {"things": {"data": str(photos), "templates": "imagenet"}}}
    said = train(pair_values)
    assert said_of_task(said) == said_by_classify(tmp_path / "run", photos, templates="imagenet")
    summary = json.loads((tmp_path / "run" / "evaluation" / "summary.json").read_text())
    assert list(summary["metrics"])[-2:] == ["things_top_1", "things_top_5"]
    assert summary["metrics"]["things_top_1"]["n_broken"] == 1
    console = quiet()
    again = evaluate.run(
        str(tmp_path / "run"), str(tmp_path / "run" / "recipe.yaml"),
        metrics=None, output=tmp_path / "again", limit=None, console=console,
    )  # fmt: skip
    assert said_of_task(console.file.getvalue()) == said_of_task(said)
    assert again["metrics"]["things_top_5"] == summary["metrics"]["things_top_5"]
    card = str(model_card(tmp_path / "run", "you/mine"))
    assert "`things_top_1` of photos" in card
    assert "| things_top_1 |" in card


def test_a_run_of_a_model_that_writes_measures_them_too(parts, images, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    values = recipe_values(parts, images, tmp_path / "run")
    task = {"data": str(photos), "templates": ["A {}."], "prompt": "What is it?"}
    values["evaluation"]["classification"] = {"things": task}
    said = train(values)
    options = {"template": ["A {}."], "prompt": "What is it?"}
    assert said_of_task(said) == said_by_classify(tmp_path / "run", photos, **options)
    summary = json.loads((tmp_path / "run" / "evaluation" / "summary.json").read_text())
    assert {*values["evaluation"]["metrics"], "things_top_1", "things_top_5"} == {*summary["metrics"]}


def test_what_is_wrong_with_a_task_is_said_before_anything_is_trained(pair_values, tmp_path):
    (tmp_path / "empty").mkdir()
    pair_values["evaluation"] = {"classification": {"things": {"data": str(tmp_path / "empty")}}}
    with pytest.raises(UserError, match=r"evaluation\.classification\.things: .*empty.*no label"):
        train(pair_values)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("dual", "task", "message"),
    [
        (True, {"prompt": "What?"}, "prompt: is what a model that writes is asked"),
        (True, {"templates": ["a photo"]}, "template 'a photo' has no {}"),
        (True, {"templates": "imagnet"}, "did you mean 'imagenet'"),
        (False, {"templates": ["A {}.", "The {}."]}, "templates: a model that writes takes one"),
        (False, {"metrics": False}, "is measured beside `metrics`"),
    ],
)
def test_contradictions_are_found_in_the_recipe(pair_values, parts, images, photos, tmp_path, dual, task, message):
    values = pair_values if dual else recipe_values(parts, images, tmp_path / "run")
    if not task.pop("metrics", True):
        values["evaluation"] = {}
    values.setdefault("evaluation", {})["classification"] = {"things": {"data": str(photos), **task}}
    with pytest.raises(UserError) as caught:
        train(values)
    assert message in str(caught.value)


def test_paths_are_those_beside_the_recipe(pair_values, photos, tmp_path):
    pair_values["evaluation"] = {"classification": {"things": {"data": "photos"}}}
    (tmp_path / "mine.txt").write_text("my {}\nour {}\n")
    loaded = recipe.from_dict(pair_values, ["evaluation.classification.things.templates=mine.txt"], base_dir=tmp_path)
    assert loaded.evaluation.classification["things"].data == str(photos)
    assert loaded.evaluation.classification["things"].templates == ["my {}", "our {}"]


def test_a_folder_does_not_stand_in_for_templates_of_its_name(pair_values, photos, tmp_path):
    (tmp_path / "imagenet").mkdir()
    pair_values["evaluation"] = {"classification": {"things": {"data": "photos", "templates": "imagenet"}}}
    loaded = recipe.from_dict(pair_values, base_dir=tmp_path)
    assert loaded.evaluation.classification["things"].templates == [*TEMPLATES["imagenet"]]


def test_a_model_that_writes_takes_one_template(tmp_path):
    task = Classification(data=str(tmp_path), templates=["A {}.", "The {}."])
    with pytest.raises(UserError, match="takes one of `templates`"):
        label_likelihood(None, None, 1, LABELS, task)


def test_a_dual_encoder_is_asked_nothing(clip):
    with pytest.raises(UserError, match="remove `prompt`"):
        zero_shot(load_embedder(str(clip)), LABELS, Classification(data="", prompt="What?"))
