"""The processor: images and conversations to what the model takes."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import _MARKED_RE, MultiModalData
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END

from vlm.adapters import LARGEST, unknown_name
from vlm.configuration import IMAGE_ATTENTIONS
from vlm.placeholders import count_tokens, types_of
from vlm.tiling import Size, size_of, tiler_of

IMAGE_TOKEN = "<image>"
QFORMER_TOKENIZER = "qformer_tokenizer"
QFORMER_INPUTS = ("qformer_input_ids", "qformer_attention_mask")
"""What a Q-Former reads beside the image (InstructBLIP)."""
MISMATCH = "The number of image tokens in the prompts should be the same as the number of images"
"""What the processors of transformers say."""


class VLMProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one (as `LlavaProcessor`).

    Args:
        image_seq_length: how many image tokens stand for an image, or each of its tiles, in `input_ids`; equal to the
            model's.
        image_attention: equal to the model's; with `bidirectional`, `token_type_ids` are given, 1 at image tokens; with
            `prefix_lm` too, 0 in the prompt, and 1 from the first answer of a conversation on.
        image_token: the placeholder in text. One placeholder an image, in order; it is expanded here.
        tiling: equal to the model's; see [`vlm.tiling.Tiler`].
        qformer_tokenizer: that of a Q-Former which reads texts; with it `QFORMER_INPUTS [images, T]` are given. What is
            read with an image is the text of the message in which it stands, without other messages and without what
            the chat template writes; of a text that is no conversation, all of it. What is longer than
            `qformer_tokenizer.model_max_length` is cut there; the language model reads it whole.
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
        qformer_tokenizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if type(image_seq_length) is not int or not 1 <= image_seq_length <= LARGEST:
            raise ValueError(f"image_seq_length must be a whole number from 1 to {LARGEST:,}, not {image_seq_length!r}")
        if not isinstance(image_token, str):
            raise ValueError(f"image_token must be text, not {image_token!r}")
        if image_attention not in IMAGE_ATTENTIONS:
            raise unknown_name("image_attention", str(image_attention), IMAGE_ATTENTIONS)
        self.image_seq_length = image_seq_length
        self.tiling, self.tiler = tiling, tiler_of(tiling)
        self.image_attention = image_attention
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no token {image_token!r}; add it as a special token first")
        self.qformer_tokenizer = qformer_tokenizer
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that every processor has. transformers finds parts by the arguments' names, and requires each."""
        return ["image_processor", "tokenizer"]

    def to_dict(self) -> dict[str, Any]:
        """As in `ProcessorMixin`; in place of the Q-Former's tokenizer the folder that it is saved in."""
        values = copy.copy(self)
        del values.qformer_tokenizer
        named = {} if self.qformer_tokenizer is None else {QFORMER_TOKENIZER: QFORMER_TOKENIZER}
        return super(VLMProcessor, values).to_dict() | named

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if self.qformer_tokenizer is not None:  # where `InstructBlipProcessor` has it
            self.qformer_tokenizer.save_pretrained(os.path.join(save_directory, QFORMER_TOKENIZER))
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        if processor_dict and (folder := processor_dict.get(QFORMER_TOKENIZER)):
            # From the folder that it names to the tokenizer in it, which becomes an argument.
            within = os.path.join(kwargs.get("subfolder", ""), folder)
            processor_dict[QFORMER_TOKENIZER] = AutoTokenizer.from_pretrained(
                pretrained_model_name_or_path, **{**kwargs, "subfolder": within}
            )
        return super()._get_arguments_from_pretrained(pretrained_model_name_or_path, processor_dict, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        names = ["input_ids", "attention_mask", "pixel_values"]
        names += ["image_sizes"] if self.tiler is not None else []
        names += QFORMER_INPUTS if self.qformer_tokenizer is not None else ()
        return names if self.image_attention == "causal" else [*names, "token_type_ids"]

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        pixels: bool | None = None,
        image_sizes: Sequence[Size] | None = None,
        qformer_text: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `ProcessorMixin`. With `pixels=False` image placeholders are expanded although no image is given: the
        ids of a text whose pixels, or features, come from elsewhere. Tiling then needs the images' `image_sizes`, each
        `(height, width)`, and gives them back as the model takes them, `[images, 2]`. `qformer_text` is what a Q-Former
        reads, for each image; else the whole text that the image stands in.
        Raises ValueError if placeholders and images, or their sizes, do not match, for videos and audio, and for an
        option of the image processor that does not go with tiling."""
        texts = [text] if isinstance(text, str) else text
        if kwargs.get("sanitize_control_tokens"):
            # Taken out for counting, the token that a user wrote into `<im<image>age>` would leave another behind.
            texts = [sample.replace(_CONTROL_TOKEN_END, 2 * _CONTROL_TOKEN_END) for sample in texts]
        if self.qformer_tokenizer is not None and qformer_text is None:
            qformer_text = [
                sample.replace(self.image_token, "").strip()
                for sample in texts or ()
                for _ in range(sample.count(self.image_token))
            ]
        if pixels is not False:
            inputs = super().__call__(images=images, text=texts, **kwargs)
            return self._with_qformer_text(self._with_types(inputs), qformer_text)
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
        return self._with_qformer_text(self._with_types(inputs), qformer_text)

    def create_mm_token_type_ids(self, input_ids: Any, *args: Any, **kwargs: Any) -> list[list[int]]:
        """1 for each token of an image, also between its tiles; servers put visual tokens there."""
        return types_of(self, input_ids)

    def _get_num_multimodal_tokens(self, image_sizes: Sequence[Size] | None = None, **kwargs: Any) -> MultiModalData:
        """How many tokens and rows of `pixel_values` images of these `(height, width)` take, as vLLM asks."""
        return MultiModalData() if image_sizes is None else count_tokens(self, image_sizes)

    def prepare_images(self, images: Sequence[Image.Image], **options: Any) -> BatchFeature:
        """`pixel_values [images, 3, H, W]`; with tiling, of all tiles of all images, and `image_sizes [images, 2]`.

        `options` are those of the image processor. Raises ValueError for one that does not go with tiling."""
        if self.tiler is None:
            return self.image_processor(images, **{**options, "return_tensors": "pt"})
        options = _of_tiles(options)
        # None: several encoders, each with its own
        resample = options.pop("resample", getattr(self.image_processor, "resample", None))
        tiles = [tile for image in images for tile in self.tiler.split(image, resample)]
        inputs = self.image_processor(tiles, **options, return_tensors="pt")
        return BatchFeature({**inputs, "image_sizes": torch.tensor([size_of(image) for image in images])})

    def num_tiles(self, image: Image.Image) -> int:
        """How many rows of `pixel_values` an image is."""
        return 1 if self.tiler is None else self.tiler.num_tiles(size_of(image))

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        if self.tiler is None:
            return super()._process_images(images, **kwargs)
        flat: Any = make_flat_list_of_images(images)
        layout = kwargs.pop("input_data_format", None)
        if not (kwargs.get("do_rescale", True) or all(_has_bytes(image) for image in flat)):
            raise ValueError("do_rescale=False: with tiling, pass images of bytes (0 to 255)")
        pictures = [to_pil_image(image, input_data_format=layout).convert("RGB") for image in flat]
        inputs = self.prepare_images(pictures, **kwargs)
        return inputs, [self._tiled_text(*size) for size in inputs["image_sizes"].tolist()]

    def _tiled_text(self, height: int, width: int) -> str:
        assert self.tiler is not None
        return self.tiler.text((height, width), self.image_token, self.image_seq_length)

    def _with_types(self, inputs: BatchFeature) -> BatchFeature:
        """Of texts, which with `prefix_lm` are prompts."""
        if self.image_attention == "causal" or "input_ids" not in inputs:
            return inputs
        ids, marks = inputs["input_ids"], self.image_attention == "bidirectional"
        if isinstance(ids, torch.Tensor):
            inputs["token_type_ids"] = (ids == self.image_token_id).long() if marks else torch.zeros_like(ids)
        else:
            inputs["token_type_ids"] = [[int(marks and token == self.image_token_id) for token in row] for row in ids]
        return inputs

    def _with_qformer_text(self, inputs: BatchFeature, texts: Sequence[str] | None) -> BatchFeature:
        """Padded at their ends, since a Q-Former counts places from the first token."""
        if self.qformer_tokenizer is None or not texts:
            return inputs
        made = self.qformer_tokenizer([*texts], padding=True, padding_side="right", truncation=True)
        for name, key in zip(QFORMER_INPUTS, ("input_ids", "attention_mask"), strict=True):
            rows = made[key]
            inputs[name] = torch.tensor(rows, dtype=torch.long) if _holds_tensors(inputs) else rows
        return inputs

    def _mark_answers(self, inputs: Any, conversations: Sequence[Any], *args: Any, **kwargs: Any) -> None:
        """Make the types of each conversation 1 from where its first answer begins, as it does in `inputs`: behind what
        the template writes of the messages before, ready for an answer."""
        sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else []
        for row, messages in enumerate(conversations):
            before = [_without_images(message) for message in takewhile(_is_no_answer, messages)]
            if len(before) < len(messages):
                options = {"pixels": False, "image_sizes": sizes[: _count_images(before)]}
                prompt = self.apply_chat_template(
                    before,
                    *args,
                    tokenize=True,
                    return_dict=True,
                    add_generation_prompt=True,
                    processor_kwargs=options,
                    **kwargs,
                )["input_ids"][0]
                types = inputs["token_type_ids"][row]
                ids, mask = (torch.as_tensor(inputs[name][row]).tolist() for name in ("input_ids", "attention_mask"))
                start = mask.index(1)
                same = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, ids[start:], strict=False))
                end = start + len([*same])
                types[end:] = 1 if isinstance(types, torch.Tensor) else [1] * (len(types) - end)
            sizes = sizes[_count_images(messages) :]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.image_seq_length

    def validate_inputs(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError with both counts and the example's index if placeholders and images do not match."""
        if unread := [name for name in ("videos", "audio") if kwargs.get(name) is not None]:
            raise ValueError(f"{unread[0]}: this model reads images and text")
        if text is not None:
            wanted = [sample.count(self.image_token) for sample in ([text] if isinstance(text, str) else text)]
            given = _images_per_text(images, wanted)
            if len(given) != len(wanted):
                raise ValueError(
                    f"{len(wanted)} texts, but {len(given)} lists of images: give each text its own list. {MISMATCH}"
                )
            for index, (placeholders, got) in enumerate(zip(wanted, given, strict=True)):
                if placeholders != got:
                    raise ValueError(
                        f"example {index}: {placeholders} {self.image_token} placeholders in its text and "
                        f"{got} images. {MISMATCH}"
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
            if self.qformer_tokenizer is not None:
                trusted = not kwargs["sanitize_control_tokens"]
                conversations, _ = self._normalize_conversations(conversation)
                kwargs["processor_kwargs"]["qformer_text"] = [
                    text for messages in conversations for text in self._qformer_text(messages, trusted)
                ]
        made = super().apply_chat_template(conversation, *args, **kwargs)
        if self.image_attention == "prefix_lm" and kwargs.get("tokenize") and kwargs.get("return_dict"):
            conversations, _ = self._normalize_conversations(conversation)
            self._mark_answers(made, conversations, *args, **{k: v for k, v in kwargs.items() if k not in _OF_ONE_CALL})
        return made

    def _qformer_text(self, messages: Sequence[Any], trusted: bool) -> list[str]:
        """What is read with each image of a conversation; in `trusted` messages placeholders are images too."""
        texts = []
        for message in messages:
            content = message.get("content") or []  # a call of a tool has none
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            images = sum(part["type"] == "image" for part in parts)
            if trusted:
                images += text.count(self.image_token)
                text = text.replace(self.image_token, "")
            texts += [text.strip()] * images
        return texts


_OF_TILES = (
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("resample", "return_tensors", "device", "disable_grouping"),
)
"""Options of an image processor that go with tiling, which changes sizes itself."""


def _of_tiles(options: dict[str, Any]) -> dict[str, Any]:
    """The `options` that an image processor is given for tiles. Raises ValueError for one that it cannot heed."""
    given = {name: value for name, value in options.items() if value is not None}
    if given.get("do_convert_rgb") is True:
        del given["do_convert_rgb"]
    for name in given:
        if name not in _OF_TILES:
            raise ValueError(f"{name}: not with tiling, where every tile is RGB and of one size")
    return {name: value for name, value in given.items() if name != "return_tensors"}


def _has_bytes(image: Any) -> bool:
    return isinstance(image, Image.Image) or str(image.dtype).endswith("uint8")


def pad_left(tokenizer: Any) -> None:
    """Let a tokenizer pad on the left, where `generate` needs padding, also when it is saved and loaded; with the token
    that ends a text if it has none to pad with."""
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # else it is not saved
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


_OF_ONE_CALL = (
    *("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask"),
    *("add_generation_prompt", "continue_final_message", "processor_kwargs"),
)


def _holds_tensors(inputs: BatchFeature) -> bool:
    return any(isinstance(value, torch.Tensor) for value in inputs.values())


def _is_no_answer(message: Any) -> bool:
    return message["role"] != "assistant"


def _without_images(message: Any) -> dict[str, Any]:
    """A message whose images are placeholders alone."""
    if isinstance(message["content"], str):
        return dict(message)
    parts = [{"type": "image"} if part["type"] == "image" else part for part in message["content"]]
    return {**message, "content": parts}


def _count_images(messages: Sequence[Any]) -> int:
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return sum(part["type"] == "image" for content in contents for part in content)


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
