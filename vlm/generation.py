"""Loading a model, and answers from it: many at once, or one as it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

import vlm  # noqa: F401 - registers our classes with the Auto classes
from vlm.data.conversation import template_options, with_images
from vlm.data.example import Message
from vlm.errors import UserError
from vlm.loading import no_loading_bar
from vlm.precision import default_device

Request = tuple[list[Image.Image], list[Message]]
"""Images, and messages that end with the user's. Image parts take the images in order."""


def checkpoint_of(name_or_path: str) -> str:
    """The checkpoint inside a run folder; any other folder or Hub name as it is. Raises UserError for a run folder
    without one."""
    folder = Path(name_or_path).expanduser()
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is a run without a finished model: its training did not end. Resume it with --resume."
        )
    return str(folder) if folder.exists() else name_or_path


def load(
    name_or_path: str, *, device: str | None = None, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Model, in evaluation mode, and processor of a run folder, a checkpoint folder or a Hub name."""
    source = checkpoint_of(name_or_path)
    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
        with no_loading_bar():
            model = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name_or_path!r} as a run, a checkpoint folder or a Hub name: {error}") from None
    return model.to(device or default_device()).eval(), processor  # type: ignore[arg-type]  # a string is a device


@torch.no_grad()
def encode_requests(model: Any, processor: Any, requests: Sequence[Request]) -> Any:
    """Requests as one left-padded batch of model inputs.

    Our own model encodes an image once, however many requests of the batch show it (by identity).
    """
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    shared = hasattr(model, "get_vision_features") and getattr(processor, "fixed_image_tokens", False)
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True}
    inputs = processor.apply_chat_template(
        [messages if shared else with_images(messages, images) for images, messages in requests],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        **template_options(processor, *(messages for _, messages in requests)),
        processor_kwargs={**options, "pixels": False} if shared else options,
    ).to(model.device)
    images = [image for row, _ in requests for image in row]
    if shared and images:
        distinct = {id(image): image for image in images}
        order = {key: position for position, key in enumerate(distinct)}
        pixels = processor.image_processor(list(distinct.values()), return_tensors="pt")["pixel_values"]
        features, inputs["vision_grid"] = model.get_vision_features(pixels.to(model.device))
        inputs["vision_features"] = features[[order[id(image)] for image in images]]
    return inputs


@torch.no_grad()
def share_trunk(model: Any, inputs: Any, requests: Sequence[Request]) -> Any:
    """The batch `inputs` of [`encode_requests`] with what its rows begin with in common in a cache: the images, and the
    first words of the prompts. Each set of images goes through the language model once, however many questions there
    are about it.

    Left as they are: rows whose images all differ, which would gain nothing, or whose texts differ before the last
    image, and models that cannot [share][`_can_share`].
    """
    keys = [tuple(id(image) for image in images) for images, _ in requests]
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    if len(first) == len(keys) or not _can_share(model):
        return inputs
    rows = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    shortest = min(map(len, rows))
    heads = torch.stack([ids[:shortest] for ids in rows])
    length = min(int((heads == heads[0]).all(dim=0).cumprod(dim=0).sum()), shortest - 1)  # one is left to predict from
    if not length or any((ids[length:] == model.config.image_token_id).any() for ids in rows):
        return inputs
    trunk, images = heads[0, :length], {}
    if "vision_features" in inputs:
        features = inputs["vision_features"].split([len(key) for key in keys])
        images["vision_features"] = torch.cat([features[row] for row in first.values()])
        images["vision_grid"] = inputs["vision_grid"]
    cache = model(input_ids=trunk.expand(len(first), -1), use_cache=True, logits_to_keep=1, **images).cache
    order = {key: position for position, key in enumerate(first)}
    cache.batch_select_indices(torch.tensor([order[key] for key in keys], device=trunk.device))
    rest = [ids[length:] for ids in rows]
    padding = model.generation_config.pad_token_id or 0
    ids = pad_sequence(rest, batch_first=True, padding_value=padding, padding_side="left")
    mask = pad_sequence([torch.ones_like(r) for r in rest], batch_first=True, padding_side="left")
    shared = trunk.expand(len(rows), -1)
    return {
        "input_ids": torch.cat([shared, ids], dim=1),
        "attention_mask": torch.cat([torch.ones_like(shared), mask], dim=1),
        "cache": cache,
    }


def _can_share(model: Any) -> bool:
    """Our own models can, but with cross-attention, whose images are not in the cache, and with a sliding window, which
    would count the padding between what is shared and the rest."""
    ours = hasattr(model, "get_vision_features")
    return ours and not model.config.uses_cross_attention and sliding_window(model) is None


def _one_continuation(model: Any, options: dict[str, Any]) -> bool:
    """Whether each row is continued once; beams and several samples would need the cache several times."""
    names = ("num_beams", "num_return_sequences")
    return all((options.get(name) or getattr(model.generation_config, name, None) or 1) == 1 for name in names)


def sliding_window(model: Any) -> int | None:
    """How many tokens some layers of the language model look back at the most; None if all look back to the start."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    return getattr(config, "sliding_window", None) if "sliding_attention" in layers else None


@torch.no_grad()
def generate(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
    **generate_kwargs: Any,
) -> list[str]:
    """The answer to each request, greedy unless `generate_kwargs` say otherwise.

    `progress` is called with the number of answers of each batch that is done.
    """
    options = {"do_sample": False, **generate_kwargs, "max_new_tokens": max_new_tokens}
    answers: list[str] = []
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        inputs = encode_requests(model, processor, batch)
        if _one_continuation(model, options):
            inputs = share_trunk(model, inputs, batch)
        output = model.generate(**inputs, **options)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        if progress:
            progress(len(batch))
    return answers


class _When(StoppingCriteria):
    """Stops every row once `event` is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def stream(
    model: Any, processor: Any, request: Request, *, max_new_tokens: int = 256, **generate_kwargs: Any
) -> Iterator[str]:
    """The answer to one request, piece by piece as it is written."""
    inputs = encode_requests(model, processor, [request])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"do_sample": False, **generate_kwargs, "max_new_tokens": max_new_tokens, "streamer": streamer}
    failure: list[BaseException] = []
    stop = Event()
    options["stopping_criteria"] = StoppingCriteriaList([_When(stop)])

    def work() -> None:
        try:
            model.generate(**inputs, **options)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:  # also when nobody reads on: a closed chat must not go on generating
        stop.set()
        thread.join()
    if failure:
        raise failure[0]
