"""No text of a user becomes a special token, in any tokenizer, chat template or path to a model.

The reference is the same conversation with a harmless text: it has as many of each special token.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import CLIPConfig

from tests.dual_encoders import text_sizes
from tests.dual_encoders import tokenizer as text_tokenizer
from tests.fuzz.cases import parts, run, told
from tests.stock import stock
from tests.tiny import image, tiny
from vlm import dual_encoder
from vlm.data.conversation import tokenize_branch
from vlm.data.example import question_and_answer
from vlm.errors import UserError
from vlm.generation import tokenize

PIECES = ("a cat", " ", "\n", "?", "é", "🙂", "<", ">", "|", "<|", "|>", "</", "<image", "user", "assistant", "im_end")


def special_tokens(tokenizer: Any) -> dict[str, int]:
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


def text_of(draw: random.Random, specials: Sequence[str]) -> str:
    """Words with special tokens, whole, cut, or one inside another."""
    made = ""
    for _ in range(draw.randrange(1, 6)):
        token, other = draw.choice(specials), draw.choice(specials)
        cut = draw.randrange(len(token) + 1)
        made += draw.choice((token, token[:cut], token[cut:], token[:cut] + other + token[cut:], draw.choice(PIECES)))
    return made


def check(name: str, numbers: range, tokenizer: Any, paths: Sequence[Callable[[str], list[int]]]) -> None:
    specials = special_tokens(tokenizer)
    numbers_of = set(specials.values())

    def count(path: Callable[[str], list[int]], text: str) -> Counter:
        return Counter(number for number in path(text) if number in numbers_of)

    expected = [count(path, "a cat") for path in paths]
    assert any(expected)

    def case(draw: random.Random) -> int:
        text, taken = text_of(draw, list(specials)), 0
        with told(text):
            for path, wanted in zip(paths, expected, strict=True):
                try:
                    found = count(path, text)
                except (UserError, ValueError) as error:
                    refused = str(error)
                    assert_refusal(refused)
                    continue
                assert found == wanted
                taken += 1
        return taken

    run(f"special {name}", numbers, case)


def assert_refusal(said: str) -> None:
    """Some processors of transformers cannot take a token for text; that is said."""
    assert "token" in said


def paths_of(processor: Any) -> list[Callable[[str], list[int]]]:
    """A question and an answer in training, and a question to answer, with pixels as the processor wants them."""
    pixels = not getattr(processor, "fixed_image_tokens", False)
    shown = [image(0)]

    def asked(text: str) -> list[int]:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return tokenize(processor, [(shown, [{"role": "user", "content": content}])], pixels=pixels)["input_ids"][
            0
        ].tolist()

    def trained(text: str, answer: str) -> list[int]:
        sizes = [(32, 32)]
        branch = question_and_answer(text, answer)
        return tokenize_branch(processor, branch, shown if pixels else None, [] if pixels else sizes).input_ids

    return [asked, lambda text: trained(text, "yes"), lambda text: trained("what?", text)]


OURS: dict[str, dict[str, Any]] = {
    "llama": {},
    "looks": {"decoder": "gpt2", "fusion": "cross_attention"},
    "tiles": {"tiling": {"type": "tiles", "max_tiles": 2}},
    "paligemma": {"chat_template": "paligemma", "image_attention": "prefix_lm"},
    "markers": {"image_markers": ["<img>", "</img>"]},
}
STOCK = ("llava", "idefics3", "gemma3", "qwen2_vl")


@pytest.mark.parametrize("name", OURS)
@parts(fast=8, slow=500)
def test_our_models(numbers: range, name: str) -> None:
    _, processor = tiny(**OURS[name])
    check(name, numbers, processor.tokenizer, paths_of(processor))


@pytest.mark.parametrize("name", STOCK)
@parts(fast=2, slow=150)
def test_models_of_transformers(numbers: range, name: str) -> None:
    _, processor = stock(name)
    check(name, numbers, processor.tokenizer, paths_of(processor))


@parts(fast=500, slow=2_000)
def test_texts_of_dual_encoders(numbers: range) -> None:
    tokenizer, config = text_tokenizer(), CLIPConfig(text_config=text_sizes())
    check("dual", numbers, tokenizer, [lambda text: padded(dual_encoder.tokenize(tokenizer, config, [text]))])


def padded(inputs: Any) -> list[int]:
    """The ids without padding."""
    return inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
