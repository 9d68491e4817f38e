"""The processor: images and conversations to what the model takes."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin
from transformers.image_utils import make_nested_list_of_images

IMAGE_TOKEN = "<image>"

# ChatML, for language models that bring no chat template. Images are marked where they stand in a message.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class VLMProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one (as `LlavaProcessor`).

    Args:
        image_seq_length: how many image tokens stand for an image in `input_ids`; equal to the model's.
        image_token: the placeholder in text. One placeholder an image, in order; it is expanded here.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_seq_length: int = 1,
        image_token: str = IMAGE_TOKEN,
        **kwargs: Any,
    ) -> None:
        self.image_seq_length = image_seq_length
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"the tokenizer has no token {image_token!r}; add it as a special token first")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.image_seq_length

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Raises ValueError with both counts and the example's index if placeholders and images do not match."""
        if text is not None and images is not None:
            placeholders = [sample.count(self.image_token) for sample in ([text] if isinstance(text, str) else text)]
            given = self._images_per_text(images, len(placeholders))
            if given is not None:
                for index, (wanted, got) in enumerate(zip(placeholders, given, strict=True)):
                    if wanted != got:
                        raise ValueError(
                            f"example {index}: its text has {wanted} {self.image_token} placeholders, "
                            f"but {got} images were given for it"
                        )
        super().validate_inputs(images=images, text=text, **kwargs)

    @staticmethod
    def _images_per_text(images: Any, num_texts: int) -> list[int] | None:
        """How many images belong to each text, or None for a flat list that does not say."""
        if isinstance(images, (list, tuple)) and images and isinstance(images[0], (list, tuple)):
            if len(images) != num_texts:
                raise ValueError(f"{num_texts} texts, but {len(images)} lists of images")
            return [len(row) for row in images]
        return [len(make_nested_list_of_images(images)[0])] if num_texts == 1 else None

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As in `ProcessorMixin`, but what users write is always text: `<image>`, `<|im_start|>` or `</s>` inside a
        message becomes neither an image nor a role. Pass `sanitize_control_tokens=False` to trust the messages."""
        if kwargs.get("tokenize") and not kwargs.get("return_assistant_tokens_mask"):
            kwargs.setdefault("sanitize_control_tokens", True)
        return super().apply_chat_template(conversation, chat_template, **kwargs)


def chat_template_for(tokenizer: Any) -> str:
    """The tokenizer's own chat template, made to place images; [`CHAT_TEMPLATE`] if it has none.

    Language models' templates expect each message's content as one string. Messages with parts are joined to such a
    string first, an image part becoming the image token, so that roles and separators stay the model's own.
    """
    if tokenizer.chat_template is None:
        return CHAT_TEMPLATE
    return (
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
        "{%- set messages = ns.flat -%}" + tokenizer.chat_template
    )
