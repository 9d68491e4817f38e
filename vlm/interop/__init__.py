"""Weights and configurations of transformers' own vision-language models, into ours and out of it.

    ours = from_stock(LlavaForConditionalGeneration.from_pretrained(...))
    ours, processor = from_stock(LlavaNextForConditionalGeneration.from_pretrained(...), stock_processor)
    stock, stock_processor = to_stock(ours, processor, "llava")

Logits stay what they were. Both share the tensors of what they were made from, wherever their form is the same.
"""

from __future__ import annotations

import copy
from typing import Any, overload

from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from vlm.configuration import VLMConfig
from vlm.errors import UserError, nearest
from vlm.interop.blip2 import Blip2
from vlm.interop.check import check_equal
from vlm.interop.family import Family, image_of
from vlm.interop.gemma3 import Gemma3
from vlm.interop.idefics import Idefics
from vlm.interop.idefics2 import Idefics2
from vlm.interop.idefics3 import Idefics3, SmolVLM
from vlm.interop.instructblip import InstructBlip
from vlm.interop.internvl import InternVL
from vlm.interop.llava import Llava
from vlm.interop.llava_next import LlavaNext
from vlm.interop.mllama import Mllama
from vlm.interop.paligemma import PaliGemma
from vlm.interop.processor import from_stock_processor
from vlm.interop.standardize import folded
from vlm.modeling import VLMForConditionalGeneration
from vlm.processing import VLMProcessor

FAMILIES: dict[str, Family] = {
    "llava": Llava(),
    "llava_next": LlavaNext(),
    "idefics3": Idefics3(),
    "smolvlm": SmolVLM(),
    "gemma3": Gemma3(),
    "internvl": InternVL(),
    "idefics": Idefics(),
    "idefics2": Idefics2(),
    "mllama": Mllama(),
    "paligemma": PaliGemma(),
    "blip2": Blip2(),
    "instructblip": InstructBlip(),
}
"""By `model_type` of the stock configuration, without the dash that BLIP-2 has there and nowhere else."""


REASONS = {
    "qwen2_vl": "its tokens have positions in three directions (M-RoPE)",
    "qwen2_5_vl": "its tokens have positions in three directions (M-RoPE)",
    "qwen3_vl": "its tokens have positions in three directions (M-RoPE)",
}
"""Why the best known of the others are not among `FAMILIES`."""


def family_of(name: str) -> Family:
    """Raises UserError for an architecture that there is no description of, with the reason if one is known."""
    name = {"blip-2": "blip2"}.get(name, name)
    if name in REASONS:
        raise UserError(f"there is no counterpart of {name} among ours: {REASONS[name]}")
    if name not in FAMILIES:
        raise UserError(f"there is no counterpart of {name!r} among ours; {nearest(name, FAMILIES)}")
    return FAMILIES[name]


def target_of(name: str) -> Family:
    """As [`family_of`], of those that a model of ours can become. Raises UserError for the others."""
    family = family_of(name)
    if family.into_ours_only:
        can = ", ".join(name for name, each in FAMILIES.items() if not each.into_ours_only)
        raise UserError(f"{family.architecture} can be imported but not exported. Export targets: {can}")
    return family


@overload
def from_stock(stock: PreTrainedModel) -> VLMForConditionalGeneration: ...
@overload
def from_stock(stock: PreTrainedModel, processor: Any) -> tuple[VLMForConditionalGeneration, VLMProcessor]: ...
def from_stock(stock: PreTrainedModel, processor: Any = None) -> Any:
    """A model of ours that computes what `stock` does, a vision-language model of transformers; with its `processor`,
    which says how images are cut into tiles, that model and a processor of ours.

    Raises UserError for an architecture, or a setting of one, that ours cannot express.
    """
    theirs: Any = stock.config
    family = family_of(theirs.model_type)
    family.check_stock(theirs)
    if processor is not None and family.into_ours_only:
        raise UserError(
            f"{type(processor).__name__} has no counterpart among ours: from_stock(stock) takes the model alone, for "
            "the inputs that this processor makes"
        )
    config = VLMConfig(
        vision_config=family.own_vision_config(theirs),
        text_config=family.own_text_config(theirs),
        **{ours: getattr(theirs, name) for ours, name in family.fields.items()},
        **({"tiling": family.tiling(processor)} if processor else {}) | family.bridge(theirs),
    )
    with no_init_weights():
        model = VLMForConditionalGeneration(config)
    weights = family.whole(stock.state_dict(), theirs)
    state = dict(model.state_dict())
    for name, stock_name, renamed in family.names(model):
        state[name] = renamed.from_stock(weights[stock_name]) if renamed else weights[stock_name]
    model.load_state_dict(state, assign=True)
    model.model.multi_modal_projector.to(model.model.language_model.dtype)  # BLIP-2 has most of it in float32
    _finish(model, stock)
    if processor is None:
        return model
    ours = from_stock_processor(family, config, processor)
    check_equal(model, ours, stock, processor)
    return model, ours


def to_stock(model: VLMForConditionalGeneration, processor: Any, target: str) -> tuple[PreTrainedModel, Any]:
    """A model of transformers of type `target` that computes what `model` does, and its processor.

    Raises UserError for an architecture that none of ours becomes, and for what it cannot express: another projector or
    fusion, an encoder that it does not have, statistics of features that fit into none of its layers, a decoder whose
    logits it would compute otherwise.
    """
    family = target_of(target)
    family.check_ours(model)
    image = image_of(model, processor)
    stock_class: Any = family.model_class()
    ours = model.config
    config = stock_class.config_class(
        vision_config=family.vision_config(ours.vision_config),
        text_config=family.text_config(ours.text_config),
        tie_word_embeddings=ours.tie_word_embeddings,
        **{name: getattr(ours, key) for key, name in family.fields.items()},
        **family.settings(model, image),
    )
    weights = folded(model)
    state: dict[str, Tensor] = {}
    for name, stock_name, renamed in family.names(model):
        state[stock_name] = renamed.to_stock(weights[name]) if renamed else weights[name]
    state |= family.idle(model)
    with no_init_weights():
        stock = stock_class(config)
    wanted = stock.state_dict().keys()
    if gone := sorted(wanted - state.keys()):
        raise UserError(f"{family.architecture} has weights that this model lacks: {', '.join(gone)}")
    stock.load_state_dict({name: state[name] for name in wanted}, assign=True)
    _finish(stock, model)
    stock_processor = family.stock_processor(config, processor, image)
    check_equal(model, processor, stock, stock_processor)
    return stock, stock_processor


def _finish(made: PreTrainedModel, source: PreTrainedModel) -> None:
    made.tie_weights()
    made.eval().requires_grad_(False)
    made.generation_config = copy.deepcopy(source.generation_config)
    made.config.dtype = made.dtype
    # Of the whole, which sets that of its parts, and then of the parts: some cannot compute it as the others do.
    made.config._attn_implementation = source.config._attn_implementation
    for part in ("vision_config", "text_config"):
        of_source = getattr(source.config, part, source.config)
        getattr(made.config, part)._attn_implementation = of_source._attn_implementation
