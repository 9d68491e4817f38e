"""A conversation that goes on from where the model is: what it has read is not read again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from threading import Event, Thread
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from vlm.data.prompts import is_prefix_lm
from vlm.generation import Request, encode_images, fixed_image_tokens, sound, to_generate, tokenize
from vlm.generation_config import answering, has_plain_generate, require_honoured, setting
from vlm.positions import learned_positions, room, warn_beyond
from vlm.precision import input_device
from vlm.processing import QFORMER_INPUTS
from vlm.tiling import size_of

CAUSAL_INPUTS = {
    "input_ids",
    "attention_mask",
    "pixel_values",
    "pixel_attention_mask",
    "image_sizes",
    "batch_num_images",
}
"""A stock model that is given no more than this has positions and a mask as a text has, so that what comes later
changes nothing before. Token types stand for images that attend both ways (PaliGemma, Gemma 3), grids for M-RoPE."""


class _When(StoppingCriteria):
    """Stops every row once `event` is set."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Session:
    """One conversation on one model. An answer starts from the keys and values that earlier ones left, so that of a
    follow-up question only the question is read; the answer is the one that reading everything again would give.

    Each request is the whole conversation. It is tokenized and compared with what is in the cache: from the first token
    that differs, or the first image that is not the same object, it is read. So it may just as well be another
    conversation. Where nothing can be kept, everything is read, as for a first question. One request at a time.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self._cache: Any = None  # a DynamicCache
        self._ids: list[int] = []
        """What the cache holds the keys and values of."""
        self._prompt = 0
        """How many tokens at its beginning see each other, and are kept together or not at all."""
        self._images: list[Image.Image] = []
        """The images of the last request, and maybe of tokens in the cache."""
        self._texts: list[list[int]] = []
        """What a Q-Former read with each of them."""
        self._features: dict[int, torch.Tensor] = {}
        """By the identity of an image of `_images`, what our own model's encoder made of it: `[1, P + h * w, D_v]`, or
        one for each tile."""
        self._grid: Any = None

    def stream(self, request: Request, *, max_new_tokens: int = 256, **generate_kwargs: Any) -> Iterator[str]:
        """The answer to a request, piece by piece as it is written; greedy unless `generate_kwargs` say otherwise.

        Raises UserError for a setting that is not supported, in `generate_kwargs` or in the model's generation config.
        """
        require_honoured(self.model, generate_kwargs, streams=True)
        stop = Event()
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {
            "do_sample": False,
            **generate_kwargs,
            "max_new_tokens": max_new_tokens,
            "streamer": streamer,
            "stopping_criteria": StoppingCriteriaList([_When(stop)]),
        }
        failure: list[BaseException] = []

        def work() -> None:
            try:
                with sound(self.model, self.processor):
                    self._generate(request, options)
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

    @torch.no_grad()
    def _generate(self, request: Request, options: dict[str, Any]) -> None:
        images = request[0]
        fixed = fixed_image_tokens(self.model, self.processor)
        inputs = tokenize(self.processor, [request], pixels=not fixed).to(input_device(self.model))
        ids = inputs["input_ids"][0].tolist()
        options["max_new_tokens"] = room(learned_positions(self.model), len(ids), options["max_new_tokens"])
        warn_beyond(self.model, len(ids))
        prompt = int((inputs["token_type_ids"] == 0).sum()) if is_prefix_lm(self.processor) else 0
        keeps = self._has_usual_cache(options) and (fixed or _is_causal(self.model, inputs))
        texts = _qformer_texts(inputs)
        length, known = self._in_cache(ids, images, texts, fixed, prompt) if keeps else (0, 0)
        # Taken away until the answer is there: what an error leaves of a cache is good for nothing.
        cache, self._cache = self._cache, None
        if cache is not None and length:
            if length < len(self._ids):
                cache.crop(length - len(self._ids))
            inputs["cache"] = cache
        if fixed:
            inputs.update(self._vision_inputs(images, inputs, known))
        elif known:
            inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask", "cache")}
        with answering(self.model, options, self.processor.tokenizer) as honoured:
            given = to_generate(self.model, self.processor, inputs, honoured)
            output = self.model.generate(**given, return_dict_in_generate=True)
        if keeps and isinstance(output.cache, DynamicCache) and not output.cache.offloading:
            self._cache, self._images, self._texts, self._prompt = output.cache, list(images), texts, prompt
            # All but the last token, which nobody has read.
            self._ids = output.sequences[0, :-1].tolist()

    def _has_usual_cache(self, options: dict[str, Any]) -> bool:
        kind = setting(self.model, options, "cache_implementation")
        return kind is None and setting(self.model, options, "use_cache") is not False

    def _in_cache(
        self, ids: Sequence[int], images: Sequence[Image.Image], texts: list[list[int]], fixed: bool, prompt: int
    ) -> tuple[int, int]:
        """How many of the first tokens of a request, whose `prompt` first ones see each other, need not be read, and
        how many whole images stand in them. `texts` are what a Q-Former reads with each image."""
        if self._cache is None:
            return 0, 0
        pairs = zip(self._ids, ids[:-1], strict=False)  # one is left to predict from
        length = next((n for n, (old, new) in enumerate(pairs) if old != new), min(len(self._ids), len(ids) - 1))
        known = 0
        for first, last, count in _places(self.model, ids, images, fixed):
            old, new = self._images[known : known + count], images[known : known + count]
            same = len(old) == len(new) == count and all(a is b for a, b in zip(old, new, strict=True))
            same &= self._texts[known : known + count] == texts[known : known + count]
            if not same or last >= length:
                length = min(length, first)
                break
            known += count
        if prompt != self._prompt or length < prompt:
            return 0, 0
        # What has slid out of a window does not come back, nor does the state of a recurrent layer.
        croppable = all(
            layer.is_croppable
            and getattr(layer, "record_past", True)  # LFM2's convolutions could, but have not been told to
            and not (slides and layer.get_seq_length() >= layer.sliding_window)
            for layer, slides in zip(self._cache.layers, self._cache.is_sliding, strict=True)
        )
        return (length, known) if croppable or length == len(self._ids) else (0, 0)

    def _vision_inputs(self, images: Sequence[Image.Image], tokenized: Any, known: int) -> dict[str, Any]:
        """Features of the images after the first `known`, and what is `tokenized` beside them."""
        new = {id(image): image for image in images if id(image) not in self._features}
        if new:
            features, self._grid = encode_images(self.model, self.processor, list(new.values()))
            self._features |= dict(zip(new, features, strict=True))
        self._images = list(images)  # holds them, so that nothing else gets their identity
        self._features = {id(image): self._features[id(image)] for image in images}
        beside = {name: tokenized[name] for name in QFORMER_INPUTS if name in tokenized}
        inputs: dict[str, Any] = {name: texts[known:] for name, texts in beside.items()}
        if known < len(images):
            inputs["vision_features"] = torch.cat([self._features[id(image)] for image in images[known:]])
            inputs["vision_grid"] = self._grid
            inputs |= self._sizes(images[known:])
        return inputs

    def _sizes(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """The `image_sizes` that a model with tiling is given of `images`."""
        if self.processor.tiling is None:
            return {}
        return {"image_sizes": torch.tensor([size_of(image) for image in images], device=input_device(self.model))}


def _qformer_texts(inputs: Any) -> list[list[int]]:
    """The tokens that a Q-Former reads with each image; none if it reads nothing."""
    if not all(name in inputs for name in QFORMER_INPUTS):
        return []
    return [ids[mask.bool()].tolist() for ids, mask in zip(*(inputs[name] for name in QFORMER_INPUTS), strict=True)]


def _is_causal(model: Any, inputs: Any) -> bool:
    """Whether a stock model reads a text and its images from left to right, and nothing more."""
    plain = has_plain_generate(model) and not model.config.is_encoder_decoder
    return plain and set(inputs) <= CAUSAL_INPUTS and getattr(model.config, "image_token_id", None) is not None


def _places(model: Any, ids: Sequence[int], images: Sequence[Image.Image], fixed: bool) -> list[tuple[int, int, int]]:
    """Where images stand in `ids`: the first token, the last one, and how many images. The images of a stock model,
    whose tokens and inputs are its own affair, are one place with all that comes before: known together or not at all.
    """
    tokens = [place for place, token in enumerate(ids) if token == model.config.image_token_id]
    if not fixed:
        return [(0, tokens[-1], max(len(images), 1))] if tokens else []
    ends = accumulate(model.image_tokens([size_of(image) for image in images]))
    return [(tokens[start], tokens[end - 1], 1) for start, end in pairwise([0, *ends])]
