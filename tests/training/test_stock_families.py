"""Every family of stock models: the loss is its own, a batch answers as each request alone, a follow-up as if all was
read anew, and docs/models.md says what was found.

The runs through the commands are in test_stock_runs.py.
"""

import copy
import re
from pathlib import Path

import pytest
import torch

from tests.data.test_tree_masks import conversation, in_trees
from tests.data.test_trees import assert_close, gradients
from tests.stock import STOCK, stock
from tests.stock_prompted import PROMPTED
from tests.tiny import image
from tests.training.helpers import examples as alike
from tests.training.helpers import trainer_of, weights
from tests.training.test_plain_rows import items_of, why
from vlm.data.conversation import IGNORE, encode_conversation, tokenize_branch
from vlm.data.dataset import TreeCollator, TreeDataset, one_row_an_answer
from vlm.data.example import Example
from vlm.data.prompts import ONE_IMAGE, has_chat_template
from vlm.generation import generate, load
from vlm.session import Session
from vlm.training.inputs import training_inputs
from vlm.training.parts import named_parts
from vlm.training.trainer import supervised_loss

FAMILIES = [*STOCK, *PROMPTED]
TREES = ["llava_next", "llava_onevision", "smolvlm", "idefics2", "idefics3", "gemma3", "internvl", "blip-2"]
TREES += ["instructblip", "paligemma"]
SIZES = [(40, 36), (30, 64), (64, 24)]
"""Of images that take different numbers of tiles, patches or tokens."""


def one_image(processor):
    return type(processor).__name__ in ONE_IMAGE


def examples(processor):
    """Captions and questions about images of different sizes; several images, several turns and none where they can."""
    captions = [("what", "a cat"), ("what", "a cat and a dog on the street"), ("what", "a dog")]
    questions = [("is it ?", "no"), ("where is the cat", "on the street")]
    turns = [("where is it", "on the street"), ("what is in the image ?", "2", "and the dog ?", "no dog")]
    made = [(captions, 1), (questions, 1)]
    if "cross_attention_mask" in processor.model_input_names:
        made += [([turns[1]], 1)]
    elif has_chat_template(processor):
        made += [(turns, 2), ([("0 1", "2 3")], 0)]
    elif not one_image(processor):
        made += [(turns[:1], 2)]
    return [
        Example(
            tuple(image(10 * n + i, SIZES[(n + i) % 3]) for i in range(count)),
            tuple(conversation(*texts, images=count) for texts in branches),
            str(n),
            f"row {n}",
        )
        for n, (branches, count) in enumerate(made)
    ]


def own_loss(model, processor, made):
    """What the model itself says, one conversation at a time."""
    total, count = torch.tensor(0.0), 0
    for example in made:
        for branch in example.branches:
            inputs = dict(encode_conversation(processor, branch.messages, example.images))
            found = tokenize_branch(processor, branch, example.images)
            behind = inputs["input_ids"].shape[1] - len(found.labels)
            labels = torch.tensor([found.labels + [IGNORE] * behind])
            if model.config.model_type == "blip":
                inputs["input_ids"][:, 0] = model.config.text_config.bos_token_id
            supervised = int((labels != IGNORE).sum())
            total = total + model(**inputs, labels=labels, use_cache=False).loss * supervised
            count += supervised
    loss = total / count
    loss.backward()
    return float(loss.detach()), gradients(model)


def plain_loss(model, processor, made):
    rows = TreeDataset(one_row_an_answer(items_of(processor, made)), 200).rows
    batch = TreeCollator(processor, plain=True)(rows)
    labels = batch.pop("labels")
    loss = supervised_loss(model(**training_inputs(model.config, batch, labels)), labels)
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_an_answer_has_the_models_own_loss(name, parity):
    model, processor = stock(name)
    model.requires_grad_(True)
    wanted = own_loss(model, processor, examples(processor))
    assert any(float(grad.abs().max()) for key, grad in wanted[1].items() if "vision" in key or "visual" in key)
    found = plain_loss(model, processor, examples(processor))
    assert_close(found, wanted)
    parity(table()[model.config.model_type]["family"], "loss in training, `pretrained`", abs(found[0] - wanted[0]))


@pytest.mark.few(6)
@pytest.mark.parametrize("name", FAMILIES)
def test_accumulating_equals_a_large_batch(tmp_path, name):
    """8 rows at once, or 4 times 2 with unequal numbers of supervised tokens: the same weights."""
    start, processor = stock(name)
    found = []
    for batch, accumulated in ((8, 1), (2, 4)):
        model = copy.deepcopy(start)
        trainer = trainer_of(
            tmp_path,
            {part: 1e-2 for part, _, _ in named_parts(model)},
            made=(model, processor),
            data=alike(8, 1),
            optim="sgd",
            max_grad_norm=0.0,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
        )
        trainer.data_collator.plain = True
        trainer.train()
        found.append(weights(model))
    assert any(not torch.equal(value, found[0][key]) for key, value in weights(start).items())
    assert max(float((value - found[1][key]).abs().max()) for key, value in found[0].items()) < 1e-6


@pytest.mark.parametrize("name", TREES)
def test_trees_have_the_models_own_loss(name):
    model, processor = stock(name)
    wanted = own_loss(model, processor, examples(processor))
    assert_close(in_trees(model, processor, examples(processor))[0], wanted)


def asked(text, images=1):
    return list(conversation(text, "", images=images).messages[:1])


def requests_of(processor):
    """Prompts of different lengths with images of different sizes, of different numbers where the model takes them."""
    made = [(list(e.images), list(b.messages[:-1])) for e in examples(processor) for b in e.branches]
    if "cross_attention_mask" in processor.model_input_names:
        made += [([image(n) for n in range(count)], asked("what", count)) for count in (0, 2)]
    return made


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_answers_as_each_request_alone(name):
    model, processor = stock(name)
    requests = requests_of(processor)
    alone = [generate(model, processor, [request], max_new_tokens=5)[0] for request in requests]
    assert generate(model, processor, requests, max_new_tokens=5) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_session_answers_as_reading_everything_anew(name):
    model, processor = stock(name)
    picture, question = image(1, (30, 64)), asked("what is in")
    session = Session(model, processor)
    answer = "".join(session.stream(([picture], question), max_new_tokens=6))
    assert answer.strip() == generate(model, processor, [([picture], question)], max_new_tokens=6)[0]
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    further = [*question, said, {"role": "user", "content": [{"type": "text", "text": "and the dog"}]}]
    if not has_chat_template(processor):
        with pytest.raises(ValueError, match=r"has no chat template: its model answers one question"):
            list(session.stream(([picture], further)))
        return
    follow_up, anew = (
        "".join(s.stream(([picture], further), max_new_tokens=6)) for s in (session, Session(model, processor))
    )
    assert follow_up == anew


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    made = stock(name)
    for part in made:
        part.save_pretrained(tmp_path)
    example = examples(made[1])[0]
    scores = []
    for model, processor in (made, load(str(tmp_path), device="cpu", dtype=torch.float32)):
        inputs = encode_conversation(processor, example.branches[0].messages, example.images)
        with torch.no_grad():
            scores.append(model(**inputs).logits)
    assert torch.equal(*scores)


# --- the table


def table():
    """The rows of docs/models.md, by model type: what each column says."""
    text = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head, _, *lines = rows
    return {re.sub("`", "", line[1]): dict(zip(head, line, strict=True)) for line in lines}


def test_the_table_has_every_family():
    assert {*table()} == {stock(name)[0].config.model_type for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_says_what_is_found(name):
    model, processor = stock(name)
    row = table()[model.config.model_type]
    assert row["asked by"] == ("chat template" if has_chat_template(processor) else "prompt")
    assert row["images"] == ("one" if one_image(processor) else "any")
    assert row["in training"] == ("plain rows" if why(model, processor, alike(4)) else "trees")
    session = Session(model, processor)
    list(session.stream(([image(0)], asked("what")), max_new_tokens=3))
    further = {True: "goes on", False: "reads anew"}[bool(session._ids)] if has_chat_template(processor) else "none"
    assert row["follow-up question"] == further
