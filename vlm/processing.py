"""The processor: images and conversations to what the model takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END

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
        image_seq_length: how many image tokens stand for an image in `input_ids`; equal to the model's.
        image_attention: equal to the model's; with `bidirectional`, `token_type_ids` are given, 1 at image tokens.
        image_token: the placeholder in text. One placeholder an image, in order; it is expanded here.
    """

    fixed_image_tokens = True
    """An image takes `image_seq_length` tokens whatever it shows, so ids do not depend on pixels."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_seq_length: int = 1,
        image_token: str = IMAGE_TOKEN,
        image_attention: str = "causal",
        **kwargs: Any,
    ) -> None:
        self.image_seq_length = image_seq_length
        self.image_attention = image_attention
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no token {image_token!r}; add it as a special token first")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "pixel_values"]
        return [*names, "token_type_ids"] if self.image_attention == "bidirectional" else names

    def __call__(self, images: Any = None, text: Any = None, *, pixels: bool = True, **kwargs: Any) -> Any:
        """As in `ProcessorMixin`. With `pixels=False` image placeholders are expanded although no image is given: the
        ids of a text whose pixels, or features, come from elsewhere."""
        texts = [text] if isinstance(text, str) else text
        if kwargs.get("sanitize_control_tokens"):
            # Taken out for counting, the token that a user wrote into `<im<image>age>` would leave another behind.
            texts = [sample.replace(_CONTROL_TOKEN_END, 2 * _CONTROL_TOKEN_END) for sample in texts]
        if pixels:
            return self._with_types(super().__call__(images=images, text=texts, **kwargs))
        num_images = sum(sample.count(self.image_token) for sample in texts)
        texts, _ = self.get_text_with_replacements(texts, [self.replace_image_token({}, 0)] * num_images)
        return self._with_types(BatchFeature(dict(self.tokenizer(texts, **kwargs))))

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
