"""Message trees: the layout written out by hand, and loss and gradients against one row an answer."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import DECODERS, FUSIONS, image, text_config, tiny
from vlm.data.conversation import TokenizedBranch
from vlm.data.trees import lay_out, make_tree, pack, paths
from vlm.training.trainer import supervised_loss
from vlm.tree_attention import tree_attention, tree_layout

X = -100


def branch(ids, labels):
    return TokenizedBranch(list(ids), list(labels))


# --- the layout, by hand


def test_an_answer_right_behind_the_trunk_repeats_the_last_shared_token():
    tree = make_tree([branch([1, 2, 3, 7, 8], [X, X, X, 7, 8]), branch([1, 2, 3, 9], [X, X, X, 9])])
    assert tree.input_ids == [1, 2, 3, 7, 8, 3, 9]
    assert tree.labels == [X, X, X, 7, 8, X, 9]
    assert tree.position_ids == [0, 1, 2, 3, 4, 2, 3]
    assert tree.branch_ids == [0, 0, 1, 1, 1, 2, 2]
    assert len(tree) == 7


def test_a_question_behind_the_trunk_repeats_nothing():
    """So the last shared token may be one of an image, which must not be there twice."""
    tree = make_tree([branch([1, 2, 3, 7], [X, X, X, 7]), branch([1, 2, 4, 7, 8], [X, X, X, 7, 8])])
    assert tree.input_ids == [1, 2, 3, 7, 4, 7, 8]
    assert tree.labels == [X, X, X, 7, X, 7, 8]
    assert tree.position_ids == [0, 1, 2, 3, 2, 3, 4]
    assert tree.branch_ids == [0, 0, 1, 1, 2, 2, 2]


def test_answers_that_begin_alike_are_supervised_once_each():
    """`a cat` and `a dog` share their first token; each answer must learn it."""
    tree = make_tree([branch([1, 2, 5, 6], [X, X, 5, 6]), branch([1, 2, 5, 7], [X, X, 5, 7])])
    assert tree.labels == [X, X, 5, 6, X, 5, 7]


def test_a_single_branch_is_a_plain_row():
    tree = make_tree([branch([4, 5, 6], [X, X, 6])])
    assert (tree.input_ids, tree.labels, tree.position_ids) == ([4, 5, 6], [X, X, 6], [0, 1, 2])
    rows = lay_out([[tree]], pad_token_id=0)
    assert torch.equal(rows["attention_mask"][0, 0], torch.ones(3, 3, dtype=torch.bool).tril())


def test_equal_branches_and_branches_that_learn_nothing():
    tree = make_tree([branch([1, 2, 3], [X, X, 3]), branch([1, 2, 3], [X, X, 3]), branch([1, 2], [X, X])])
    assert tree.input_ids == [1, 2, 3, 2, 3, 2]
    assert tree.labels == [X, X, 3, X, 3, X]
    assert make_tree([branch([7, 8], [X, 8]), branch([9], [X])]).input_ids == [7, 8, 9]


def test_the_mask_of_two_trees_in_a_row_with_padding():
    first = make_tree([branch([1, 2, 3], [X, X, 3]), branch([1, 2, 4], [X, X, 4])])  # 1 | 2 3 | 2 4
    second = make_tree([branch([5, 6], [X, 6])])
    rows = lay_out([[first, second], [second]], pad_token_id=99)
    assert rows["input_ids"].tolist() == [[1, 2, 3, 2, 4, 5, 6], [5, 6, 99, 99, 99, 99, 99]]
    assert rows["labels"].tolist() == [[X, X, 3, X, 4, X, 6], [X, 6, X, X, X, X, X]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 1, 2, 0, 1], [0, 1, 0, 0, 0, 0, 0]]
    assert rows["attention_mask"].shape == (2, 1, 7, 7)
    assert rows["attention_mask"].dtype == torch.bool
    seen = [
        "1......",
        "11.....",
        "111....",
        "1..1...",
        "1..11..",
        ".....1.",
        ".....11",
    ]
    assert rows["attention_mask"][0, 0].tolist() == [[c == "1" for c in line] for line in seen]
    padded = [
        "1......",
        "11.....",
        "..1....",
        "...1...",
        "....1..",
        ".....1.",
        "......1",
    ]
    assert rows["attention_mask"][1, 0].tolist() == [[c == "1" for c in line] for line in padded]


# --- packing


def test_packing_by_hand():
    assert pack([6, 2, 5, 4, 3], 10) == [[0, 3], [1, 2, 4]]
    assert pack([20, 3], 10) == [[0], [1]]
    assert pack([], 10) == []


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 50))
def test_packing_keeps_every_item_once_and_the_budget(lengths, budget):
    rows = pack(lengths, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and row == sorted(row) for row in rows)
    for row in rows:
        assert len(row) == 1 or sum(lengths[i] for i in row) <= budget
    # No two rows could be one: the packing is not wasteful.
    sizes = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > budget


def test_packing_a_large_set_is_fast_enough_to_finish():
    lengths = torch.randint(20, 200, (100_000,), generator=torch.Generator().manual_seed(0)).tolist()
    assert sum(map(len, pack(lengths, 2048))) == len(lengths)


# --- exactness: loss and every gradient against one row an answer

TOKENS_PER_IMAGE = 16


@st.composite
def conversations(draw, image_token, image_size):
    """Conversations about the same images: any number of branches, of turns, of images; answers that begin alike."""
    word = st.integers(0, 5)  # few words, so that branches share more than their trunk
    text = st.lists(word, min_size=1, max_size=4)
    shared, images = draw(text), draw(st.integers(0, 2))
    for _ in range(images):
        shared += [image_token] * image_size + draw(st.lists(word, max_size=2))
    branches = []
    for _ in range(draw(st.integers(1, 4))):
        ids, labels = list(shared), [X] * len(shared)
        for _ in range(draw(st.integers(1, 2))):
            question, answer = draw(text), draw(text)
            ids += question + answer
            labels += [X] * len(question) + answer
        branches.append(branch(ids, labels))
    return images, branches


def gradients(model):
    found = {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def one_row_each(model, examples, images):
    """The textbook way: every answer in a row of its own, with its own copy of the images."""
    total, count = torch.tensor(0.0), 0
    for (_, branches), pixels in zip(examples, images, strict=True):
        for b in branches:
            ids = torch.tensor([b.input_ids])
            given_images = {"pixel_values": pixels} if len(pixels) else {}
            scores = model(input_ids=ids, use_cache=False, **given_images).logits[0, :-1]
            total = total + F.cross_entropy(scores, torch.tensor(b.labels[1:]), reduction="sum", ignore_index=X)
            count += sum(label != X for label in b.labels[1:])
    loss = total / count
    loss.backward()
    return float(loss.detach()), gradients(model)


def trees(model, examples, images, budget, with_layout=False):
    made = [make_tree(branches) for _, branches in examples]
    rows = pack([len(tree) for tree in made], budget)
    laid = [[made[i] for i in row] for row in rows]
    batch = lay_out(laid, pad_token_id=0)
    if with_layout:
        batch["tree_layout"] = tree_layout(laid)
    pixels = torch.cat([images[i] for row in rows for i in row])
    if len(pixels):
        batch["pixel_values"] = pixels
    labels = batch.pop("labels")
    keep = F.pad(labels[:, 1:], (0, 1), value=X) != X
    loss = supervised_loss(model(**batch, logits_to_keep=keep, use_cache=False), labels)
    loss.backward()
    return float(loss.detach()), gradients(model)


def assert_close(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    largest = max(float(g.norm()) for g in wanted[1].values())
    for name, gradient in wanted[1].items():
        scale = max(float(gradient.norm()), 1e-2 * largest)  # some cancel to nothing: all of the row's words alike
        assert float((found[1][name] - gradient).norm()) <= 1e-4 * scale, name


@pytest.mark.few(20)
@pytest.mark.parametrize("attention", ["masked", "tree"])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_trees_equal_one_row_an_answer(decoder, fusion, attention, monkeypatch):
    model, processor = tiny(decoder, fusion)
    if decoder == "gemma3":  # a window as wide as its rows; `run_stage` refuses rows that are longer
        model.model.language_model.config.sliding_window = 256
    model.model.vision_tower.requires_grad_(False)
    tokens = conversations(processor.image_token_id, processor.image_seq_length)
    pictures = [processor.image_processor(image(i), return_tensors="pt")["pixel_values"] for i in range(6)]

    @settings(deadline=None, derandomize=True, max_examples=6, database=None)
    @given(st.lists(tokens, min_size=1, max_size=3), st.sampled_from([1, 60, 400]))
    def check(examples, budget):
        rest = iter(pictures)
        images = [torch.cat([next(rest) for _ in range(n)]) if n else torch.empty(0, 3, 32, 32) for n, _ in examples]
        expected = one_row_each(model, examples, images)
        if attention == "masked":
            found = trees(model, examples, images, budget)
        else:
            with tree_attention(model), monkeypatch.context() as patch:
                patch.setattr("vlm.tree_attention.sdpa_attention_forward", None)  # it must not be called
                found = trees(model, examples, images, budget, with_layout=True)
        assert_close(found, expected)

    check()


@pytest.mark.parametrize("decoder", DECODERS)
def test_padding_makes_no_nan(decoder):
    model, processor = tiny(decoder, "cross_attention")
    short, long = (make_tree([branch([*range(n), 1], [*[X] * n, 1])]) for n in (2, 12))
    batch = lay_out([[short], [long]], pad_token_id=processor.tokenizer.pad_token_id)
    labels = batch.pop("labels")
    output = model(**batch, use_cache=False)
    assert torch.isfinite(output.logits).all()
    supervised_loss(output, labels).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_trees_of_a_row_do_not_see_each_other():
    model, _ = tiny()
    first, second = (make_tree([branch(ids, [X, X, ids[2]])]) for ids in ([1, 2, 3], [4, 5, 6]))
    alone = lay_out([[second]], 0)
    together = lay_out([[first, second]], 0)
    for rows in (alone, together):
        rows.pop("labels")
    with torch.no_grad():
        assert torch.allclose(model(**together).logits[0, 3:], model(**alone).logits[0], atol=1e-5)


def test_a_short_sliding_window_is_why_gemma_is_watched():
    """The reason for the refusal: with a window of 8, a longer row is not the one that generation sees."""
    model, _ = tiny("gemma3")
    ids = list(range(20))
    rows = lay_out([[make_tree([branch(ids, [X, *ids[1:]])])]], 0)
    rows.pop("labels")
    with torch.no_grad():
        tree, plain = model(**rows).logits, model(input_ids=torch.tensor([ids])).logits
    assert torch.allclose(tree[0, :8], plain[0, :8], atol=1e-4)
    assert not torch.allclose(tree[0, 12:], plain[0, 12:], atol=1e-3)
    assert text_config("gemma3").sliding_window == 8


@settings(deadline=None, derandomize=True, max_examples=50)
@given(conversations(image_token=9, image_size=3))
def test_the_paths_of_a_tree_are_the_conversations(made):
    _, branches = made
    found = paths(make_tree(branches))
    assert [path.input_ids for path in found] == [b.input_ids for b in branches]
    assert [path.labels for path in found] == [[X, *b.labels[1:]] for b in branches]
    assert all(path.position_ids == list(range(len(path))) for path in found)
