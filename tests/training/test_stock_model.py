"""A vision-language model of transformers, fine-tuned by the same recipe as ours."""

import json

import pytest
import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tests.tiny import byte_level_tokenizer, clip_config, image_processor, text_config
from tests.training.helpers import TRAIN, recipe_values, rows_of, save_images, train
from tests.training.helpers import examples as some_examples
from vlm import generation
from vlm.data.conversation import IGNORE

# As LLaVA's own: the content is a list of parts.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    config = LlavaConfig(
        vision_config=clip_config(),
        text_config=text_config(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    processor = LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    folder = tmp_path_factory.mktemp("llava")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, processor


def test_labels(llava):
    _, processor = llava
    items = [item for row in rows_of(processor, some_examples(2)).rows for item in row]
    learned = {processor.tokenizer.decode([t for t in item.tree.labels if t != IGNORE]) for item in items}
    assert learned == {"a cat<|im_end|>a dog and a cat on the street<|im_end|>", "2<|im_end|>no<|im_end|>"}
    assert all(item.tree.input_ids.count(processor.image_token_id) == 16 for item in items)


@pytest.mark.few(1)
@pytest.mark.parametrize("lora", [False, True])
def test_it_trains(llava, tmp_path, monkeypatch, lora):
    monkeypatch.setenv("VLM_HOME", str(tmp_path / "home"))
    folder, _ = llava
    images = save_images(tmp_path / "images", broken=1)
    values = recipe_values(folder, images, tmp_path / "run") | {"model": {"pretrained": str(folder)}}
    values["train"] = TRAIN | {"max_steps": 6}
    if not lora:
        values["lora"] = None
    train(values)
    entries = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert all(0 < loss < 20 for loss in losses)
    assert losses[-1] < losses[0]
    before, after = (generation.load(str(path), device="cpu")[0] for path in (folder, tmp_path / "run"))
    moved = {
        name
        for (name, p), (_, q) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert any("multi_modal_projector" in name for name in moved)
    assert any("language_model" in name for name in moved) == lora
    assert not any("vision_tower" in name for name in moved)
    summary = json.loads((tmp_path / "run/evaluation/summary.json").read_text())
    assert summary["n_images"] == 3
