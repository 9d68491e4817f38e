"""Chat templates that place images: a conversation in turns, or as the prompt of a published model."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jinja2

from vlm.errors import UserError
from vlm.processing import IMAGE_TOKEN
from vlm.template_budget import TemplateBoundsError

TEMPLATE_FILE = "<template>"
"""What jinja2 calls a template that has no file, in a traceback."""
TemplateName = Literal["auto", "chatml", "paligemma", "blip2"]

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

# `generation` marks what the assistant writes, for `return_assistant_tokens_mask`; `TURN` is a message and its end.
TURN = (
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + END }}{% endgeneration %}"
    "{% else %}{{ message['content'] + END }}{% endif %}"
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    + TURN.replace("END", "'<|im_end|>'")
    + "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# For base language models, whose tokenizers know no token for a turn but the one that ends a text.
PLAIN_TURNS = (
    "{% for message in messages %}{{ message['role'] + '\\n' }}"
    + TURN.replace("END", "eos_token")
    + "{% endfor %}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
)

# Images, the token that begins a text, the question, and behind it the answer.
PROMPT = (
    "{%- set question = namespace(text='') -%}"
    "{%- for message in messages -%}"
    "{%- set ns = namespace(images='', text='') -%}"
    "{%- if message['content'] is string -%}{%- set ns.text = message['content'] -%}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set ns.images = ns.images + '<image>' -%}"
    "{%- elif part['type'] == 'text' -%}{%- set ns.text = ns.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- if message['role'] != 'assistant' -%}{%- set question.text = ns.text | trim -%}"
    "{{- ns.images -}}{%- if loop.first -%}BEGIN{%- endif -%}{{- question.text + AFTER_QUESTION -}}"
    "{%- else -%}"
)
PROMPT_END = (
    "{%- generation -%}{{- (BEFORE_ANSWER if question.text else '') + (ns.text | trim) + eos_token -}}"
    "{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
)
PROMPTS = {
    "paligemma": ("'\\n'", "''"),  # <image>... <bos> question \n answer <eos>
    "blip2": ("''", "' '"),  # <image>... </s> question answer </s>
}
"""By the model whose prompt it is: what stands after a question, and before its answer."""


def chat_template_for(tokenizer: Any, name: TemplateName = "auto", *, image_markers: Sequence[str] = ("", "")) -> str:
    """A chat template that places images and writes `image_markers` before and after each.

    `auto` is the tokenizer's own, ChatML if it has none, or, for a tokenizer without ChatML's tokens, turns that end
    with its end-of-sequence token; `chatml` is ChatML. In both roles are marked by special tokens alone, so that no
    text that a user writes can be taken for one. The others are of `PROMPTS`, which mark no roles: images, a question,
    and an answer that ends with the end-of-sequence token.
    Raises ValueError if the tokenizer lacks the tokens.
    """
    placed = repr(IMAGE_TOKEN.join(image_markers))
    begins = tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    if name in PROMPTS:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{name} ends answers with the end-of-sequence token, which this tokenizer lacks: use auto"
            )
        after, before = PROMPTS[name]
        begins |= name == "paligemma" and tokenizer.bos_token is not None  # its processor writes it
        template = PROMPT.replace("BEGIN", "{{- bos_token -}}" if begins else "").replace("AFTER_QUESTION", after)
        return template.replace(repr(IMAGE_TOKEN), placed) + PROMPT_END.replace("BEFORE_ANSWER", before)
    flatten = FLATTEN.replace(repr(IMAGE_TOKEN), placed)
    if tokenizer.chat_template is not None and name == "auto":
        return flatten + tokenizer.get_chat_template()
    # Templates write the first token of a text themselves, where the tokenizer would have put one.
    begin = "{{- bos_token -}}" if begins else ""
    if {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.get_added_vocab()):
        return flatten + begin + CHATML
    if name == "chatml":
        raise ValueError("chatml needs the tokens <|im_start|> and <|im_end|>, which this tokenizer lacks: use auto")
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has neither a chat template nor an end-of-sequence token to end turns with")
    return flatten + begin + PLAIN_TURNS


class Refused(UserError):  # noqa: N818 - named for what it says
    """A conversation that a chat template refuses by an error of its own."""


@contextmanager
def naming_template(processor: Any) -> Iterator[None]:
    """Raise UserError that names the chat template of `processor`, and the line, for an error in it; [`Refused`] if the
    template refuses the conversation."""
    try:
        yield
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == TEMPLATE_FILE]
        if not (lines or isinstance(error, jinja2.TemplateError)):
            raise
        line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
        name = getattr(processor, "tokenizer", processor).name_or_path
        where = f"the chat template of {name or type(processor).__name__}" + (f", line {line}" if line else "")
        if isinstance(error, TemplateBoundsError):
            raise UserError(
                f"{where}: {error}, which no conversation needs. It may be meant to do harm: use another model, or "
                "write another template into chat_template.jinja"
            ) from error
        if type(error) is jinja2.TemplateError:  # what `raise_exception` in a template raises
            raise Refused(f"{where}, refuses the conversation: {error}") from error
        raise UserError(
            f"{where}: {type(error).__name__}: {error}. Correct it, in chat_template.jinja or tokenizer_config.json"
        ) from error


def without_marks(template: str) -> str:
    """A template without the marks around what the assistant writes, which nothing but transformers reads."""
    return re.sub(r"\{%-? (end)?generation -?%\}", "", template)


def ends_with_eos(template: str) -> bool:
    """Whether a template of [`chat_template_for`] that is not the tokenizer's own ends turns with the token that ends a
    text."""
    return template.endswith((PLAIN_TURNS, *(PROMPT_END.replace("BEFORE_ANSWER", b) for _, b in PROMPTS.values())))


def tokens_of(image_markers: Sequence[str]) -> list[str]:
    """The special tokens among what stands around images: all that is in angle brackets."""
    return list(dict.fromkeys(re.findall(r"<[^<>\s]+>", "".join(image_markers))))
