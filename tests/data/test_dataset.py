"""From examples to batches: what is left out and why, rows, and the images that go with them."""

from itertools import chain

import pytest
import torch

from tests.tiny import image, tiny
from vlm.data.conversation import IGNORE, tokenize_branch
from vlm.data.dataset import TreeCollator, TreeDataset, make_items, shifted, supervised_tokens
from vlm.data.example import Branch, Example, question_and_answer
from vlm.data.features import FeatureCache
from vlm.errors import UserError


@pytest.fixture(scope="module")
def model_and_processor():
    return tiny()


def straight(steps, total):
    return steps


def example(number, *pairs, images=None):
    pairs = pairs or (("what", "a cat"), ("where", "on the street"))
    images = (image(number),) if images is None else images
    branches = tuple(
        question_and_answer(q, a, num_images=len(images), where=f"data.json:{number}.{i}")
        for i, (q, a) in enumerate(pairs)
    )
    return Example(images, branches, f"image {number}", f"data.json:{number}")


def items_of(examples, processor, problems=None, **options):
    options = {"max_length": 1000, "too_long": "error"} | options
    problems = [] if problems is None else problems
    return make_items(examples, processor, report=problems.append, progress=straight, **options)


def test_every_answer_is_in_a_tree(model_and_processor):
    _, processor = model_and_processor
    items, left_out = items_of([example(0), example(1, ("is it ?", "no"))], processor)
    assert [item.answers for item in items] == [2, 1]
    assert (left_out.examples, left_out.branches) == (0, 0)
    text = [processor.tokenizer.decode([t for t in item.tree.labels if t != IGNORE]) for item in items]
    assert text == ["a cat<|im_end|>on the street<|im_end|>", "no<|im_end|>"]
    assert supervised_tokens(items) == sum(t != IGNORE for item in items for t in item.tree.labels)


# --- too long


LONG = "a cat and a dog on the street " * 6


def mixed():
    """Short, half too long, wholly too long."""
    return [
        example(0),
        example(1, ("what", "a cat"), ("where", LONG), ("who", "a dog")),
        example(2, ("what", LONG), ("where", LONG)),
    ]


def test_too_long_is_skipped_whole_and_counted(model_and_processor):
    _, processor = model_and_processor
    items, left_out = items_of(mixed(), processor, max_length=100, too_long="skip")
    assert [item.example.where for item in items] == ["data.json:0"]
    assert (left_out.examples, left_out.branches) == (2, 5)
    sizes = [len(item.tree) for item in items_of(mixed(), processor)[0]]
    assert left_out.longest == max(sizes)


def test_too_long_drops_answers_until_it_fits(model_and_processor):
    _, processor = model_and_processor
    items, left_out = items_of(mixed(), processor, max_length=100, too_long="drop_branches")
    assert [(item.example.where, item.answers) for item in items] == [("data.json:0", 2), ("data.json:1", 2)]
    assert (left_out.examples, left_out.branches) == (1, 3)
    assert all(len(item.tree) <= 100 for item in items)
    learned = processor.tokenizer.decode([t for t in items[1].tree.labels if t != IGNORE])
    assert learned == "a cat<|im_end|>a dog<|im_end|>", "answers are whole or gone"


def test_learned_positions_end_an_answer_and_not_a_tree(model_and_processor):
    """A tree may be longer than the positions: those of each branch begin where the trunk ends."""
    _, processor = model_and_processor
    everything, _ = items_of(mixed(), processor)
    path = max(everything[0].tree.position_ids) + 1
    assert path < len(everything[0].tree)
    items, left_out = items_of(mixed(), processor, max_positions=path, too_long="drop_branches")
    assert [(item.example.where, item.answers) for item in items] == [("data.json:0", 2), ("data.json:1", 2)]
    assert all(max(item.tree.position_ids) < path for item in items)
    assert (left_out.examples, left_out.branches, left_out.positions) == (1, 3, path)
    assert f"data.max_length 1000 tokens or the {path} positions of the model" in left_out.in_words(1000, "training")
    items, left_out = items_of(mixed(), processor, max_positions=path, too_long="skip")
    assert [item.example.where for item in items] == ["data.json:0"]
    assert (left_out.examples, left_out.branches) == (2, 5)
    with pytest.raises(UserError, match=rf"data\.json:1: \d+ tokens .* the model has {path} positions"):
        items_of(mixed(), processor, max_positions=path, too_long="error")


def test_too_long_is_an_error_that_names_the_row(model_and_processor):
    _, processor = model_and_processor
    with pytest.raises(ValueError, match=r"data\.json:1: \d+ tokens .*data\.max_length 100.*skip or drop_branches"):
        items_of(mixed(), processor, max_length=100, too_long="error")


@pytest.mark.parametrize("too_long", ["skip", "drop_branches"])
@pytest.mark.parametrize("max_length", [10, 25, 40, 60])
def test_an_image_is_never_cut(model_and_processor, too_long, max_length):
    _, processor = model_and_processor
    items, left_out = items_of(mixed(), processor, max_length=max_length, too_long=too_long)
    for item in items:
        assert item.tree.input_ids.count(processor.image_token_id) == processor.image_seq_length
    assert sum(item.answers for item in items) + left_out.branches == 7


# --- broken images


def broken_examples(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    return [example(0), example(1, images=(str(bad),)), example(2), example(3, images=(str(tmp_path / "gone.png"),))]


def test_broken_images_are_reported_once_with_their_row(model_and_processor, tmp_path):
    _, processor = model_and_processor
    problems = []
    items, _ = items_of(broken_examples(tmp_path), processor, problems)
    assert [item.example.where for item in items] == ["data.json:0", "data.json:2"]
    assert [(p.where.split(": ")[0], p.key, p.lost) for p in problems] == [
        ("data.json:1", "image", 2),
        ("data.json:3", "image", 2),
    ]
    assert str(problems[0]).count("bad.png") == str(problems[0]).count("data.json:1") == 1
    assert "does not exist" in problems[1].why


def test_the_collator_gets_only_images_that_open(model_and_processor, tmp_path):
    _, processor = model_and_processor
    items, _ = items_of(broken_examples(tmp_path), processor)
    assert TreeCollator(processor)(TreeDataset(items, 200).rows)["pixel_values"].shape[0] == 2


# --- images that the branches do not share


def test_questions_right_behind_the_image_share_it(model_and_processor):
    model, processor = model_and_processor
    items, _ = items_of([example(0, ("what", "a"), ("is", "b"))], processor)
    assert [item.tree.input_ids.count(processor.image_token_id) for item in items] == [processor.image_seq_length]
    batch = TreeCollator(processor)(TreeDataset(items, 200).rows)
    batch.pop("labels")
    model(**batch)  # raises if image tokens and images do not match


def test_text_before_the_image_makes_a_tree_each(model_and_processor):
    model, processor = model_and_processor
    branches = tuple(
        Branch(
            (
                {"role": "user", "content": [{"type": "text", "text": text}, {"type": "image"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
            )
        )
        for text in ("what is", "who is", "where is")
    )
    items, _ = items_of([Example((image(0),), branches, "0", "x:1")], processor)
    assert [item.answers for item in items] == [1, 1, 1]
    batch = TreeCollator(processor)(TreeDataset(items, 500).rows)
    assert len(batch["pixel_values"]) == 3
    batch.pop("labels")
    model(**batch)


# --- rows and batches


def test_rows_hold_every_item_once_within_the_budget(model_and_processor):
    _, processor = model_and_processor
    items, _ = items_of([example(n) for n in range(12)], processor)
    size = len(items[0].tree)
    data = TreeDataset(items, max_tokens=3 * size + 1)
    assert [len(data[i]) for i in range(len(data))] == [3, 3, 3, 3]
    assert sorted(item.example.where for row in data.rows for item in row) == sorted(i.example.where for i in items)
    assert TreeDataset(items, 3 * size).rows == data.rows, "the same rows every time: a run can be resumed"
    assert TreeDataset(items, 3 * size, seed=1).rows != data.rows
    assert {item.example.where for item in data[0]} != {f"data.json:{n}" for n in range(3)}, "neighbours are parted"


def test_each_epoch_deals_the_items_anew_into_rows_as_full(model_and_processor):
    _, processor = model_and_processor
    answers = ["a cat", "a dog on the street"]
    items, _ = items_of([example(n, ("what", answers[n % 2])) for n in range(12)], processor)
    data = TreeDataset(items, max_tokens=3 * len(items[0].tree))

    def seen(epoch):
        data.set_epoch(epoch)
        return [[item.example.where for item in row] for row in data.rows]

    def lengths(epoch):
        data.set_epoch(epoch)
        return [[len(item.tree) for item in row] for row in data.rows]

    assert sorted(chain(*seen(1))) == sorted(chain(*seen(0)))
    assert lengths(1) == lengths(0)
    together = [{frozenset(row) for row in seen(epoch)} for epoch in range(3)]
    assert len(together[0] & together[1]) < len(together[0])
    assert seen(1) != seen(2)
    assert seen(1) == seen(1), "the same every time: a run can be resumed"
    assert seen(0) == [[item.example.where for item in row] for row in TreeDataset(items, 3 * len(items[0].tree)).rows]


def test_images_follow_the_order_of_their_tokens(model_and_processor):
    """Each image stands where its own example's tokens are, over rows, several images and text alone."""
    _, processor = model_and_processor
    examples = [
        example(0, ("what", "a cat"), ("is", "b"), images=(image(0), image(1))),
        example(1, ("no image", "no"), images=()),
        example(2, ("what", LONG)),
        example(3),
    ]
    items, _ = items_of(examples, processor)
    data = TreeDataset(items, 120)
    assert len(data) > 1
    batch = TreeCollator(processor)(data.rows)
    wanted = [picture for row in data.rows for item in row for picture in item.example.images]
    assert torch.equal(batch["pixel_values"], processor.image_processor(wanted, return_tensors="pt")["pixel_values"])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4 * processor.image_seq_length


def test_kept_features_give_the_same_output_as_pixels(model_and_processor, tmp_path):
    model, processor = model_and_processor
    examples = [example(0, images=(image(0), image(1))), example(2), example(3, ("no image", "no"), images=())]
    images = [source for e in examples for source in e.images]
    with torch.no_grad():
        features = model.get_vision_features(processor.image_processor(images, return_tensors="pt")["pixel_values"])
    cache = FeatureCache(tmp_path)
    cache.write(["first", "second", "third"], *features)
    items, _ = items_of(examples, processor, features={0: ("first", "second"), 1: ("third",), 2: ()})
    plain, _ = items_of(examples, processor)
    outputs = []
    for made, kept in ((items, cache), (plain, None)):
        batch = TreeCollator(processor, kept)(TreeDataset(made, 150).rows)
        assert ("vision_features" in batch) == (kept is not None)
        batch.pop("labels")
        with torch.no_grad():
            outputs.append(model(**batch).logits)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)


def test_examples_without_features_are_left_out(model_and_processor):
    _, processor = model_and_processor
    items, _ = items_of([example(0), example(1)], processor, features={1: ("sha",)})
    assert [(item.example.where, item.features) for item in items] == [("data.json:1", ("sha",))]


def test_equal_conversations_are_tokenized_once_and_stay_right(model_and_processor):
    _, processor = model_and_processor
    items, _ = items_of([example(0), example(1)], processor)
    alone = tokenize_branch(processor, example(1).branches[0])
    assert items[0].tree == items[1].tree
    assert items[0].tree is not items[1].tree
    assert items[1].tree.input_ids[: len(alone.input_ids)] == alone.input_ids


def test_shifted_labels():
    assert shifted(torch.tensor([[1, 2, 3], [4, 5, -100]])).tolist() == [[2, 3, -100], [5, -100, -100]]
