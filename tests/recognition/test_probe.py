"""`vlm probe` against scikit-learn on the vectors of CLIPModel itself."""

import json
from io import StringIO

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from transformers import CLIPModel, CLIPProcessor, TimmWrapperConfig, TimmWrapperModel

from tests.dual_encoders import save_clip
from tests.tiny import image, image_processor
from vlm import probe
from vlm.errors import UserError
from vlm.recognition import linear_probe

LABELS = {"blue": (0, 0, 255), "green": (0, 255, 0), "grey": (128, 128, 128), "red": (255, 0, 0)}
LABELS |= {"white": (255, 255, 255), "yellow": (255, 255, 0)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders") / "clip"
    save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory):
    """A ResNet out of timm, whose checkpoint has its own word on images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders") / "resnet [a]"
    TimmWrapperModel(
        TimmWrapperConfig(architecture="resnet18", model_args={"channels": [8, 8, 16, 24]})
    ).save_pretrained(folder)
    image_processor(64).save_pretrained(folder)
    return folder


def write(folder, number, count):
    """Images of noise with a tint of their label, different ones for each `number`."""
    for place, (label, colour) in enumerate(LABELS.items()):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            noise = image(1000 * number + 100 * place + n)
            Image.blend(noise, Image.new("RGB", noise.size, colour), 0.25).save(folder / label / f"{number}-{n}.png")


@pytest.fixture
def data(tmp_path):
    write(tmp_path / "data", 1, 10)
    return tmp_path / "data"


def run(encoders, **options):
    console = Console(file=StringIO(), width=140)
    probe.run([str(each) for each in encoders], console=console, **{"k": [1, 5]} | options)
    return console.file.getvalue()


@torch.no_grad()
def vectors(clip, paths):
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    inputs = processor(images=[Image.open(path) for path in paths], return_tensors="pt")
    features = model.get_image_features(**inputs).pooler_output.double()
    return (features / features.norm(dim=-1, keepdim=True)).numpy()


def test_a_given_split_is_scored_as_scikit_learn_scores_it(clip, data, tmp_path):
    write(tmp_path / "test", 2, 4)
    (tmp_path / "test" / "red" / "2-3.png").write_bytes(b"not an image")
    said = run([clip], data=str(data), test=str(tmp_path / "test"), output=tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert "2-3.png: not an image" in said
    assert "60 images to learn from, 23 to test on, 6 labels" in said

    names = list(LABELS)
    train = sorted(data.glob("*/*.png"))
    broken = tmp_path / "test" / "red" / "2-3.png"
    test = [path for path in sorted((tmp_path / "test").glob("*/*.png")) if path != broken]
    assert [row["image"] for row in report["test_images"]] == [str(path) for path in test]
    assert [row["label"] for row in report["test_images"]] == [path.parent.name for path in test]
    targets, answers = ([names.index(path.parent.name) for path in paths] for paths in (train, test))
    seen, unseen = vectors(clip, train), vectors(clip, test)

    linear, nearest, five = report["results"]
    theirs = LogisticRegression(C=linear["C"], tol=1e-8, max_iter=10_000).fit(seen, targets)
    assert linear["predicted"] == [names[place] for place in theirs.predict(unseen)]
    scores = theirs.predict_proba(unseen)
    assert linear["top_1"]["value"] == pytest.approx(top_k_accuracy_score(answers, scores, k=1))
    assert linear["top_5"]["value"] == pytest.approx(top_k_accuracy_score(answers, scores, k=5))
    weights = {1: "uniform", 5: lambda distances: np.exp((1 - distances) / 0.07)}
    for k, found in ((1, nearest), (5, five)):
        theirs = KNeighborsClassifier(k, metric="cosine", weights=weights[k]).fit(seen, targets)
        assert found["probe"] == f"k-NN, k = {k}"
        assert found["predicted"] == [names[place] for place in theirs.predict(unseen)]
        assert found["top_1"]["value"] == pytest.approx(theirs.score(unseen, answers))
        assert f"{found['top_1']['value']:.3f} (" in said
    assert "top_5" in five
    assert "top_5" not in nearest, "one neighbour votes for one label"


def test_encoders_stand_side_by_side_on_the_same_split(clip, convolutional, data, tmp_path):
    said = run([clip, convolutional], data=str(data), test_size=0.3, seed=1, output=tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert [row["encoder"] for row in report["results"]] == [str(clip)] * 3 + [str(convolutional)] * 3
    assert "42 images to learn from, 18 to test on" in said
    assert "resnet [a]" in said.replace("\n", "")
    right = [row["label"] for row in report["test_images"]]
    for row in report["results"]:
        hits = [one == other for one, other in zip(row["predicted"], right, strict=True)]
        assert row["top_1"]["value"] == pytest.approx(sum(hits) / 18)
    alone = tmp_path / "alone.json"
    run([convolutional], data=str(data), test_size=0.3, seed=1, output=alone)
    assert json.loads(alone.read_text())["results"] == report["results"][3:]
    other = tmp_path / "other.json"
    run([clip], data=str(data), test_size=0.3, seed=2, output=other)
    assert json.loads(other.read_text())["test_images"] != report["test_images"]


def test_what_always_saying_the_most_common_label_would_score(clip, data):
    for name in ("1-0.png", "1-1.png", "1-2.png", "1-3.png", "1-4.png"):
        for label in list(LABELS)[1:]:
            (data / label / name).unlink()
    said = run([clip], data=str(data), test_size=0.2)
    assert "'blue' for each would be right 0.286 of the time" in said  # 2 of 2 + 5 * 1


def test_a_fit_that_is_not_done_is_told(clip, data, monkeypatch):
    monkeypatch.setattr(linear_probe, "TOLERANCE", 0.0)
    monkeypatch.setattr(linear_probe, "ITERATIONS", 3)
    assert "was still moving after" in run([clip], data=str(data))


def test_labels_that_lose_their_images_as_they_are_opened_are_left_out(clip, data):
    for path in (data / "red").glob("1-[0-7].png"):
        path.write_bytes(b"no")
    said = run([clip], data=str(data))
    assert "label 'red': 2 images, and it takes 3" in said
    assert said.count("not an image that can be read") == 8
    assert "5 labels" in said
    assert "top-5" not in said, "of five labels the first five are all"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": "x", "test_size": 0.2}, "--test and --test-size"),
        ({"k": [1, 49]}, "--k 49: there are only 48 images to learn from"),
        ({"label_column": "kind"}, "--label-column kind"),
        ({"data": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_encoded(data, options, message):
    with pytest.raises(UserError, match=message):
        run(["no encoder"], **{"data": str(data)} | options)


def test_other_mistakes(clip, data, tmp_path):
    with pytest.raises(UserError, match="is given twice"):
        run([clip, clip], data=str(data))
    with pytest.raises(UserError, match="cannot load"):
        run([tmp_path], data=str(data))
    with pytest.raises(UserError, match=r"60 images in both --data and --test: .*; what was learnt is no test"):
        run([clip], data=str(data), test=str(data))
    (tmp_path / "out.json").touch()
    with pytest.raises(UserError, match="exists already"):
        run([clip], data=str(data), output=tmp_path / "out.json")
