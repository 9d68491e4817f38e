"""Processors as they are saved: a batch of prompts of different lengths is answered as each prompt alone."""

import pytest
import torch
from transformers import AutoProcessor

import vlm  # noqa: F401 - registers the Auto classes
from tests.counterparts import EXPRESSIBLE
from tests.stock import STOCK, stock
from tests.stock_prompted import PROMPTED
from tests.tiny import FUSIONS, image, metaspace_tokenizer, tiny, user
from vlm import export
from vlm.data.prompts import PROMPTS, has_chat_template
from vlm.interop import to_stock
from vlm.training.folder import save_model

QUESTIONS = ["what is it?", "is the cat on the street with a dog and a cat ?"]


def prepared(processor, numbers):
    """The questions with these `numbers`, each with an image, as one batch, by nothing but the processor."""
    options = {"return_tensors": "pt", "padding": True}
    if has_chat_template(processor):
        return processor.apply_chat_template(
            [[user(image(n), QUESTIONS[n])] for n in numbers],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            processor_kwargs=options,
        )
    rows = [PROMPTS[type(processor).__name__](processor, [image(n)], QUESTIONS[n]) for n in numbers]
    texts = [row["text"][0] if isinstance(row["text"], list) else row["text"] for row in rows]
    beside = {"images": [image(n) for n in numbers]} if "images" in rows[0] else {}
    made = processor(text=texts, **beside, **options)
    made.pop("labels", None)
    return made


def assert_batch_equals_single(model, processor):
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    alone = [model.generate(**prepared(processor, [n]), **options) for n in (0, 1)]
    both = model.generate(**prepared(processor, [0, 1]), **options)
    first, second = (torch.cat(made.logits) for made in alone)
    assert torch.allclose(torch.stack(both.logits), torch.stack([first, second], dim=1), atol=1e-4)
    assert not torch.allclose(first, second, atol=1e-2)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", [*STOCK, *PROMPTED])
def test_of_a_transformers_model_that_was_trained(name, tmp_path):
    model, processor = stock(name)
    processor.tokenizer.padding_side = "right"
    save_model(model, processor, tmp_path / "model")
    assert_batch_equals_single(model, AutoProcessor.from_pretrained(tmp_path / "model"))


@pytest.mark.few(1)
@pytest.mark.parametrize("tokenizer", [None, metaspace_tokenizer], ids=["byte_level", "metaspace"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_of_a_new_model(fusion, tokenizer, tmp_path):
    model, processor = tiny(fusion=fusion, tokenizer=tokenizer and tokenizer())
    processor.save_pretrained(tmp_path)
    assert_batch_equals_single(model, AutoProcessor.from_pretrained(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_of_an_exported_model(name, tmp_path):
    model, processor = to_stock(*EXPRESSIBLE[name](), name.partition(",")[0])
    export.save(model, processor, tmp_path / "out")
    assert_batch_equals_single(model, AutoProcessor.from_pretrained(tmp_path / "out"))
