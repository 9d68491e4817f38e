"""`vlm classify`: dual encoders against CLIPModel's own logits, vision-language models against one forward a label."""

import json
from io import StringIO

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPProcessor, SiglipModel

from tests.dual_encoders import save_clip, save_siglip
from tests.stock import PROMPTED, STOCK, stock
from tests.tiny import FUSIONS, clip_config, image, tiny
from vlm import classify
from vlm.errors import UserError
from vlm.recognition.labels import read_labels
from vlm.recognition.likelihood import PROMPT, LabelLikelihood, blank_image

LABELS = ["cat", "big dog", "e"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return folder


@pytest.fixture
def folders(tmp_path):
    """Three labels with six, five and four images, one of which does not open, and a file that has no label."""
    for number, label in enumerate(LABELS):
        (tmp_path / "data" / label).mkdir(parents=True)
        for n in range(6 - number):
            image(10 * number + n).save(tmp_path / "data" / label / f"{n}.png")
    (tmp_path / "data" / "e" / "3.png").write_bytes(b"not an image")
    image(1).save(tmp_path / "data" / "stray.png")
    return tmp_path / "data"


def run(*args, **options):
    console = Console(file=StringIO(), width=100)
    classify.run(*args, console=console, **options)
    return console.file.getvalue()


@torch.no_grad()
def clips_own(clip, paths, template="a photo of a {}."):
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    inputs = processor(
        text=[template.format(label) for label in LABELS],
        images=[Image.open(path) for path in paths],
        return_tensors="pt",
        padding=True,
    )
    return model(**inputs).logits_per_image


def test_a_dual_encoder_gives_clips_own_probabilities(clip, folders, tmp_path):
    paths = sorted(map(str, (folders / "cat").iterdir()))
    said = run(str(clip), [str(folders / "cat")], labels=",".join(LABELS), output=tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = clips_own(clip, paths).softmax(dim=-1)
    assert [row["image"] for row in rows] == paths
    found = torch.tensor([[row["probabilities"][label] for label in LABELS] for row in rows])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert [row["label"] for row in rows] == [LABELS[i] for i in expected.argmax(dim=-1)]
    assert said.count(".png: ") == len(paths)


def test_siglip_judges_each_pair_by_itself(folders, tmp_path):
    torch.manual_seed(0)
    save_siglip(tmp_path / "siglip")
    path = str(folders / "cat" / "0.png")
    run(str(tmp_path / "siglip"), [path], labels=",".join(LABELS), template=["{}"], output=tmp_path / "out.jsonl")
    found = json.loads((tmp_path / "out.jsonl").read_text())["probabilities"]
    model, processor = (auto.from_pretrained(tmp_path / "siglip") for auto in (SiglipModel, AutoProcessor))
    pixels = processor.image_processor(Image.open(path), return_tensors="pt")
    texts = processor.tokenizer(LABELS, return_tensors="pt", padding="max_length", max_length=24)
    with torch.no_grad():
        expected = model(**pixels, **texts).logits_per_image.sigmoid()[0]
    torch.testing.assert_close(torch.tensor([found[label] for label in LABELS]), expected, atol=1e-5, rtol=0)


def test_templates_are_averaged_as_unit_vectors(clip, folders, tmp_path):
    pair = ["a photo of a {}.", "art of the {}."]
    path = str(folders / "cat" / "0.png")
    run(str(clip), [path], labels=",".join(LABELS), template=pair, output=tmp_path / "out.jsonl")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    # A cosine with a mean of unit vectors is the mean of the cosines over the length of that mean.
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    cosines = [clips_own(clip, [path], template)[0] for template in pair]
    with torch.no_grad():
        texts = [
            model.get_text_features(
                **processor.tokenizer([t.format(x) for x in LABELS], return_tensors="pt", padding=True)
            )
            for t in pair
        ]
    units = [each.pooler_output / each.pooler_output.norm(dim=-1, keepdim=True) for each in texts]
    logits = (cosines[0] + cosines[1]) / 2 / ((units[0] + units[1]) / 2).norm(dim=-1)
    found = torch.tensor([row["probabilities"][label] for label in LABELS])
    torch.testing.assert_close(found, logits.softmax(dim=-1), atol=1e-5, rtol=0)


def test_labelled_folders_are_scored_and_what_is_left_out_is_named(clip, folders):
    said = run(str(clip), [], data=str(folders))
    logits, hits = clips_own(clip, sorted(folders.glob("*/[0-9].png"))[:-1]), 0
    targets = [LABELS.index(path.parent.name) for path in sorted(folders.glob("*/[0-9].png"))[:-1]]
    # The folders come sorted, `e/3.png` is broken and last.
    hits = sum(int(row.argmax()) == target for row, target in zip(logits, targets, strict=True))
    assert f"top-1 accuracy {hits / 14:.3f} (" in said
    assert "14 images, 3 labels" in said
    assert "stray.png" in said
    assert "3.png" in said


@torch.no_grad()
def alone(model, processor, picture, label):
    """The log-likelihood of a label, by the model's own loss on one conversation."""
    asked = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": PROMPT}]},
        {"role": "assistant", "content": [{"type": "text", "text": label}]},
    ]
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"return_tensors": "pt"}}
    whole = processor.apply_chat_template([asked], **options)
    prompt = processor.apply_chat_template([asked[:1]], add_generation_prompt=True, **options)
    labels = whole["input_ids"].clone()
    labels[:, : prompt["input_ids"].shape[1]] = -100
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    labels[:, (whole["input_ids"][0] == end).nonzero()[-1, 0] + 1 :] = -100  # nothing is said behind the end of a turn
    loss = model(**whole, labels=labels).loss
    return -float(loss) * int((labels[:, 1:] != -100).sum())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_likelihoods_are_those_of_one_forward_a_label(fusion):
    model, processor = tiny(fusion=fusion)
    pictures = [image(1), image(2, (50, 30))]
    found = LabelLikelihood(model, processor, LABELS, max_batch_tokens=150)
    assert found.why_plain is None
    blank = blank_image(processor)
    expected = torch.tensor(
        [
            [alone(model, processor, p, label) - alone(model, processor, blank, label) for label in LABELS]
            for p in pictures
        ]
    )
    torch.testing.assert_close(found.scores(pictures), expected, atol=1e-3, rtol=0)


@pytest.mark.few(6)
@pytest.mark.parametrize("name", PROMPTED | STOCK)
def test_stock_models_score_labels_together_as_each_alone(name):
    """As branches of one tree or as rows of one batch."""
    model, processor = stock(name)
    pictures = [image(1), image(2, (50, 30))]
    together = LabelLikelihood(model, processor, LABELS).scores(pictures)
    alone = [LabelLikelihood(model, processor, [label]).scores([p]) for p in pictures for label in LABELS]
    torch.testing.assert_close(together.flatten(), torch.cat(alone).flatten(), atol=1e-4, rtol=0)


def test_a_vision_language_model_is_asked_and_a_label_written_as_its_answer(folders, tmp_path):
    model, processor = tiny()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    path = str(folders / "cat" / "0.png")
    options = {"labels": ",".join(LABELS), "template": ["A {}."], "output": tmp_path / "out.jsonl"}
    run(str(tmp_path / "model"), [path], **options)
    found = json.loads((tmp_path / "out.jsonl").read_text())["probabilities"]
    texts = [f"A {label}." for label in LABELS]
    picture, blank = Image.open(path), blank_image(processor)
    scores = [alone(model, processor, picture, text) - alone(model, processor, blank, text) for text in texts]
    expected = torch.tensor(scores).softmax(dim=-1)
    torch.testing.assert_close(torch.tensor([found[label] for label in LABELS]), expected, atol=1e-3, rtol=0)
    with pytest.raises(UserError, match=r"takes one --template"):
        run(str(tmp_path / "model"), [path], labels="a,b", templates="imagenet")


def test_what_is_neither_is_refused(folders, tmp_path):
    AutoModel.from_config(clip_config()).save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="is of type clip_vision_model, which is no vision-language model"):
        run(str(tmp_path / "clip"), [str(folders / "cat")], labels="a,b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "cat"}, "give two labels or more"),
        ({"labels": "cat,cat,dog"}, "'cat' more than once"),
        ({"labels": "nothing.txt"}, r"nothing\.txt: cannot be read"),
        ({"labels": "a,b", "template": ["no place"]}, "has no {} where the label goes"),
        ({"labels": "a,b", "templates": "imagent"}, "did you mean 'imagenet'"),
        ({"labels": "a,b", "prompt": "What?"}, "--prompt is what a vision-language model is asked"),
        ({"labels": "a,b", "data": "x"}, "--data"),
        ({"labels": "a,b", "label_column": "kind"}, "--label-column is a column of --data"),
        ({}, "--labels says what the images may be"),
    ],
)
def test_what_does_not_go_together(clip, folders, options, message):
    with pytest.raises(UserError, match=message):
        run(str(clip), [str(folders / "cat")], **options)


def test_a_label_after_the_last_learned_position_is_named(monkeypatch):
    """GPT-2 has learned positions, which end; llama's rotary ones do not."""
    model, processor = tiny("gpt2")
    text, places = model.config.get_text_config(), model.config.get_text_config().max_position_embeddings
    labels = ["cat", "e", "a dog on the street"]
    with pytest.raises(UserError, match=rf"label 'cat': .* the model has {places} positions"):
        LabelLikelihood(model, processor, labels, prompt="e" * 3 * places)
    (item,) = LabelLikelihood(model, processor, labels)._items([blank_image(processor)], None)
    longest = max(item.tree.position_ids) + 1
    assert longest < len(item.tree), "the positions of a label begin where the question ends"
    monkeypatch.setattr(text, "n_positions", longest)
    LabelLikelihood(model, processor, labels)
    monkeypatch.setattr(text, "n_positions", longest - 1)
    with pytest.raises(
        UserError, match=rf"label 'a dog on the street': .* {longest} tokens, .* {longest - 1} positions"
    ):
        LabelLikelihood(model, processor, labels)
    LabelLikelihood(*tiny("llama"), labels, prompt="e" * 3 * places)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("l.csv", "cat\n\nbig dog\n", ["cat", "big dog"]),
        ("l.csv", 'label\ncat\n"dog, big"\n', ["cat", "dog, big"]),
        ("l.csv", "id,Label\n1,cat\n2, dog\n", ["cat", "dog"]),
        ("l.csv", "\ufeffcat,dog,  bird\r\n", ["cat", "dog", "bird"]),
        ("l.tsv", "class\tnumber\ncat, big\t1\ndog\t2\n", ["cat, big", "dog"]),
        ("l.CSV", "cat\ndog\n", ["cat", "dog"]),
        ("l.txt", "cat, big\ndog\n", ["cat, big", "dog"]),
    ],
)
def test_labels_in_a_file(tmp_path, name, text, found):
    (tmp_path / name).write_text(text)
    assert read_labels(str(tmp_path / name)) == found


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("l.csv", None, "l.csv: cannot be read"),
        ("l.csv", "1,cat\n2,dog\n", "it has 2 columns .1, cat., and none is called `label`"),
        ("l.csv", "", "no label; give two"),
        ("l.csv", "label\ncat\ncat\n", "'cat' more than once"),
        ("l.csv", '"cat\ndog\n', "not a table"),
    ],
)
def test_a_table_without_labels_is_refused(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        read_labels(str(tmp_path / name))
