"""Loading a model, and answers from it, many at once. For a conversation see `vlm.session`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

import vlm  # noqa: F401 - registers our classes with the Auto classes
from vlm.batches import MAX_BATCH_TOKENS, batches_of
from vlm.chat_templates import naming_template
from vlm.data.conversation import OWN_TOKEN, template_options, with_images
from vlm.data.example import Message
from vlm.data.image_inputs import RefusedImages, naming_refused, refused_images
from vlm.data.prompts import encode_prompt, end_token_id, has_chat_template, require_prompt
from vlm.errors import UserError, cut
from vlm.generation_config import answering, reads_the_prompt, require_honoured, setting, writer
from vlm.loading import checkpoint_of, no_loading_bar, reading, require_all_weights, user_errors
from vlm.positions import learned_positions, over_positions, room, warn_beyond
from vlm.precision import default_device, input_device
from vlm.processing import pad_left
from vlm.shared_prefix import can_share_prefix, share_prefix, shared_prefix
from vlm.tiling import size_of

BLANK = (64, 64)
"""Pixels of the blank image that a model is tried on when it fails."""

Request = tuple[list[Image.Image], list[Message]]
"""Images, and messages that end with the user's. Image parts take the images in order."""


def load(
    name_or_path: str,
    *,
    device: str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Model, frozen and in evaluation mode, and processor of a run folder, a checkpoint folder or a Hub name.

    `dtype` and `device_map` are those of transformers' `from_pretrained`; a `device_map` takes the place of `device`.
    Raises UserError if there is no such model, and for a checkpoint that lacks weights.
    """
    source = checkpoint_of(name_or_path)
    config = load_config(name_or_path, trust_remote_code=trust_remote_code)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not getattr(config, "auto_map", None):
        raise UserError(f"{name_or_path} is of type {config.model_type}, which is no vision-language model")
    with reading(name_or_path, "processor"):
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    with reading(name_or_path), no_loading_bar():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        model, info = loaded
        require_all_weights(source, model, info)
    try:
        require_supported(model, processor)
    except UserError as error:
        raise UserError(f"{name_or_path}: {error}") from None
    pad_left(processor.tokenizer)  # also for those that save it again
    if device_map is None:
        model = model.to(device or default_device())
    return model.eval().requires_grad_(False), processor


def load_config(name_or_path: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration in a run folder, a checkpoint folder or a Hub name. Raises UserError if there is none."""
    with reading(name_or_path, "config.json"):
        return AutoConfig.from_pretrained(checkpoint_of(name_or_path), trust_remote_code=trust_remote_code)


def require_supported(model: Any, processor: Any) -> None:
    """Raise UserError, naming what is missing, for a model whose answers are not the continuation of its prompt, or a
    processor that does not say what a prompt looks like."""
    if model.config.is_encoder_decoder or model.config.get_text_config(decoder=True).is_encoder_decoder:
        raise UserError(
            f"{type(model).__name__} has an encoder that reads the prompt and a decoder that writes the answer, as T5 "
            "does; a model is needed whose decoder does both, as OPT in BLIP-2"
        )
    require_prompt(processor)


def fixed_image_tokens(model: Any, processor: Any) -> bool:
    """Whether ids do not depend on pixels, but on the images' sizes at most, and images are encoded apart from them, as
    in our own models."""
    return hasattr(model, "get_vision_features") and getattr(processor, "fixed_image_tokens", False)


def tokenize(processor: Any, requests: Sequence[Request], *, pixels: bool = False) -> Any:
    """Requests as one left-padded batch: `input_ids`, `attention_mask` and, with `pixels`, what the processor makes of
    the images. Ids without pixels are those of a processor with [fixed image tokens][`fixed_image_tokens`].

    Requests to a processor without a chat template must be [alike][`prompt_shapes`].
    Raises RefusedImages if the image processor does not take an image.
    """
    with naming_refused(processor, [image for images, _ in requests for image in images]):
        return _tokenize(processor, requests, pixels)


def _tokenize(processor: Any, requests: Sequence[Request], pixels: bool) -> Any:
    if not has_chat_template(processor):
        rows = [encode_prompt(processor, messages, images) for images, messages in requests]
        return BatchFeature({name: torch.cat([row[name] for row in rows]) for name in rows[0]})
    pad_left(processor.tokenizer)
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True}
    if not pixels:
        options |= {"pixels": False, "image_sizes": [size_of(image) for images, _ in requests for image in images]}
    template = template_options(processor, *(messages for _, messages in requests))
    try:
        with naming_template(processor):
            return processor.apply_chat_template(
                [with_images(messages, images) if pixels else messages for images, messages in requests],
                tokenize=True,
                return_dict=True,
                add_generation_prompt=True,
                **template,
                processor_kwargs=options,
            )
    except (NotImplementedError, ValueError, StopIteration) as error:
        if isinstance(error, UserError) or "sanitize_control_tokens" not in template:
            raise
        raise UserError(OWN_TOKEN) from error


@torch.no_grad()
def encode_images(
    model: Any, processor: Any, images: Sequence[Image.Image]
) -> tuple[list[torch.Tensor], tuple[int, int]]:
    """Features of each image, `[1, P + h * w, D_v]`, or one for each of its tiles, and their grid `(h, w)`. An image
    that comes twice is encoded once."""
    distinct = {id(image): image for image in images}
    with naming_refused(processor, list(distinct.values())):
        pixels = processor.prepare_images(list(distinct.values()))["pixel_values"]
    features, grid = model.get_vision_features(pixels.to(input_device(model)))
    of_image = features.split([processor.num_tiles(image) for image in distinct.values()])
    by_identity = dict(zip(distinct, of_image, strict=True))
    return [by_identity[id(image)] for image in images], grid


def encode_requests(model: Any, processor: Any, requests: Sequence[Request]) -> Any:
    """Requests as one left-padded batch of model inputs.

    Our own model encodes an image once, however many requests of the batch show it (by identity).
    """
    fixed = fixed_image_tokens(model, processor)
    inputs = tokenize(processor, requests, pixels=not fixed).to(input_device(model))
    images = [image for row, _ in requests for image in row]
    if fixed and images:
        features, inputs["vision_grid"] = encode_images(model, processor, images)
        inputs["vision_features"] = torch.cat(features)
    return inputs


def prompt_lengths(model: Any, processor: Any, requests: Sequence[Request]) -> list[int]:
    """Tokens of each request, image tokens included.

    Where they depend on the images, on their sizes only: one request for each set of sizes is looked at whole.
    """
    if not requests:
        return []
    if fixed_image_tokens(model, processor):
        return tokenize(processor, requests)["attention_mask"].sum(dim=1).tolist()
    if not has_chat_template(processor):
        return [dict(shape)["input_ids"][0] for shape in prompt_shapes(processor, requests)]
    conversations = [with_images(messages, images) for images, messages in requests]
    with naming_template(processor):
        texts = processor.apply_chat_template(conversations, add_generation_prompt=True, **template_options(processor))
    lengths = [len(processor.tokenizer(text)["input_ids"]) for text in texts]
    image_tokens: dict[Any, int] = {}
    for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        sizes = tuple(image.size for image in request[0])
        if sizes not in image_tokens:
            image_tokens[sizes] = tokenize(processor, [request], pixels=True)["input_ids"].shape[1] - length
        lengths[row] = length + image_tokens[sizes]
    return lengths


def prompt_shapes(processor: Any, requests: Sequence[Request]) -> list[Any]:
    """What requests that stand in one batch have in common. With a chat template nothing, since they are padded; in
    Mllama the number of images, of which the padding would be seen; with tiling what images are cut into, so that rows
    begin alike and [share][`share_trunk`] that. Without one the shape of all their inputs, since the models of that age
    count padding as positions (BLIP, GIT)."""
    if (tiler := getattr(processor, "tiler", None)) is not None:
        sizes = [[size_of(image) for image in images] for images, _ in requests]
        return [tuple((tiler.grid(size), tiler.num_image_tokens(size, 1)) for size in row) for row in sizes]
    if has_chat_template(processor):
        counts = "cross_attention_mask" in processor.model_input_names
        return [len(images) if counts else 0 for images, _ in requests]
    blank = Image.new("RGB", (32, 32))  # an image takes the same number of tokens whatever it shows
    known: dict[str, Any] = {}
    for images, messages in requests:
        if (key := repr((len(images), messages))) not in known:
            made = encode_prompt(processor, messages, [blank] * len(images))
            known[key] = tuple((name, tuple(value.shape[1:])) for name, value in made.items())
    return [known[repr((len(images), messages))] for images, messages in requests]


def to_generate(model: Any, processor: Any, inputs: Any, options: dict[str, Any]) -> dict[str, Any]:
    """`inputs` of [`tokenize`] and `options` as `model.generate` takes them: without a chat template it is told what
    ends an answer, which the checkpoints of that age do not all say."""
    if has_chat_template(processor):
        return {**inputs, **options}
    end = end_token_id(processor.tokenizer)
    if model.config.model_type == "blip":  # it drops the last token of a prompt, and knows the end token
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        longer = {"input_ids": pad(ids, (0, 1), value=end), "attention_mask": pad(mask, (0, 1), value=1)}
        return {**inputs, **longer, **options}
    stops = writer(model).generation_config.eos_token_id
    stops = [end, *(stops if isinstance(stops, list) else [stops] if stops is not None else [])]
    return {**inputs, "eos_token_id": list(dict.fromkeys(stops)), **options}


@torch.no_grad()
def share_trunk(model: Any, inputs: Any, requests: Sequence[Request], max_new_tokens: int) -> Any:
    """The batch `inputs` of [`encode_requests`] with what its rows begin with in common in a cache: the images, and the
    first words of the prompts. Each set of images goes through the language model once, however many questions there
    are about it.

    Left as they are: rows whose images all differ, which would gain nothing, or whose texts differ before the last
    image, and models that cannot [share][`_can_share`].
    """
    keys = [tuple(id(image) for image in images) for images, _ in requests]
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    if len(first) == len(keys) or not _can_share(model, inputs["input_ids"].shape[1] + max_new_tokens):
        return inputs
    rows = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    shortest = min(map(len, rows))
    heads = torch.stack([ids[:shortest] for ids in rows])
    length = min(int((heads == heads[0]).all(dim=0).cumprod(dim=0).sum()), shortest - 1)  # one is left to predict from
    if not length or any((ids[length:] == model.config.image_token_id).any() for ids in rows):
        return inputs
    trunk, images = heads[0, :length], {}
    if "vision_features" in inputs:
        tiles = [sum(model.num_tiles([size_of(image) for image in images])) for images, _ in requests]
        features = inputs["vision_features"].split(tiles)
        images["vision_features"] = torch.cat([features[row] for row in first.values()])
        images["vision_grid"] = inputs["vision_grid"]
        if "image_sizes" in inputs:
            sizes = inputs["image_sizes"].split([len(key) for key in keys])
            images["image_sizes"] = torch.cat([sizes[row] for row in first.values()])
    outputs = model(input_ids=trunk.expand(len(first), -1), use_cache=True, logits_to_keep=1, **images)
    order = {key: position for position, key in enumerate(first)}
    chosen = torch.tensor([order[key] for key in keys], device=trunk.device)
    cache = outputs.cache
    if can_share_prefix(model, cache):
        share_prefix(cache, chosen)
    else:
        for layer in cache.layers:  # which may be on several devices
            layer.batch_select_indices(chosen.to(getattr(layer.keys, "device", chosen.device)))
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


def _can_share(model: Any, length: int) -> bool:
    """Our own models can, unless a window slides over rows of `length` tokens: it would count the padding between what
    is shared and the rest, as would the state of a recurrent layer; or the image sees the question, or is read together
    with it."""
    if not hasattr(model, "get_vision_features") or model.config.image_attention == "prefix_lm":
        return False
    if model.config.use_qformer_text_input or has_recurrent_layers(model):
        return False
    return length <= (sliding_window(model) or length)


def _one_continuation(model: Any, options: dict[str, Any]) -> bool:
    """Whether each row goes on once, and with a cache of the usual kind; beams would need it several times."""
    names = ("num_beams", "use_cache", "cache_implementation")
    beams, use_cache, kind = (setting(model, options, name) for name in names)
    return beams in (None, 1) and use_cache is not False and kind is None


def has_recurrent_layers(model: Any) -> bool:
    """Whether some layers of the language model keep a state in place of keys and values (Mamba, LFM2, Qwen3-Next)."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


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
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
    **generate_kwargs: Any,
) -> list[str]:
    """The answer to each request, in their order, greedy unless `generate_kwargs` say otherwise.

    Args:
        max_batch_tokens: prompts and answers of a batch, with padding, take no more; see [`vlm.batches`].
        progress: is called with the number of answers of each batch that is done.

    Raises UserError when a batch does not fit into the memory of the accelerator, for a setting that is not supported,
    in `generate_kwargs` or in the model's generation config, and for a model that cannot answer; and RefusedImages,
    mostly before there is an answer, if the image processor does not take an image.
    """
    require_honoured(model, generate_kwargs)
    options = {"do_sample": False, **generate_kwargs, "max_new_tokens": max_new_tokens}
    with sound(model, processor):
        lengths = prompt_lengths(model, processor, requests)
        places = learned_positions(model)  # answers of a batch have equal room, whatever else is asked
        answer_lengths = [room(places, length, max_new_tokens) for length in lengths]
        warn_beyond(model, max(lengths, default=0))
        lengths = [length + new for length, new in zip(lengths, answer_lengths, strict=True)]
        shapes = [*zip(prompt_shapes(processor, requests), answer_lengths, strict=True)]
    keys = [tuple(id(image) for image in images) for images, _ in requests]
    answers = [""] * len(requests)
    if reads_the_prompt(model, options):  # and padding with it: there may not be any
        shapes = [*zip(shapes, lengths, strict=True)]
    alike = [[row for row in range(len(requests)) if shapes[row] == shape] for shape in dict.fromkeys(shapes)]
    batches = (
        [group[i] for i in batch]
        for group in alike
        for batch in batches_of([lengths[row] for row in group], [keys[row] for row in group], max_batch_tokens)
    )
    for rows in batches:
        try:
            with sound(model, processor):
                options["max_new_tokens"] = answer_lengths[rows[0]]
                texts = _answers(model, processor, [requests[row] for row in rows], options)
        except torch.OutOfMemoryError as error:
            size = len(rows) * max(lengths[row] for row in rows)
            raise UserError(
                f"a batch of {len(rows)} prompts ({size} tokens with their answers) does not fit into memory; lower "
                f"max_batch_tokens, which is {max_batch_tokens} ({error})"
            ) from None
        for row, text in zip(rows, texts, strict=True):
            answers[row] = text
        if progress:
            progress(len(rows))
    return answers


def _answers(model: Any, processor: Any, batch: Sequence[Request], options: dict[str, Any]) -> list[str]:
    inputs = encode_requests(model, processor, batch)
    if _one_continuation(model, options):
        inputs = share_trunk(model, inputs, batch, options["max_new_tokens"])
    with shared_prefix(model, inputs.get("cache")), answering(model, options, processor.tokenizer) as honoured:
        output = model.generate(**to_generate(model, processor, inputs, honoured))
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def prompt_check(model: Any, processor: Any) -> Callable[[Any], str] | None:
    """Return what says why a request does not fit into the model's learned positions, or nothing if it does; None for a
    model whose positions do not end."""
    places = learned_positions(model)
    if places is None:
        return None

    def why_refused(request: Request) -> str:
        with sound(model, processor):
            length = prompt_lengths(model, processor, [request])[0]
        return over_positions(length, places) if length >= places else ""

    return why_refused


@contextmanager
def sound(model: Any, processor: Any) -> Iterator[None]:
    """Turn an error raised within it into a UserError that names the model, if the model cannot answer anything: then
    not the question is at fault, but a value in one of the checkpoint's files, which did not keep it from loading."""
    try:
        yield
    except RefusedImages as error:
        if refused_images(processor, [Image.new("RGB", BLANK)]):
            raise UserError(cannot_answer(model, error)) from error
        raise
    except Exception as error:
        if isinstance(error, UserError | torch.OutOfMemoryError) or _can_answer(model, processor):
            raise
        with user_errors(lambda error: cannot_answer(model, error)):
            raise error from None


def cannot_answer(model: Any, error: Exception) -> str:
    """What is said of a model that was loaded, and fails on a blank image."""
    name = getattr(model, "name_or_path", "") or f"of type {type(model).__name__}"
    return (
        f"the model {name} loads, but fails on a blank image too; a value in its configuration, image processor or "
        f"tokenizer is wrong: {type(error).__name__}: {cut(str(error), 1000)}"
    )


def _can_answer(model: Any, processor: Any) -> bool:
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    request: Any = ([Image.new("RGB", BLANK)], [{"role": "user", "content": content}])
    try:
        prompt_lengths(model, processor, [request])
        _answers(model, processor, [request], {"do_sample": False, "max_new_tokens": 1})
    except Exception:
        return False
    return True
