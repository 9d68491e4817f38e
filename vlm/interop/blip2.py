"""BLIP-2 (arXiv 2301.12597): a ViT of EVA-CLIP with its class token, a Q-Former, any decoder."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

from transformers import Blip2Processor, PreTrainedConfig

from vlm.adapters.qformer import NORM_EPS, QFormerProjector
from vlm.errors import UserError
from vlm.interop.family import Family, Image, Renamed
from vlm.modeling import VLMForConditionalGeneration

OPTIONS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "cross_attention_frequency")
"""Of our projector, with the names that they have in `Blip2QFormerConfig`."""

QUERIES = Renamed("query_tokens", lambda queries: queries[None], lambda queries: queries[0])

IN_A_LAYER = {
    f"{kind}.{part}": f"{kind}.{name}"
    for kind in ("attention", "crossattention")
    for part, name in {
        "q_proj": "attention.query",
        "k_proj": "attention.key",
        "v_proj": "attention.value",
        "out_proj": "output.dense",
    }.items()
} | {
    "attention_norm": "attention.output.LayerNorm",
    "crossattention_norm": "crossattention.output.LayerNorm",
    "feed_forward.0": "intermediate_query.dense",
    "feed_forward.2": "output_query.dense",
    "feed_forward_norm": "output_query.LayerNorm",
    "text_feed_forward.0": "intermediate.dense",
    "text_feed_forward.2": "output.dense",
    "text_feed_forward_norm": "output.LayerNorm",
}


class Blip2(Family):
    architecture = "Blip2ForConditionalGeneration"
    projector = "qformer"
    towers = ("blip_2_vision_model",)
    tower = "a ViT of its own"
    prompt = "blip2"
    fields = {"image_token_id": "image_token_index", "image_seq_length": "num_query_tokens"}  # noqa: RUF012
    older = {}  # noqa: RUF012
    reads_text = False
    options: tuple[str, ...] = OPTIONS
    norm = "qformer.layernorm"

    def check_stock(self, config: Any) -> None:
        super().check_stock(config)
        qformer = config.qformer_config
        if not config.use_decoder_only_language_model:
            raise UserError(f"{config.text_config.model_type} has an encoder that reads the prompt; ours has a decoder")
        if config.image_token_id is None:
            raise UserError(
                "this checkpoint is of an older form, without image_token_index: no token stands for an image"
            )
        wanted = {
            "hidden_act": "gelu",
            "layer_norm_eps": NORM_EPS,
            "intermediate_size": 4 * qformer.hidden_size,
            "use_qformer_text_input": self.reads_text,
        }
        for key, value in wanted.items():
            if (found := getattr(qformer, key, value)) != value:
                raise UserError(
                    f"{key} of the Q-Former is {found!r} in this checkpoint; only {value!r} can be taken over"
                )

    def bridge(self, config: Any) -> dict[str, Any]:
        options = {name: getattr(config.qformer_config, name) for name in self.options}
        options |= {"use_qformer_text_input": True} if self.reads_text else {}
        return {
            "projector": {"type": self.projector, "num_image_tokens": config.num_query_tokens, **options},
            "vision_feature_select_strategy": "full",
        }

    def settings(self, model: VLMForConditionalGeneration, image: Image) -> dict[str, Any]:
        config = model.config
        if config.vision_feature_layer is not None or config.vision_feature_select_strategy != "full":
            raise UserError(
                f"{self.architecture} reads all of its encoder's output, the class token too: it can be made of a "
                "model trained without vision_feature_layer and with vision_feature_select_strategy: full"
            )
        if config.use_qformer_text_input != self.reads_text:
            raise UserError(
                f"{self.architecture} needs a model trained with use_qformer_text_input: {str(self.reads_text).lower()}"
            )
        self.check_own_size(config, image)
        given = {key: value for key, value in config.projector.items() if key != "type"}
        bound = inspect.signature(QFormerProjector).bind(0, 0, **given)
        bound.apply_defaults()
        options = {name: bound.arguments[name] for name in self.options}
        return {
            "qformer_config": {
                **options,
                "intermediate_size": 4 * options["hidden_size"],
                "encoder_hidden_size": config.vision_config.hidden_size,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            }
        }

    def check_language_model(self, model: VLMForConditionalGeneration) -> None:
        """It has a language model as it is, output layer and all."""

    def own_text_config(self, config: Any) -> PreTrainedConfig:
        return copy.deepcopy(config.text_config)

    def names(self, ours: VLMForConditionalGeneration) -> Iterator[tuple[str, str, Renamed | None]]:
        for name in ours.state_dict():
            part, _, inner = name.removeprefix("model.").partition(".")
            if part == "vision_tower":
                yield name, f"vision_model.{inner}", None
            elif part != "multi_modal_projector":
                yield name, f"language_model.{ours.language_head.name_in_causal_lm(name)}", None
            elif inner == "query_tokens":
                yield name, QUERIES.name, QUERIES
            elif not inner.startswith("standardize."):
                yield name, self._of_projector(inner), None

    def _of_projector(self, name: str) -> str:
        layer, _, kind = name.rpartition(".")
        if layer == "language_projection":
            return name
        if layer == "norm":
            return f"{self.norm}.{kind}"
        if layer in ("word_embeddings", "position_embeddings"):
            return f"qformer.embeddings.{name}"
        _, number, inner = layer.split(".", maxsplit=2)
        return f"qformer.encoder.layer.{number}.{IN_A_LAYER[inner]}.{kind}"

    def stock_processor(self, config: Any, processor: Any, image: Image) -> Any:
        self.check_prompt(processor)
        tokenizer = copy.deepcopy(processor.tokenizer)
        tokenizer.chat_template = None  # the processor writes the prompt
        return Blip2Processor(processor.image_processor, tokenizer, num_query_tokens=processor.image_seq_length)
