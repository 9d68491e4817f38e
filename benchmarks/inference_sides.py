"""The sides of a comparison of inference: evaluating several questions an image, and the second question of a chat."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import workload
from benchmarks.workload import Shape
from vlm import generation
from vlm.data.conversation import with_images
from vlm.data.images import open_image
from vlm.session import Session

NEW_TOKENS = 8  # of every answer, so that both sides write equally much
NO_END = {"eos_token_id": -1}


def in_precision(model: Any, bf16: bool) -> Any:
    return model.to(torch.bfloat16 if bf16 else torch.float32)


class OurEvaluation:
    """All questions of the images by `vlm.generation.generate`, as the evaluation runner asks them."""

    def __init__(self, shape: Shape, bf16: bool) -> None:
        self.shape = shape
        model, self.processor = workload.ours()
        self.model = in_precision(model, bf16)

    def run(self, number: int) -> dict[str, Any]:
        start = time.perf_counter()
        requests = []
        for example in self.shape.examples(number):
            images = [open_image(image) for image in example.images]
            requests += [(images, list(branch.messages[:-1])) for branch in example.branches]
        answers = generation.generate(self.model, self.processor, requests, max_new_tokens=NEW_TOKENS, **NO_END)
        return {"seconds": time.perf_counter() - start, "answers": answers}


class StockEvaluation:
    """The same questions by `generate` of the stock model, each with its image, `batch_size` at a time."""

    def __init__(self, shape: Shape, bf16: bool, *, batch_size: int) -> None:
        self.shape, self.batch_size = shape, batch_size
        model, self.processor = workload.stock()
        self.model = in_precision(model, bf16)

    @torch.no_grad()
    def run(self, number: int) -> dict[str, Any]:
        start = time.perf_counter()
        asked = [
            with_images(branch.messages[:-1], [open_image(example.images[0])])
            for example in self.shape.examples(number)
            for branch in example.branches
        ]
        answers = []
        for first in range(0, len(asked), self.batch_size):
            inputs = _prepared(self.processor, asked[first : first + self.batch_size], self.model.dtype)
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, **NO_END)
            answers += self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return {"seconds": time.perf_counter() - start, "answers": [answer.strip() for answer in answers]}


def _prepared(processor: Any, conversations: list[Any], dtype: torch.dtype) -> Any:
    processor.tokenizer.padding_side = "left"
    inputs = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )
    return inputs.to(dtype)


class OurChat:
    """Seconds from the second question about an image to the first token of its answer, in a `Session`."""

    def __init__(self, shape: Shape, bf16: bool) -> None:
        self.shape = shape
        model, self.processor = workload.ours()
        self.model = in_precision(model, bf16)

    def run(self, number: int) -> dict[str, Any]:
        session = Session(self.model, self.processor)

        def answer(images: list[Any], messages: list[Any], tokens: int) -> str:
            return "".join(session.stream((images, messages), max_new_tokens=tokens, **NO_END))

        return second_question(self.shape, number, answer)


class StockChat:
    """The same by `generate` of the stock model, which reads the whole conversation."""

    def __init__(self, shape: Shape, bf16: bool) -> None:
        self.shape = shape
        model, self.processor = workload.stock()
        self.model = in_precision(model, bf16)

    def run(self, number: int) -> dict[str, Any]:
        @torch.no_grad()
        def answer(images: list[Any], messages: list[Any], tokens: int) -> str:
            inputs = _prepared(self.processor, [with_images(messages, images)], self.model.dtype)
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=tokens, **NO_END)
            new = output[0, inputs["input_ids"].shape[1] :]
            return self.processor.decode(new, skip_special_tokens=True)

        return second_question(self.shape, number, answer)


def second_question(shape: Shape, number: int, answer: Callable[[list[Any], list[Any], int], str]) -> dict[str, Any]:
    """Ask two questions about each image. The first token of the second answer is timed; `answer` gets the images, the
    messages and how many tokens to write."""
    seconds, answers = 0.0, []
    for example in shape.examples(number):
        images = [open_image(image) for image in example.images]
        first, second = example.branches[:2]
        messages = list(first.messages[:-1])
        said = answer(images, messages, NEW_TOKENS)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
        question = [part for part in second.messages[0]["content"] if part["type"] == "text"]
        messages.append({"role": "user", "content": question})
        start = time.perf_counter()
        answers.append(said + answer(images, messages, 1))
        seconds += time.perf_counter() - start
    return {"seconds": seconds, "answers": answers}
