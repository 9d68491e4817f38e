"""The processor: images and conversations to what the model takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import _MARKED_RE
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END

from vlm.tiling import Size, size_of, tiler_of

IMAGE_TOKEN = "<image>"

# A message's content as one string, an image part becoming the image token: what language models' templates expect.
FLATTEN = (
    "{%- set ns = namespace(flat=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set ns.flat = ns.flat + [message] -%}"
    "{%- else -%}{%- set text = namespace(value='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set text.value = text.value + '<image>' -%}"
    "{%- elif part['type'] == 'text' -%}{%- set text.value = text.value + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set ns.flat = ns.flat + [dict(message, content=text.value)] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = ns.flat -%}"
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# For base language models, whose tokenizers know no token for a turn but the one that ends a text.
PLAIN_TURNS = (
    "{% for message in messages %}{{ message['role'] + '\\n' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)


class VLMProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one (as `LlavaProcessor`).

    Args:
        image_seq_length: how many image tokens stand for an image, or each of its tiles, in `input_ids`; equal to the
            model's.
        image_attention: equal to the model's; with `bidirectional`, `token_type_ids` are given, 1 at image tokens.
        image_token: the placeholder in text. One placeholder an image, in order; it is expanded here.
        tiling: equal to the model's; see [`vlm.tiling.Tiler`].
    """

    fixed_image_tokens = True
    """An image's tokens follow from its size, and without tiling not even from that, so ids do not depend on pixels."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_seq_length: int = 1,
        image_token: str = IMAGE_TOKEN,
        image_attention: str = "causal",
        tiling: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_seq_length = image_seq_length
        self.tiling, self.tiler = tiling, tiler_of(tiling)
        self.image_attention = image_attention
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no token {image_token!r}; add it as a special token first")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "pixel_values"]
        names += ["image_sizes"] if self.tiler is not None else []
        return [*names, "token_type_ids"] if self.image_attention == "bidirectional" else names

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        pixels: bool = True,
        image_sizes: Sequence[Size] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `ProcessorMixin`. With `pixels=False` image placeholders are expanded although no image is given: the
        ids of a text whose pixels, or features, come from elsewhere. Tiling then needs the images' `image_sizes`, each
        `(height, width)`, and gives them back as the model takes them, `[images, 2]`.
        Raises ValueError if placeholders and images, or their sizes, do not match."""
        texts = [text] if isinstance(text, str) else text
        if kwargs.get("sanitize_control_tokens"):
            # Taken out for counting, the token that a user wrote into `<im<image>age>` would leave another behind.
            texts = [sample.replace(_CONTROL_TOKEN_END, 2 * _CONTROL_TOKEN_END) for sample in texts]
        if pixels:
            return self._with_types(super().__call__(images=images, text=texts, **kwargs))
        if self.tiler is None:
            replacements = [self.image_token * self.image_seq_length] * sum(s.count(self.image_token) for s in texts)
        else:
            replacements = [self._tiled_text(*size) for size in image_sizes or ()]
            wanted = sum(_MARKED_RE.sub("", sample).count(self.image_token) for sample in texts)
            if len(replacements) != wanted:
                raise ValueError(
                    f"{wanted} {self.image_token} placeholders, and the sizes of {len(replacements)} images: with "
                    "tiling ids follow from the sizes; pass image_sizes, one for each image"
                )
        texts, _ = self.get_text_with_replacements(texts, replacements)
        inputs = BatchFeature(dict(self.tokenizer(texts, **kwargs)))
        if self.tiler is not None and image_sizes:
            inputs["image_sizes"] = torch.tensor(image_sizes)
        return self._with_types(inputs)

    def prepare_images(self, images: Sequence[Image.Image]) -> BatchFeature:
        """`pixel_values [images, 3, H, W]`; with tiling, of all tiles of all images, and `image_sizes [images, 2]`."""
        if self.tiler is None:
            return self.image_processor(images, return_tensors="pt")
        resample = getattr(self.image_processor, "resample", None)  # None: several encoders, each with its own
        tiles = [tile for image in images for tile in self.tiler.split(image, resample)]
        inputs = self.image_processor(tiles, return_tensors="pt")
        return BatchFeature({**inputs, "image_sizes": torch.tensor([size_of(image) for image in images])})

    def num_tiles(self, image: Image.Image) -> int:
        """How many rows of `pixel_values` an image is."""
        return 1 if self.tiler is None else self.tiler.num_tiles(size_of(image))

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        if self.tiler is None:
            return super()._process_images(images, **kwargs)
        flat: Any = make_flat_list_of_images(images)
        inputs = self.prepare_images([to_pil_image(image).convert("RGB") for image in flat])
        return inputs, [self._tiled_text(*size) for size in inputs["image_sizes"].tolist()]

    def _tiled_text(self, height: int, width: int) -> str:
        assert self.tiler is not None
        return self.tiler.text((height, width), self.image_token, self.image_seq_length)

    def _with_types(self, inputs: BatchFeature) -> BatchFeature:
        if self.image_attention == "bidirectional" and "input_ids" in inputs:
            ids = inputs["input_ids"]
            if isinstance(ids, torch.Tensor):
                inputs["token_type_ids"] = (ids == self.image_token_id).long()
            else:
                inputs["token_type_ids"] = [[int(token == self.image_token_id) for token in row] for row in ids]
        return inputs

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.image_seq_length

    def validate_inputs(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError with both counts and the example's index if placeholders and images do not match."""
        if text is not None:
            wanted = [sample.count(self.image_token) for sample in ([text] if isinstance(text, str) else text)]
            given = _images_per_text(images, wanted)
            if len(given) != len(wanted):
                raise ValueError(f"{len(wanted)} texts, but {len(given)} lists of images: give each text its own list")
            for index, (placeholders, got) in enumerate(zip(wanted, given, strict=True)):
                if placeholders != got:
                    raise ValueError(
                        f"example {index}: {placeholders} {self.image_token} placeholders in its text and "
                        f"{got} images; each image needs one placeholder"
                    )
        super().validate_inputs(images, text, *args, **kwargs)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `ProcessorMixin`, but what users write is always text: `<image>`, `<|im_start|>` or `</s>` inside a
        message becomes neither an image nor a role. Pass `sanitize_control_tokens=False` to trust the messages.

        As with a tokenizer's own `apply_chat_template`, the template alone says which special tokens there are.
        """
        if kwargs.get("tokenize"):
            kwargs.setdefault("sanitize_control_tokens", not kwargs.get("return_assistant_tokens_mask"))
            kwargs["processor_kwargs"] = {"add_special_tokens": False, **(kwargs.get("processor_kwargs") or {})}
        return super().apply_chat_template(conversation, *args, **kwargs)


def _images_per_text(images: Any, placeholders: list[int]) -> list[int]:
    """How many images each text gets: the length of its list, or of a flat list as many as it asks for while they
    last, and the last one what is left."""
    if images is None:
        return [0] * len(placeholders)
    if isinstance(images, (list, tuple)) and images and all(isinstance(row, (list, tuple)) for row in images):
        return [len(row) for row in images]
    flat: Any = make_flat_list_of_images(images)
    left, given = len(flat), []
    for wanted in placeholders:
        given.append(min(wanted, left))
        left -= given[-1]
    given[-1] += left
    return given


def tokens_of(image_markers: Sequence[str]) -> list[str]:
    """The special tokens among what stands around images: all that is in angle brackets."""
    return list(dict.fromkeys(re.findall(r"<[^<>\s]+>", "".join(image_markers))))


def chat_template_for(tokenizer: Any, *, chatml: bool = False, image_markers: Sequence[str] = ("", "")) -> str:
    """A chat template that places images: the tokenizer's own, ChatML if it has none or `chatml` asks for it, or, for a
    tokenizer without ChatML's tokens, turns that end with its end-of-sequence token. It writes `image_markers` before
    and after each image.

    Roles are marked by special tokens alone, so that no text that a user writes can be taken for one.
    Raises ValueError if the tokenizer lacks the tokens.
    """
    flatten = FLATTEN.replace(repr(IMAGE_TOKEN), repr(IMAGE_TOKEN.join(image_markers)))
    if tokenizer.chat_template is not None and not chatml:
        return flatten + tokenizer.get_chat_template()
    # Templates write the first token of a text themselves, where the tokenizer would have put one.
    begin = "{{- bos_token -}}" if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    if {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.get_added_vocab()):
        return flatten + begin + CHATML
    if chatml:
        raise ValueError("chatml needs the tokens <|im_start|> and <|im_end|>, which this tokenizer lacks: use auto")
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has neither a chat template nor an end-of-sequence token to end turns with")
    return flatten + begin + PLAIN_TURNS
