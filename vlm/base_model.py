"""The model without output head: pixels -> vision tower -> projector -> fusion -> decoder.

pixel_values [images, 3, H, W]
    -> vision_tower           [images, N, D_v]   any encoder, see `vlm.encoder`
    -> multi_modal_projector  [images, M, D_t]   visual tokens, see `vlm.adapters`
       with tiling, all this of tiles, whose tokens then make up those of images, see `vlm.tiling`
    -> prefix                 in place of the image tokens of `input_ids` [B, L]
       and/or cross_attention gated blocks between the decoder's layers, see `vlm.fusion`
    -> language_model         last_hidden_state [B, L, D_t]   the decoder of any AutoModelForCausalLM
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from vlm.adapters import AnyresMerger, TilePositions, VisionStates, build_projector
from vlm.arguments import known_arguments, refuse_unknown
from vlm.cache_state import is_recurrent, num_read
from vlm.configuration import VLMConfig
from vlm.encoder import VisionFeatures, encode, unsplittable, vision_hidden_size
from vlm.fusion import insert_cross_attention
from vlm.image_attention import attention_masks
from vlm.image_places import find_image_tokens, latest_image, require_whole_images, states_without_images
from vlm.image_rows import image_sizes_of, join_tiles, texts_of_tiles
from vlm.language_head import Takes, take_apart
from vlm.modeling_outputs import VLMModelOutput
from vlm.older_names import register_older_names
from vlm.precision import dtype_of
from vlm.pretrained_model import UNQUANTIZED, VLMPreTrainedModel
from vlm.vision_cache import keep_vision, kept_vision


class VLMModel(VLMPreTrainedModel):
    """A vision encoder joined to a decoder by a projector, as prefix, by cross-attention, or both; without output head.

    Args:
        vision_tower: the encoder; None makes a new one.
        language_model: the decoder, without the head of its causal language model; None makes a new one.
    """

    def __init__(
        self,
        config: VLMConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.vision_tower = vision_tower or AutoModel.from_config(config.vision_config)
        self.language_model = language_model or _new_decoder(config)
        self._no_split_modules = [*self._no_split_modules, *unsplittable(self.vision_tower, self.language_model)]
        layers = len(config.vision_feature_layer) if isinstance(config.vision_feature_layer, list) else 1
        hidden_size = config.vision_hidden_size or vision_hidden_size(self.vision_tower) * layers
        token_size = config.text_config.hidden_size
        if config.fusion == "cross_attention" and config.cross_attention_block == "idefics":
            token_size = hidden_size
        self.multi_modal_projector = build_projector(config.projector, hidden_size, token_size)
        if self.tiler is not None and self.tiler.type == "anyres":
            self.anyres_merger = AnyresMerger(config.text_config.hidden_size)
        if self.tiler is not None and config.uses_cross_attention:
            self.tile_positions = TilePositions(self.tiler.max_tiles, token_size)
        if config.uses_cross_attention:
            insert_cross_attention(
                self.language_model,
                config.cross_attention_every,
                config.cross_attention_layers,
                config.cross_attention_block,
                token_size,
            )
        self.known_arguments = known_arguments(self.language_model)
        self._decoder_takes = Takes(self.language_model)
        self._can_compile_fullgraph = self.language_model._can_compile_fullgraph
        if getattr(config, "quantization_config", None) is not None:
            # As in training: only the decoder is quantized. Many encoders do more with weights than multiply by them.
            self._keep_in_fp32_modules = [*UNQUANTIZED]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_vision_features(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """`[images, 3, H, W]` to what the projector reads: `[images, P + h * w, D_v]` and the grid `(h, w)`.

        This is the part that a frozen encoder computes once per image and that can be kept.
        """
        features = self._encode(pixel_values)
        return self._selected(features), features.grid

    def _encode(self, pixel_values: Tensor, **options: Any) -> VisionFeatures:
        pixel_values = pixel_values.to(dtype_of(self.vision_tower))
        return encode(self.vision_tower, pixel_values, self.config.vision_feature_layer, **options)

    def _selected(self, features: VisionFeatures) -> Tensor:
        """Return `[images, N, D_v]` of an encoder's features, with class and register tokens if they are configured."""
        if self.config.vision_feature_select_strategy == "full":
            return torch.cat([features.prefix, features.patches], dim=1)
        return features.patches

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_features: Tensor | None = None,
        vision_grid: tuple[int, int] | None = None,
        image_sizes: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Visual tokens of pixels, or of features that `get_vision_features` gave earlier.

        The output's `pooler_output` has the visual tokens `[M, D_t]` of each image, its `last_hidden_state` the
        features `[images, N, D_v]` that the projector reads, with tiling of tiles. Of pixels, it also has the encoder's
        `hidden_states` and `attentions` if they are asked for.

        Raises ValueError if images of this size do not become the tokens that stand for an image in `input_ids`, if
        tiles and `image_sizes` do not match, and if a Q-Former that reads texts is not given one for each image.
        """
        encoded = None
        if vision_features is None and pixel_values is not None:
            asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
            encoded = self._encode(pixel_values, **{k: v for k, v in asked.items() if v is not None})
            vision_features, vision_grid = self._selected(encoded), encoded.grid  # [images, N, D_v]
        if vision_features is None or vision_grid is None:
            raise ValueError("images come as pixel_values, or as vision_features together with vision_grid")
        dtype = dtype_of(self.multi_modal_projector)
        sizes = image_sizes_of(self.tiler, image_sizes, len(vision_features))
        texts = texts_of_tiles(self.config, qformer_input_ids, qformer_attention_mask, self.num_tiles(sizes))
        tokens = self.multi_modal_projector(vision_features.to(dtype), vision_grid, **texts)  # [images, M, D_t]
        if self.config.uses_prefix and tokens.shape[1] != self.config.image_seq_length:
            raise ValueError(
                f"images with a grid of {vision_grid[0]} x {vision_grid[1]} become {tokens.shape[1]} tokens; "
                f"this model's take {self.config.image_seq_length}. Let its own processor prepare the images."
            )
        if self.tiler is None:
            images = list(tokens)
        else:
            positions, merger = (getattr(self, name, None) for name in ("tile_positions", "anyres_merger"))
            images = join_tiles(tokens, sizes, self.tiler, positions, merger)
        pooled: Any = images  # as in LLaVA
        return BaseModelOutputWithPooling(
            last_hidden_state=vision_features,
            pooler_output=pooled,
            hidden_states=getattr(encoded, "hidden_states", None),
            attentions=getattr(encoded, "attentions", None),
        )

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
        vision_features: Tensor | None = None,
        vision_grid: tuple[int, int] | None = None,
        image_sizes: Tensor | None = None,
        vision_states: VisionStates | None = None,
        token_type_ids: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> VLMModelOutput:
        """Hidden states of `input_ids [B, L]`, whose image tokens stand for the images of `pixel_values
        [images, 3, H, W]`.

        `inputs_embeds [B, L, D_t]` may come in place of `input_ids`, with the embedding of the image token in the
        places of images. `attention_mask` is `[B, L]`, or `[B, 1, L, L]` boolean for rows that hold several
        conversations. `vision_features` and `vision_grid` (see `get_vision_features`) may come in place of
        `pixel_values`. With tiling both are of tiles, and `image_sizes [images, 2]`, each `(height, width)`, says which
        are one image. With a `cache`, images are those of the new tokens; it keeps what earlier tokens saw, unless
        `vision_states` say so. `token_type_ids [B, L]` say with `image_attention: prefix_lm` what is prompt (0) and
        what comes after it (1). `qformer_input_ids` and `qformer_attention_mask [images, T]` are the text that a
        Q-Former reads with each image. Other arguments go to the decoder. Raises ValueError if image tokens and images
        do not match, and TypeError for an argument that nothing reads.
        """
        refuse_unknown(kwargs, self.known_arguments)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # [B, L, D_t]
        input_ids, attention_mask, position_ids, token_type_ids = send_to_device(
            (input_ids, attention_mask, position_ids, token_type_ids), inputs_embeds.device
        )  # of a model that is split over devices, the embeddings may be on another one than the inputs
        images, seen = None, None
        if pixel_values is not None or vision_features is not None:
            seen = self.get_image_features(
                pixel_values,
                vision_features,
                vision_grid,
                image_sizes,
                qformer_input_ids,
                qformer_attention_mask,
                kwargs.get("output_hidden_states"),
                kwargs.get("output_attentions"),
                return_dict=True,
            )
            images = [tokens.to(inputs_embeds) for tokens in seen.pooler_output]  # of each image [M, D_t]
        image_mask = self.find_image_tokens(input_ids, inputs_embeds) if images or input_ids is not None else None
        attention_mask = attention_masks(
            self.config, inputs_embeds, attention_mask, cache, position_ids, token_type_ids, image_mask, bool(images)
        )
        vision_states = kept_vision(cache) if vision_states is None else vision_states
        if images and image_mask is not None:
            inputs_embeds, vision_states = self.fuse(
                inputs_embeds, images, image_mask, image_sizes, attention_mask, cache, vision_states
            )
        else:
            length, image_length = inputs_embeds.shape[1], self.config.image_seq_length
            vision_states = states_without_images(length, image_mask, image_length, cache, vision_states)
        outputs = self.decode(inputs_embeds, attention_mask, position_ids, cache, vision_states, kwargs)
        return VLMModelOutput(
            last_hidden_state=outputs.last_hidden_state,  # [B, L, D_t]
            cache=outputs.get("cache"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),  # recurrent decoders have none
            vision_states=vision_states,
            image_hidden_states=images,
            image_outputs=seen,
            decoder_outputs=outputs,
        )

    def find_image_tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return `[B, L]`, where the image tokens are in `input_ids`, or without them in `inputs_embeds`."""
        return find_image_tokens(self.config.image_token_id, input_ids, inputs_embeds, self.get_input_embeddings())

    def fuse(
        self,
        inputs_embeds: Tensor,
        images: Sequence[Tensor],
        image_mask: Tensor,
        image_sizes: Tensor | None,
        attention_mask: Any,
        cache: Cache | None,
        vision_states: VisionStates | None,
    ) -> tuple[Tensor, VisionStates | None]:
        """Return embeddings `[B, L, D_t]` with visual tokens in them, and what cross-attention looks at.

        Args:
            images: the visual tokens `[M, D_t]` of each image.
            image_mask: `[B, L]`, where the image tokens are.
            vision_states: what the last token of the `cache` sees.

        Raises ValueError if image tokens and images do not match.
        """
        image_tokens = self.image_tokens(image_sizes_of(self.tiler, image_sizes, len(images)))
        require_whole_images(image_mask, image_tokens, self.config.image_seq_length)
        if self.config.uses_prefix:
            inputs_embeds = inputs_embeds.masked_scatter(image_mask.unsqueeze(-1), torch.cat([*images]))
        if self.config.uses_cross_attention:
            index = latest_image(image_mask, image_tokens, attention_mask, num_read(cache))
            latest = VisionStates.of(images, index)
            vision_states = latest if vision_states is None else vision_states.followed_by(latest)
        return inputs_embeds, vision_states

    def decode(
        self,
        inputs_embeds: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: Cache | None,
        vision_states: VisionStates | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """Return the decoder's outputs for embeddings `[B, L, D_t]`, and keep in its cache what its tokens see."""
        if vision_states is not None:
            kwargs["vision_states"] = vision_states
        if cache is not None and is_recurrent(cache) and attention_mask is not None:
            attention_mask = attention_mask[:, -inputs_embeds.shape[1] :]  # Mamba wants that of the new tokens alone
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "cache": cache, **kwargs}
        outputs = self.language_model(inputs_embeds=inputs_embeds, **self._decoder_takes.of(given))
        if vision_states is not None:
            if not vision_states.read_by:
                raise RuntimeError(f"{type(self.language_model).__name__} dropped the images on the way to its layers")
            keep_vision(outputs.get("cache"), vision_states)
        return outputs


def _new_decoder(config: VLMConfig) -> PreTrainedModel:
    causal_lm = AutoModelForCausalLM.from_config(config.text_config)
    register_older_names(config.model_type, causal_lm)
    return take_apart(causal_lm)
