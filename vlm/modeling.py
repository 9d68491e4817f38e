"""The model with its output head: `vlm.base_model` -> last_hidden_state [B, L, D_t] -> logits [B, L, V].

The head is the rest of the causal language model whose decoder is in the base model, see `vlm.language_head`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from vlm.adapters import VisionStates
from vlm.arguments import known_arguments, refuse_unknown
from vlm.base_model import VLMModel
from vlm.configuration import VLMConfig
from vlm.generation_inputs import images_of_step, repeat_images
from vlm.image_attention import image_attention_masks, require_types
from vlm.image_places import require_whole_images
from vlm.image_rows import OF_IMAGES, image_sizes_of
from vlm.language_head import LanguageHead, take_apart
from vlm.modeling_outputs import VLMOutput
from vlm.older_names import register_older_names
from vlm.pretrained_model import UNQUANTIZED, VLMPreTrainedModel


class VLMForConditionalGeneration(VLMPreTrainedModel, GenerationMixin):
    """[`VLMModel`] with the output head of its causal language model.

    Args:
        vision_tower: the encoder; None makes a new one.
        language_model: a causal language model, which is taken apart; None makes a new one.
    """

    def __init__(
        self,
        config: VLMConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        causal_lm = language_model or AutoModelForCausalLM.from_config(config.text_config)
        register_older_names(config.model_type, causal_lm)
        self.known_arguments = known_arguments(causal_lm)
        self.language_head = LanguageHead(causal_lm)
        self.model = VLMModel(config, vision_tower, take_apart(causal_lm))
        self.language_head.move_to(self)
        if getattr(config, "quantization_config", None) is not None:  # quantizers look at the beginning of a name
            kept = {*(self._keep_in_fp32_modules or ()), *(f"model.{name}" for name in UNQUANTIZED)}
            self._keep_in_fp32_modules = kept
        self.known_arguments |= self.model.known_arguments
        self._can_compile_fullgraph = self.model._can_compile_fullgraph
        self.post_init()
        self.language_head.add_plans(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        name = self.language_head.output_embeddings
        return None if name is None else self.get_submodule(name)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if name := self.language_head.output_embeddings:
            self.set_submodule(name, new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers, and tell the head."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.language_head.set_vocab_size(embeddings.num_embeddings)
        return embeddings

    def get_vision_features(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """As [`VLMModel.get_vision_features`]."""
        return self.model.get_vision_features(pixel_values)

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As [`VLMModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        vision_features: Tensor | None = None,
        vision_grid: tuple[int, int] | None = None,
        image_sizes: Tensor | None = None,
        vision_states: VisionStates | None = None,
        logits_to_keep: int | Tensor = 0,
        token_type_ids: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> VLMOutput:
        """Logits, and with `labels [B, L]` the loss, of the hidden states of [`VLMModel`], which describes the other
        arguments. `logits_to_keep` and `labels` are those of the causal language model.
        """
        refuse_unknown(kwargs, self.known_arguments)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            vision_features=vision_features,
            vision_grid=vision_grid,
            image_sizes=image_sizes,
            vision_states=vision_states,
            token_type_ids=token_type_ids,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
            return_dict=True,
            **{name: value for name, value in kwargs.items() if name in self.model.known_arguments},
        )
        if isinstance(logits_to_keep, Tensor) and hasattr(self, "hf_device_map"):
            logits_to_keep = logits_to_keep.cpu()  # from there it indexes what is on any device
        head = self.language_head(
            self,
            outputs.decoder_outputs,
            attention_mask=attention_mask,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        return VLMOutput(
            loss=head.loss,
            logits=head.logits,  # [B, L, V]
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            vision_states=outputs.vision_states,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
        )

    def create_masks_for_generate(self, config: Any, *, token_type_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The decoder's masks `[B, 1, L, L]`, as `generate` asks for them before it calls `forward`; `token_type_ids`
        are those of [`image_attention_masks`]."""
        if self.config.image_attention == "prefix_lm":
            require_types(token_type_ids)
        if self.config.image_attention == "causal" or token_type_ids is None:
            create = getattr(self.language_head.causal_lm, "create_masks_for_generate", create_masks_for_generate)
            return create(config=config.get_text_config(), **kwargs)
        embeds, mask, cache, positions = (
            kwargs[name] for name in ("inputs_embeds", "attention_mask", "cache", "position_ids")
        )
        return image_attention_masks(config, embeds, mask, cache, positions, token_type_ids)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of `forward` in a step of `generate`."""
        if self.config.image_attention == "bidirectional":
            embeds = inputs_embeds if kwargs.get("is_first_iteration") else None
            ids = input_ids if embeds is None else None
            kwargs["token_type_ids"] = self.model.find_image_tokens(ids, embeds).long()
        inputs = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        return {**inputs, **images_of_step(kwargs)}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        types = model_kwargs.get("token_type_ids")
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        model_kwargs["vision_states"] = None  # the cache has them
        if types is not None and self.config.image_attention == "prefix_lm":
            # What is written is no prompt, and transformers repeats the last type.
            model_kwargs["token_type_ids"][:, types.shape[1] :] = 1
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        """Repeat rows for beams and samples, with their images."""
        given = {name: value for name in OF_IMAGES if (value := kwargs.pop(name, None)) is not None}
        if expand_size > 1 and given:
            sizes = image_sizes_of(self.tiler, given.get("image_sizes"), len(next(iter(given.values()))))
            image_mask = self.model.find_image_tokens(kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            image_tokens = self.image_tokens(sizes)
            require_whole_images(image_mask, image_tokens, self.config.image_seq_length)
            given = repeat_images(given, image_mask, image_tokens, self.num_tiles(sizes), expand_size)
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)  # type: ignore[misc]
        return input_ids, {**kwargs, **given}
