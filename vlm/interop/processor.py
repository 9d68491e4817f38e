"""A stock processor as one of ours."""

from __future__ import annotations

import copy
from typing import Any

from vlm.chat_templates import chat_template_for
from vlm.configuration import VLMConfig
from vlm.errors import UserError
from vlm.interop.family import Family, in_template
from vlm.processing import VLMProcessor, pad_left


def from_stock_processor(family: Family, config: VLMConfig, stock_processor: Any) -> VLMProcessor:
    """The processor of ours for a model with `config` that does what a stock one does.

    Raises UserError for one whose chat template writes nothing for images.
    """
    tokenizer, template = copy.deepcopy(stock_processor.tokenizer), stock_processor.chat_template
    image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    if template is None and family.prompt:
        template = chat_template_for(tokenizer, family.prompt)
    else:
        placeholder = family.placeholder(stock_processor)
        if placeholder not in (template or ""):
            raise UserError(
                f"the chat template of this {type(stock_processor).__name__} writes no {placeholder} for images"
            )
        template = template.replace(placeholder, in_template(image_token.join(family.markers(config.tiling))))
    pad_left(tokenizer)
    return VLMProcessor(
        family.image_processor(stock_processor),
        tokenizer,
        template,
        config.image_seq_length,
        image_token,
        config.image_attention,
        config.tiling,
        copy.deepcopy(getattr(stock_processor, "qformer_tokenizer", None)),
    )
