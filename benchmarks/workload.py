"""What both sides of a comparison work on: the same weights, images, words and number of supervised tokens.

The weights are those of the quickstart, CLIP ViT-B/16 and SmolLM2-135M, joined by an untrained two-layer projector as
in LLaVA-1.5: 196 visual tokens an image. `ours` and `stock` hold the same numbers, so that their losses must agree.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from vlm.build import build
from vlm.data.example import Branch, Example, question_and_answer
from vlm.data.readers import read
from vlm.modeling import VLMForConditionalGeneration
from vlm.processing import VLMProcessor
from vlm.recipe_paths import home

LANGUAGES = ("de", "fr", "es", "it", "pt", "nl", "sv", "da", "pl", "fi", "nb", "ca", "gl", "hu", "cs")
FEATURE_LAYER = -2  # LLaVA's
CHAT_TEMPLATE = (  # ChatML without the line break behind the last turn, so that both sides supervise the same tokens
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>' }}{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def ours() -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """Our model and its processor, in float32."""
    torch.manual_seed(0)
    model, processor = build(
        str(home() / "clip-vit-base-patch16"),
        str(home() / "SmolLM2-135M-Instruct"),
        projector="mlp",
        vision_feature_layer=FEATURE_LAYER,
    )
    processor.chat_template = CHAT_TEMPLATE
    return model.eval(), processor


def stock() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """transformers' own LLaVA with the numbers of `ours`."""
    model, processor = ours()
    config = LlavaConfig(
        vision_config=model.config.vision_config,
        text_config=model.config.text_config,
        image_token_index=model.config.image_token_id,
        image_seq_length=model.config.image_seq_length,
        vision_feature_layer=FEATURE_LAYER,
        tie_word_embeddings=True,
    )
    llava = LlavaForConditionalGeneration(config)
    pairs = (
        (llava.model.vision_tower, model.model.vision_tower),
        (llava.model.language_model, model.model.language_model),
    )
    for theirs, mine in pairs:
        theirs.load_state_dict(mine.state_dict())
    for name in ("linear_1", "linear_2"):
        layer = getattr(model.model.multi_modal_projector, name)
        getattr(llava.model.multi_modal_projector, name).load_state_dict(layer.state_dict())
    llava.tie_weights()
    llava.generation_config = model.generation_config
    return llava.eval(), LlavaProcessor(
        processor.image_processor,
        processor.tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def captions(images: int, answers: int, start: int = 0) -> list[Example]:
    """`images` stamps from the `start`-th on with `answers` captions each, all of them asked for in the same words."""
    root = home() / "tuxpaint-stamps"
    rows = [json.loads(line) for line in (root / "translations.jsonl").read_text(encoding="utf-8").splitlines()]
    found = []
    for row in rows:
        texts = dict.fromkeys([row["captions"]["en"], *(row["captions"].get(code, "") for code in LANGUAGES)])
        texts.pop("", None)
        if len(texts) >= answers:
            branches = [question_and_answer("Describe the image.", text) for text in [*texts][:answers]]
            where = row["file_name"]
            found.append(Example((str(root / where),), tuple(branches), image_id=where, where=where))
    return _slice(found, images, start)


def questions(images: int, answers: int, start: int = 0) -> list[Example]:
    """`images` images of easy-VQA with their first `answers` questions each."""
    root = home() / "easy-vqa"
    source = {
        "format": "vqav2",
        "questions": str(root / "train_questions.json"),
        "annotations": str(root / "train_annotations.json"),
        "images": str(root / "train"),
        "image_pattern": "{image_id}.png",
        "limit": 4 * (start + images),
    }
    enough = [e for e in read(source, base_dir=Path()).examples if len(e.branches) >= answers]
    found = [replace(example, branches=example.branches[:answers]) for example in enough]
    return _slice(found, images, start)


WORKLOADS = {"captions": captions, "questions": questions}


def _slice(found: list[Example], images: int, start: int) -> list[Example]:
    if len(found) < start + images:
        raise ValueError(f"only {len(found)} images have as many answers, and {start + images} are wanted")
    return found[start : start + images]


def as_turns(example: Example) -> Example:
    """The answers about an image as turns of one conversation, which shows the image once."""
    messages = list(example.branches[0].messages)
    for branch in example.branches[1:]:
        question, *answers = branch.messages
        parts = [part for part in question["content"] if part["type"] != "image"]
        messages += [{**question, "content": parts}, *answers]
    return replace(example, branches=(Branch(tuple(messages)),))


@dataclass
class Shape:
    """How much is worked on at once: `images` with `answers` each, of one of `WORKLOADS`."""

    workload: str
    images: int
    answers: int

    def examples(self, number: int = 0) -> list[Example]:
        """The examples of the repeat `number`; those of different repeats do not share images."""
        return WORKLOADS[self.workload](self.images, self.answers, number * self.images)


def alone(examples: Sequence[Example]) -> list[tuple[Any, Branch]]:
    """One row an answer: each with its image."""
    return [(example.images[0], branch) for example in examples for branch in example.branches]
