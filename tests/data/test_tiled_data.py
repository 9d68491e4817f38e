"""Data for a model with tiling: trees, kept features, counts of tokens, and examples that mix images and text."""

import pytest
import torch

from tests.data.test_dataset import straight
from tests.data.test_trees import assert_close, gradients
from tests.tiny import image
from tests.vlm.test_tiled_model import KINDS, tiled
from vlm.cache import kept as listed
from vlm.data.check import check
from vlm.data.dataset import TreeCollator, TreeDataset, make_items, one_row_an_answer
from vlm.data.example import Branch, Example, question_and_answer
from vlm.data.images import image_size, open_image
from vlm.data.tree_masks import TreeMasks

SIZES = [(20, 30), (70, 30), (80, 64), (30, 100)]


def text(role, *parts):
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def examples():
    """One image and several answers, of every size; two images a question; a few-shot prompt; and text alone."""
    pairs = [("what", "a cat"), ("where is it", "on the street"), ("what", "a dog and a cat")]
    one = [
        Example((image(n, size),), tuple(question_and_answer(*pair) for pair in pairs), str(n), f"row {n}")
        for n, size in enumerate(SIZES)
    ]
    two = (image(4, SIZES[1]), image(5, SIZES[2]))
    both = Example(two, tuple(question_and_answer(*pair, num_images=2) for pair in pairs[:2]), "two", "two")
    shots = (
        text("user", None, "what"),
        text("assistant", "a cat"),
        text("user", "and", None, "what ?"),
        text("assistant", "a dog"),
    )
    few = Example((image(6, SIZES[2]), image(7, SIZES[0])), (Branch(shots),), "few", "few")
    words = Example((), (Branch((text("user", "what is a cat"), text("assistant", "it is a cat"))),), "text", "text")
    return [*one, both, few, words]


def items_of(processor, made=None, **options):
    options = {"max_length": 2000, "too_long": "error"} | options
    return make_items(made or examples(), processor, report=print, progress=straight, **options)


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind))
def made(request):
    return tiled(*request.param)


def loss_and_gradients(model, batch):
    model.zero_grad()
    labels = batch.pop("labels")
    scores = model(**batch, use_cache=False).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.few(4)
def test_trees_equal_one_row_an_answer(made):
    """Loss and gradients of packed rows of trees, and of rows with one answer each, one at a time."""
    model, processor = made
    items, _ = items_of(processor)
    collator = TreeCollator(processor, masks=TreeMasks(model))
    trees = loss_and_gradients(model, collator(TreeDataset(items, 300).rows))
    total, sums = 0.0, {}
    for item in one_row_an_answer(items):
        loss, grads = loss_and_gradients(model, TreeCollator(processor, plain=True)([[item]]))
        total += loss
        sums = {name: sums.get(name, 0) + grads.get(name, 0) for name in {*sums, *grads}}
    assert_close(trees, (total, sums))
    of_tiles = {name for name, _ in model.named_parameters() if "tile_positions" in name or "image_newline" in name}
    assert of_tiles <= sums.keys()


def test_ids_from_sizes_are_those_of_the_processor(made):
    """What is laid out without a look at pixels is what the processor makes of the images."""
    _, processor = made
    for item in one_row_an_answer(items_of(processor)[0]):
        found = []
        for branch in item.example.branches:
            rest = iter(item.example.images)
            messages = [
                {**m, "content": [{**p, "image": next(rest)} if p["type"] == "image" else p for p in m["content"]]}
                for m in branch.messages
            ]
            encoded = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
            found.append(encoded["input_ids"][0][: len(item.tree.input_ids)])
        assert item.tree.input_ids in found


# --- kept features


def kept(tmp_path, model, processor, made):
    from io import StringIO

    from rich.console import Console

    from tests.training.helpers import arguments
    from tests.training.test_features import a_recipe
    from vlm.data.check import ProblemLog
    from vlm.training.callbacks import StopOnSignal
    from vlm.training.features import kept_features

    args = arguments(tmp_path / "run", bf16=False)
    console = Console(file=StringIO(), width=200)
    recipe = a_recipe(cache_features=True)
    cache, [keys] = kept_features(recipe, (made,), model, processor, args, ProblemLog(99), console, StopOnSignal())
    return cache, keys, console.file.getvalue()


@pytest.fixture(autouse=True)
def vlm_home(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))


def test_kept_features_are_those_of_pixels(made, tmp_path):
    model, processor = made
    cache, keys, said = kept(tmp_path, model, processor, examples())
    assert "0 of 8 images found on disk" in said
    from_pixels, _ = items_of(processor)
    from_cache, _ = items_of(processor, features=keys)
    assert [item.tree for item in from_cache] == [item.tree for item in from_pixels]
    wanted = TreeCollator(processor).images(from_pixels)
    found = TreeCollator(processor, cache).images(from_cache)
    with torch.no_grad():
        features, grid = model.get_vision_features(wanted["pixel_values"])
    assert torch.equal(found["image_sizes"], wanted["image_sizes"])
    assert found["vision_grid"] == grid
    assert torch.allclose(found["vision_features"], features, atol=1e-5)


def test_features_found_are_not_encoded_again_and_another_tiling_finds_none(tmp_path, monkeypatch):
    model, processor = tiled()
    kept(tmp_path, model, processor, examples())
    other = tiled(kind="anyres")
    assert "0 of 8 images found" in kept(tmp_path, *other, examples())[2]
    assert {(entry.images, entry.about["image_size"]) for entry in listed()} == {
        (8, "32x32 tiles 4"),
        (8, "32x32 anyres 4"),
    }
    monkeypatch.setattr(model, "get_vision_features", None)
    assert "8 of 8 images found on disk; none to encode" in kept(tmp_path, model, processor, examples())[2]


# --- sizes and lengths


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_a_size_from_the_header_is_that_of_the_opened_image(tmp_path, orientation):
    exif = image(0).getexif()
    if orientation:
        exif[0x0112] = orientation
    image(0, (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    opened = open_image(str(tmp_path / "a.jpg"))
    assert image_size(str(tmp_path / "a.jpg")) == (opened.height, opened.width)


def test_the_longest_example_counts_its_tiles():
    _, processor = tiled()
    items, _ = items_of(processor)
    by_name = {item.example.where: len(item.tree) for item in items}
    assert by_name["row 2"] - by_name["row 0"] == 4 * 16 + 4 + 3, "four tiles, their markers and line breaks"
    left, out = items_of(processor, max_length=by_name["row 0"], too_long="skip")
    assert [item.example.where for item in left] == ["row 0", "text"]
    assert out.examples == 5


def test_a_data_check_counts_the_tokens_of_tiles(made, tmp_path):
    import json

    from vlm.data_check import _reading

    _, processor = made
    for n, size in enumerate(SIZES):
        image(n, size).save(tmp_path / f"{n}.png")
    rows = [{"file_name": f"{n}.png", "question": "what", "answer": "a cat"} for n in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made[1].save_pretrained(tmp_path / "model")
    made[0].config.save_pretrained(tmp_path / "model")
    source = {"format": "image_folder", "path": str(tmp_path)}
    report = check(source, base_dir=tmp_path, **_reading(str(tmp_path / "model"), 2048))
    pictures = [Example((image(n, s),), (question_and_answer("what", "a cat"),), "", "") for n, s in enumerate(SIZES)]
    lengths = [len(item.tree) for item in items_of(processor, pictures)[0]]
    assert (report.tokens.smallest, report.tokens.largest) == (min(lengths), max(lengths))
