"""The model's own rule of who sees whom, carried over to trees: stock vision-language models, and sliding windows.

The reference is always the model left alone with one conversation at a time, prepared by its own processor.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PaliGemmaConfig
from transformers import PaliGemmaForConditionalGeneration as PaliGemma

from tests.data.test_trees import assert_close, gradients
from tests.stock import SIGLIP, stock
from tests.tiny import image, text_config, tiny
from vlm.data.conversation import TokenizedBranch, encode_conversation, tokenize_branch
from vlm.data.dataset import TreeCollator, TreeDataset, make_items
from vlm.data.example import Branch, Example
from vlm.data.tree_masks import NotATree, TreeMasks
from vlm.data.trees import lay_out, make_tree, paths
from vlm.training.trainer import supervised_loss
from vlm.tree_attention import tree_attention

X = -100


def conversation(*texts, images=1):
    """User, assistant, user ...: images before the first question, and one more between its words."""
    messages = [
        {"role": "assistant" if n % 2 else "user", "content": [{"type": "text", "text": text}]}
        for n, text in enumerate(texts)
    ]
    messages[0]["content"] = [*[{"type": "image"}] * images, *messages[0]["content"]]
    return Branch(tuple(messages), where="row")


def examples():
    """Several images and none, several turns, answers that begin alike, one answer alone."""
    captions = [("what", "a cat"), ("what", "a cat and a dog on the street"), ("what", "a dog")]
    turns = [("where is it", "on the street"), ("what is in the image ?", "2", "and the dog ?", "no dog")]
    made = [(captions, 1), (turns, 2), ([("is it ?", "no")], 1), ([("0 1", "2 3"), ("0 1 2", "3")], 0)]
    return [
        Example(
            tuple(image(10 * n + i) for i in range(count)),
            tuple(conversation(*texts, images=count) for texts in branches),
            str(n),
            f"row {n}",
        )
        for n, (branches, count) in enumerate(made)
    ]


def one_conversation_at_a_time(model, processor, made):
    """Loss and gradients of the textbook way: what the processor makes of each conversation, and of ours the labels."""
    total, count = torch.tensor(0.0), 0
    for example in made:
        for branch in example.branches:
            found = tokenize_branch(processor, branch, example.images)
            inputs = encode_conversation(processor, branch.messages, example.images)
            assert inputs["input_ids"][0, : len(found.input_ids)].tolist() == found.input_ids
            scores = model(**inputs, use_cache=False).logits[0]
            labels = torch.tensor(found.labels[1:])
            total = total + F.cross_entropy(scores[: len(labels)], labels, reduction="sum", ignore_index=X)
            count += int((labels != X).sum())
    loss = total / count
    loss.backward()
    return float(loss.detach()), gradients(model)


def in_trees(model, processor, made, budget=400):
    items, _ = make_items(
        made, processor, max_length=1000, too_long="error", report=print, progress=lambda steps, total: steps
    )
    rows = TreeDataset(items, budget).rows
    batch = TreeCollator(processor, masks=TreeMasks(model))(rows)
    labels = batch.pop("labels")
    keep = F.pad(labels[:, 1:], (0, 1), value=X) != X
    with tree_attention(model):
        loss = supervised_loss(model(**batch, logits_to_keep=keep, use_cache=False), labels)
    loss.backward()
    return (float(loss.detach()), gradients(model)), batch


@pytest.mark.parametrize("budget", [1, 400])
@pytest.mark.parametrize("name", ["llava", "idefics3", "smolvlm", "gemma3"])
def test_stock_models_take_trees(name, budget):
    model, processor = stock(name)
    wanted = one_conversation_at_a_time(model, processor, examples())
    found, batch = in_trees(model, processor, examples(), budget)
    assert_close(found, wanted)
    own = {"llava": {"tree_layout"}, "gemma3": {"token_type_ids"}}.get(name, {"tree_layout", "pixel_attention_mask"})
    assert set(batch) == {"input_ids", "position_ids", "attention_mask", "pixel_values"} | own
    assert any("vision" in key for key in found[1]), "gradients reach the encoder"


def test_gemma_3_needs_both_parts_of_its_rule():
    """Without the block of an image, or without the window, the loss is another: the test above says something."""
    model, processor = stock("gemma3")
    wanted, _ = one_conversation_at_a_time(model, processor, examples())
    _, batch = in_trees(model, processor, examples())
    items, _ = make_items(
        examples(), processor, max_length=1000, too_long="error", report=print, progress=lambda steps, total: steps
    )
    causal = lay_out([[item.tree for item in row] for row in TreeDataset(items, 400).rows], 0)
    labels = causal["labels"]
    masks = batch["attention_mask"]
    both_ways = masks["full_attention"]
    assert (both_ways & ~causal["attention_mask"]).any()
    assert (both_ways & ~masks["sliding_attention"]).any()
    with torch.no_grad():
        for mask in (causal["attention_mask"], both_ways):
            loss = supervised_loss(model(**{**batch, "attention_mask": mask}, use_cache=False), labels)
            assert float(loss) != pytest.approx(wanted, rel=1e-4)


def test_paths_of_one_length_have_the_masks_of_their_own_images():
    """An image of four tokens early in the one conversation, late in the other, and none in the third."""
    model, _ = stock("gemma3")
    trees = []
    for start in (1, 4, 10):
        types = [int(start <= place < start + 4) for place in range(10)]
        branch = TokenizedBranch(list(range(10)), [X] * 9 + [9], {"token_type_ids": types})
        trees.append(make_tree([branch]))
    seen = TreeMasks(model)([[tree] for tree in trees], lay_out([[tree] for tree in trees], 0)["attention_mask"])
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    for mask, start in zip(seen["attention_mask"][:, 0], (1, 4, 10), strict=True):
        wanted = causal.clone()
        wanted[start : start + 4, start : start + 4] = True
        assert torch.equal(mask, wanted)


# --- sliding windows


@pytest.mark.parametrize(
    ("name", "attention", "fusion"),
    [
        ("gemma3", "sdpa", "prefix"),
        ("gemma3", "eager", "cross_attention"),
        ("gemma3", "sdpa", "prefix+cross_attention"),
        ("gemma2", "eager", "prefix"),
        ("mistral", "sdpa", "prefix"),
        ("mistral", "eager", "prefix"),
    ],
)
def test_windows_shorter_than_a_conversation(name, attention, fusion):
    model, processor = tiny(fusion=fusion, text=text_config(name, 2, sliding_window=8))
    model.model.language_model.set_attn_implementation(attention)
    assert_close(in_trees(model, processor, examples())[0], one_conversation_at_a_time(model, processor, examples()))


def test_cross_attention_cannot_tell_its_image_by_a_window():
    model, processor = tiny(fusion="cross_attention", text=text_config("mistral", 2, sliding_window=8))
    with pytest.raises(NotATree, match="each of its layers has a sliding window"):
        in_trees(model, processor, examples())
    model, processor = tiny(fusion="cross_attention", text=text_config("mistral", 2, sliding_window=200))
    assert_close(in_trees(model, processor, examples())[0], one_conversation_at_a_time(model, processor, examples()))


def test_the_window_of_a_branch_by_hand():
    """A window of 3 goes by positions: the second branch sees the trunk's end, not the first branch."""
    model = AutoModelForCausalLM.from_config(text_config("mistral", 2, sliding_window=3))
    tree = make_tree(
        [TokenizedBranch([1, 2, 3, 4, 5], [X, X, X, 4, 5]), TokenizedBranch([1, 2, 3, 6, 7], [X, X, X, 6, 7])]
    )  # 1 2 | 3 4 5 | 3 6 7
    causal = lay_out([[tree]], 0)["attention_mask"]
    seen = [
        "1.......",
        "11......",
        "111.....",
        ".111....",
        "..111...",
        "11...1..",
        ".1...11.",
        ".....111",
    ]
    made = TreeMasks(model)([[tree]], causal)
    assert list(made) == ["attention_mask"]
    assert made["attention_mask"][0, 0].tolist() == [[c == "1" for c in line] for line in seen]


def test_a_window_as_wide_as_the_conversations_changes_nothing():
    model, processor = tiny("gemma3")
    model.model.language_model.config.sliding_window = 256
    _, batch = in_trees(model, processor, examples())
    assert "tree_layout" in batch
    assert torch.is_tensor(batch["attention_mask"])


# --- a prefix that sees ahead


def paligemma():
    torch.manual_seed(0)
    text = text_config("llama", 2).to_dict() | {"model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1}
    config = PaliGemmaConfig(
        vision_config=SIGLIP | {"vision_use_head": False, "model_type": "siglip_vision_model", "projection_dim": 32},
        text_config={k: v for k, v in text.items() if k not in ("architectures", "rope_parameters")},
        image_token_index=9,
        projection_dim=32,
    )
    return PaliGemma(config).eval()


def prefixed(prompt, answer):
    """An image of 16 tokens and a prompt, which see each other, then an answer."""
    ids = [9] * 16 + prompt + answer
    prefix = 16 + len(prompt)
    labels = [X] * prefix + answer
    return TokenizedBranch(ids, labels, {"token_type_ids": [0] * prefix + [1] * len(answer)})


def test_paligemma_has_no_tree_of_several_prompts():
    """Its image sees the prompt, so that a trunk would see each."""
    model = paligemma()
    tree = make_tree([prefixed([1, 2], [4, 5]), prefixed([1, 3], [4, 6])])
    with pytest.raises(NotATree, match="what the answers about an image share would see what they do not share"):
        TreeMasks(model)([[tree]], lay_out([[tree]], 0)["attention_mask"])


def test_a_trunk_sees_the_end_of_its_prompt_once():
    model = paligemma()
    tree = make_tree([TokenizedBranch([9, 1, 2, n], [X, X, X, n], {"token_type_ids": [0, 0, 0, 1]}) for n in (4, 5, 6)])
    mask = TreeMasks(model)([[tree]], lay_out([[tree]], 0)["attention_mask"])["attention_mask"]
    seen = [
        "111.....",
        "111.....",
        "111.....",
        "1111....",
        "11..1...",
        "11..11..",
        "11....1.",
        "11....11",
    ]  # 9 1 | 2 4 | 2 5 | 2 6
    assert ["".join("1" if c else "." for c in line) for line in mask[0, 0].tolist()] == seen


@pytest.mark.parametrize("shared", [False, True])
def test_paligemma_answers_share_rows_and_those_with_one_prompt_a_tree(shared):
    model = paligemma()
    branches = [prefixed([1, 2], [4, 5]), prefixed([1, 2] if shared else [3], [6, 7, 8])]
    pixels = torch.randn(1, 3, 32, 32).repeat(2, 1, 1, 1) if shared else torch.randn(2, 3, 32, 32)
    trees = [make_tree(branches)] if shared else [make_tree([branch]) for branch in branches]
    batch = lay_out([trees], 0)
    batch |= TreeMasks(model)([trees], batch["attention_mask"])
    labels = batch.pop("labels")
    with torch.no_grad():
        found = supervised_loss(model(**batch, pixel_values=pixels[: len(trees)]), labels)
        total = torch.tensor(0.0)
        for branch, own in zip(branches, pixels, strict=True):
            types = torch.tensor([branch.token_types["token_type_ids"]])
            scores = model(torch.tensor([branch.input_ids]), own[None], token_type_ids=types).logits[0, :-1]
            total += F.cross_entropy(scores, torch.tensor(branch.labels[1:]), reduction="sum", ignore_index=X)
    assert float(found) == pytest.approx(float(total) / 5, rel=1e-5)


def test_token_types_follow_their_tokens():
    branches = [prefixed([1, 2], [4, 5]), prefixed([1, 3], [6])]
    tree = make_tree(branches)
    assert [path.token_types for path in paths(tree)] == [branch.token_types for branch in branches]
    laid = lay_out([[tree], [make_tree(branches[1:])]], 0)["token_type_ids"]
    assert laid.shape == (2, len(tree))
    assert laid[0].tolist() == tree.token_types["token_type_ids"]
