"""The model: pixels -> vision tower -> projector -> fusion -> language model.

pixel_values [images, 3, H, W]
    -> vision_tower           [images, N, D_v]   any encoder, see `vlm.encoder`
    -> multi_modal_projector  [images, M, D_t]   visual tokens, see `vlm.adapters`
       with tiling, all this of tiles, whose tokens then make up those of images, see `vlm.tiling`
    -> prefix                 in place of the image tokens of `input_ids` [B, L]
       and/or cross_attention gated blocks between the decoder's layers, see `vlm.fusion`
    -> language_model         logits [B, L, V]   any AutoModelForCausalLM
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.initialization import guard_torch_init_functions
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from vlm.adapters import (
    PROJECTORS,
    AnyresMerger,
    GatedCrossAttention,
    TilePositions,
    VisionStates,
    build_projector,
)
from vlm.arguments import known_arguments, refuse_unknown
from vlm.configuration import VLMConfig
from vlm.encoder import encode, unsplittable, vision_hidden_size
from vlm.fusion import insert_cross_attention
from vlm.image_attention import image_attention_masks
from vlm.precision import dtype_of
from vlm.tiling import Size, Tiler, tiler_of
from vlm.vision_cache import keep_vision, kept_vision

OF_TILES = ("pixel_values", "vision_features")
OF_IMAGES = (*OF_TILES, "image_sizes", "qformer_input_ids", "qformer_attention_mask")
"""Arguments of `forward` with a row for each image, the first two with one for each tile."""


@dataclass
class VLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` and, with cross-attention, the `vision_states` that the next tokens look at."""

    vision_states: Any = None


def has_read(cache: Cache | None) -> bool:
    """Whether there are tokens in a cache."""
    if cache is None or not cache.layers:
        return False
    return cache.has_previous_state() if is_recurrent(cache) else cache.get_seq_length() > 0


def is_recurrent(cache: Cache) -> bool:
    """Whether a cache is of recurrent layers alone (Mamba), and does not count its tokens."""
    return not any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def num_read(cache: Cache | None) -> int:
    """How many tokens are in a cache that counts them."""
    return 0 if cache is None or not cache.layers or is_recurrent(cache) else int(cache.get_seq_length())


class VLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A vision encoder joined to a language model by a projector, as prefix, by cross-attention, or both."""

    config_class = VLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # as every model of transformers has it
    supports_gradient_checkpointing = True
    _no_split_modules = [  # noqa: RUF012 - the parts add their own
        "FusedDecoderLayer",
        "TilePositions",
        "AnyresMerger",
        *(projector.__name__ for projector in PROJECTORS.values()),
    ]
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: VLMConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.vision_tower = vision_tower or AutoModel.from_config(config.vision_config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self._no_split_modules = [*self._no_split_modules, *unsplittable(self.vision_tower, self.language_model)]
        layers = len(config.vision_feature_layer) if isinstance(config.vision_feature_layer, list) else 1
        hidden_size = config.vision_hidden_size or vision_hidden_size(self.vision_tower) * layers
        token_size = config.text_config.hidden_size
        if config.fusion == "cross_attention" and config.cross_attention_block == "idefics":
            token_size = hidden_size
        self.multi_modal_projector = build_projector(config.projector, hidden_size, token_size)
        self.tiler = tiler_of(config.tiling)
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
        self._known_arguments = known_arguments(self.language_model)
        if getattr(config, "quantization_config", None) is not None:
            # As in training: only the decoder is quantized. Many encoders do more with weights than multiply by them.
            self._keep_in_fp32_modules = ["vision_tower", "multi_modal_projector"]
        self.post_init()

    @torch.no_grad()
    @guard_torch_init_functions()
    def initialize_weights(self) -> None:
        """Initialize what no checkpoint had. Cross-attention comes first: its norms start at 1, those of a decoder that
        it would be taken for a part of may start at 0 (Gemma)."""
        blocks = [module for module in self.modules() if isinstance(module, GatedCrossAttention)]
        for module in chain.from_iterable(block.modules() for block in blocks):
            self._initialize_weights(module, self.is_custom_code())
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "reset_own"):
            module.reset_own()  # type: ignore[operator]  # a method

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_vision_features(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """`[images, 3, H, W]` to what the projector reads: `[images, P + h * w, D_v]` and the grid `(h, w)`.

        This is the part that a frozen encoder computes once per image and that can be kept.
        """
        pixel_values = pixel_values.to(dtype_of(self.vision_tower))
        features = encode(self.vision_tower, pixel_values, self.config.vision_feature_layer)
        if self.config.vision_feature_select_strategy == "full":
            return torch.cat([features.prefix, features.patches], dim=1), features.grid
        return features.patches, features.grid

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_features: Tensor | None = None,
        vision_grid: tuple[int, int] | None = None,
        image_sizes: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> Sequence[Tensor]:
        """Visual tokens `[images, M, D_t]` of pixels, or of features that `get_vision_features` gave earlier; with
        tiling a list, of `[tokens, D_t]` for each image.

        Raises ValueError if images of this size do not become the tokens that stand for an image in `input_ids`, if
        tiles and `image_sizes` do not match, and if a Q-Former that reads texts is not given one for each image.
        """
        if vision_features is None and pixel_values is not None:
            vision_features, vision_grid = self.get_vision_features(pixel_values)
        if vision_features is None or vision_grid is None:
            raise ValueError("images come as pixel_values, or as vision_features together with vision_grid")
        dtype = dtype_of(self.multi_modal_projector)
        sizes = self._sizes(image_sizes, len(vision_features))
        texts = self._texts(qformer_input_ids, qformer_attention_mask, self.num_tiles(sizes))
        visual_tokens = self.multi_modal_projector(vision_features.to(dtype), vision_grid, **texts)
        if self.config.uses_prefix and visual_tokens.shape[1] != self.config.image_seq_length:
            raise ValueError(
                f"images with a grid of {vision_grid[0]} x {vision_grid[1]} become {visual_tokens.shape[1]} tokens; "
                f"this model's take {self.config.image_seq_length}. Let its own processor prepare the images."
            )
        if self.tiler is None:
            return visual_tokens
        return self._of_images(visual_tokens, sizes, self.tiler)

    def _texts(self, ids: Tensor | None, mask: Tensor | None, tiles: list[int]) -> dict[str, Tensor]:
        """What the projector reads beside each tile: of texts `[images, T]` that of the tile's image."""
        if not self.config.use_qformer_text_input:
            return {}
        if ids is None or len(ids) != len(tiles):
            given = "none" if ids is None else str(len(ids))
            raise ValueError(
                f"the Q-Former reads a text with each image: {len(tiles)} images need as many rows of "
                f"qformer_input_ids, and there are {given}. Let the processor prepare text and images together"
            )
        texts = {"qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids) if mask is None else mask}
        if self.tiler is None:
            return texts
        repeats = torch.tensor(tiles, device=ids.device)
        return {name: value.repeat_interleave(repeats, dim=0) for name, value in texts.items()}

    def num_tiles(self, image_sizes: Sequence[Size]) -> list[int]:
        """How many rows of `pixel_values` each image is: 1 without tiling."""
        return [1 if self.tiler is None else self.tiler.num_tiles(size) for size in image_sizes]

    def image_tokens(self, image_sizes: Sequence[Size]) -> list[int]:
        """How many tokens of `input_ids` stand for each image. Sizes, `(height, width)`, only matter with tiling."""
        length = self.config.image_seq_length
        return [length if self.tiler is None else self.tiler.num_image_tokens(size, length) for size in image_sizes]

    def _sizes(self, image_sizes: Tensor | None, num_images: int) -> list[Size]:
        """`image_sizes [images, 2]` as a list; without tiling, where they say nothing, one for each image."""
        if self.tiler is None:
            return [(0, 0)] * num_images
        if image_sizes is None:
            raise ValueError("images that come in tiles need image_sizes, which the processor gives with pixel_values")
        return [(height, width) for height, width in image_sizes.tolist()]

    def _of_images(self, visual_tokens: Tensor, sizes: list[Size], tiler: Tiler) -> list[Tensor]:
        """The tokens `[tokens, D_t]` of each image, from those of all tiles `[tiles, M, D_t]`."""
        tiles = self.num_tiles(sizes)
        if sum(tiles) != len(visual_tokens):
            raise ValueError(
                f"{len(tiles)} images of these image_sizes have {sum(tiles)} tiles, and {len(visual_tokens)} came. "
                "Let the processor cut the images."
            )
        if self.config.uses_cross_attention:
            places = [place for size in sizes for place in tiler.places(size)]
            visual_tokens = self.tile_positions(visual_tokens, torch.tensor(places, device=visual_tokens.device))
        images = visual_tokens.split(tiles)
        if tiler.type != "anyres":
            return [image.flatten(0, 1) for image in images]
        return [
            self.anyres_merger(image, tiler.grid(size), tiler.token_grid, tiler.unpadded(size))
            for image, size in zip(images, sizes, strict=True)
        ]

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
        """Logits of `input_ids [B, L]`, whose image tokens stand for the images of `pixel_values [images, 3, H, W]`.

        `attention_mask` is `[B, L]`, or `[B, 1, L, L]` boolean for rows that hold several conversations.
        `vision_features` and `vision_grid` (see `get_vision_features`) may come in place of `pixel_values`. With tiling
        both are of tiles, and `image_sizes [images, 2]`, each `(height, width)`, says which are one image. With a
        `cache`, images are those of the new tokens; it keeps what earlier tokens saw, unless `vision_states` say so.
        `token_type_ids [B, L]` say with `image_attention: prefix_lm` what is prompt (0) and what comes behind it (1).
        `qformer_input_ids` and `qformer_attention_mask [images, T]` are the text that a Q-Former reads with each image.
        Other arguments go to the language model. Raises ValueError if image tokens and images do not match, and
        TypeError for an argument that nothing reads.
        """
        refuse_unknown(kwargs, self._known_arguments)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        input_ids, attention_mask, position_ids, token_type_ids = send_to_device(
            (input_ids, attention_mask, position_ids, token_type_ids), inputs_embeds.device
        )  # of a model that is split over devices, the embeddings may be on another one than the inputs
        has_images = pixel_values is not None or vision_features is not None
        vision_states = kept_vision(cache) if vision_states is None else vision_states
        token_type_ids = self._token_types(input_ids, has_images, cache, attention_mask, token_type_ids)
        if token_type_ids is not None:
            attention_mask = image_attention_masks(
                self.config, inputs_embeds, attention_mask, cache, position_ids, token_type_ids
            )
        if has_images:
            images = self.get_image_features(
                pixel_values, vision_features, vision_grid, image_sizes, qformer_input_ids, qformer_attention_mask
            )
            images = [visual_tokens.to(inputs_embeds) for visual_tokens in images]
            image_tokens = self.image_tokens(self._sizes(image_sizes, len(images)))
            image_mask = self._image_mask(input_ids, image_tokens)
            if self.config.uses_prefix:
                inputs_embeds = inputs_embeds.masked_scatter(image_mask.unsqueeze(-1), torch.cat(images))
            if self.config.uses_cross_attention:
                index = self._image_index(image_mask, image_tokens, attention_mask, num_read(cache))
                latest = VisionStates.of(images, index)
                vision_states = vision_states.followed_by(latest) if vision_states is not None else latest
        elif vision_states is not None:
            vision_states = vision_states.for_next_tokens(inputs_embeds.shape[1])
        elif input_ids is not None and not has_read(cache):
            self._image_mask(input_ids, [])
        if vision_states is not None:
            kwargs["vision_states"] = vision_states
        if cache is not None and is_recurrent(cache) and attention_mask is not None:
            attention_mask = attention_mask[:, -inputs_embeds.shape[1] :]  # Mamba wants that of the new tokens alone
        if isinstance(logits_to_keep, Tensor) and hasattr(self, "hf_device_map"):
            logits_to_keep = logits_to_keep.cpu()  # from there it indexes what is on any device
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if vision_states is not None and not vision_states.read_by:
            raise RuntimeError(f"{type(self.language_model).__name__} dropped the images on the way to its layers")
        if vision_states is not None:
            keep_vision(outputs.get("cache"), vision_states)
        return VLMOutput(
            loss=outputs.loss,
            logits=outputs.logits,
            cache=outputs.get("cache"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),  # recurrent decoders have none
            vision_states=vision_states,
        )

    def _token_types(
        self, input_ids: Tensor | None, has_images: bool, cache: Any, attention_mask: Any, token_type_ids: Tensor | None
    ) -> Tensor | None:
        """`[B, L]`, as [`image_attention_masks`] takes them; None if the decoder's own masks will do. Raises ValueError
        if nothing says where a prompt ends."""
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.ndim == 4):
            return None
        if self.config.image_attention == "bidirectional":
            if not has_images or not self.config.uses_prefix or input_ids is None:
                return None
            return (input_ids == self.config.image_token_id).long()
        if self.config.image_attention == "causal" or has_read(cache):
            return None
        return _require_types(token_type_ids)

    def _image_mask(self, input_ids: Tensor | None, image_tokens: list[int]) -> Tensor:
        """`[B, L]`, where the image tokens are. Raises ValueError unless they make whole images, of `image_tokens`
        tokens each."""
        if input_ids is None:
            raise ValueError("images need input_ids, whose image tokens say where they belong; inputs_embeds have none")
        image_mask = input_ids == self.config.image_token_id
        counts = image_mask.sum(dim=1).tolist()
        if sum(counts) != sum(image_tokens):
            same = set(image_tokens) or {self.config.image_seq_length}
            of = f" of {same.pop()} tokens" if len(same) == 1 else ""
            raise ValueError(
                f"input_ids hold {sum(counts)} image tokens; {len(image_tokens)} images{of} need {sum(image_tokens)}. "
                "Let the processor expand the image tokens, and pass its pixel_values."
            )
        ends = set(accumulate(image_tokens, initial=0))
        for row, end in enumerate(accumulate(counts)):
            if end not in ends:
                image = image_tokens[bisect_left([*accumulate(image_tokens)], end)]
                raise ValueError(f"row {row} of input_ids holds {counts[row]} image tokens, and an image takes {image}")
        return image_mask

    def _image_index(
        self, image_mask: Tensor, image_tokens: list[int], attention_mask: Any, num_read: int = 0
    ) -> Tensor:
        """`[B, L]`: the number, over all rows, of the latest image that each token may look at; -1 for none. The
        cache has `num_read` tokens before them."""
        tokens = torch.tensor(image_tokens, device=image_mask.device)
        ordinal = torch.full(image_mask.shape, -1, device=image_mask.device)
        ordinal[image_mask] = torch.arange(len(tokens), device=image_mask.device).repeat_interleave(tokens)
        if isinstance(attention_mask, dict):  # of a decoder that has sliding layers, made for a static cache
            attention_mask = attention_mask["full_attention"]
        if attention_mask is None or attention_mask.ndim == 2:
            return ordinal.cummax(dim=1).values
        # A static cache's mask is wider than what is in it.
        visible = attention_mask[:, 0, :, num_read : num_read + image_mask.shape[1]]
        visible = visible if visible.dtype == torch.bool else visible == 0
        return ordinal[:, None, :].masked_fill(~visible, -1).amax(dim=-1)

    def create_masks_for_generate(self, config: Any, *, token_type_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """The decoder's masks `[B, 1, L, L]`, as `generate` asks for them before it calls `forward`; `token_type_ids`
        are those of [`image_attention_masks`]."""
        if self.config.image_attention == "prefix_lm":
            _require_types(token_type_ids)
        if self.config.image_attention == "causal" or token_type_ids is None:
            create = getattr(self.language_model, "create_masks_for_generate", create_masks_for_generate)
            return create(config=config.get_text_config(), **kwargs)
        embeds, mask, cache, positions = (
            kwargs[name] for name in ("inputs_embeds", "attention_mask", "cache", "position_ids")
        )
        return image_attention_masks(config, embeds, mask, cache, positions, token_type_ids)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        if self.config.image_attention == "bidirectional":
            kwargs["token_type_ids"] = (input_ids == self.config.image_token_id).long()
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        # The images are in the cache after the first step; without a cache every step reads them again.
        if not kwargs.get("use_cache", True):
            inputs["vision_states"] = None
        elif not kwargs.get("is_first_iteration"):
            # A model that drafts for another begins without an iteration that is called the first.
            unread = not has_read(kwargs.get("cache"))
            inputs |= {name: kwargs.get(name) if unread else None for name in OF_IMAGES}
        return inputs

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
        """Repeat rows for beams and samples; a row's images stay together and in order."""
        expanded: dict[str, Tensor] = {}
        given = {name: kwargs.pop(name, None) for name in OF_IMAGES}
        given = {name: value for name, value in given.items() if value is not None}
        if expand_size > 1 and given:
            sizes = self._sizes(given.get("image_sizes"), len(next(iter(given.values()))))
            image_tokens = self.image_tokens(sizes)
            image_mask = self._image_mask(kwargs.get("input_ids"), image_tokens)
            ends = [0, *accumulate(image_tokens)]
            last = [ends.index(end) for end in accumulate(image_mask.sum(dim=1).tolist(), initial=0)]
            for name, value in given.items():
                parts = self.num_tiles(sizes) if name in OF_TILES else [1] * len(sizes)
                counts = [sum(parts[start:end]) for start, end in pairwise(last)]
                rows = [row.repeat(expand_size, *[1] * (row.ndim - 1)) for row in value.split(counts)]
                expanded[name] = torch.cat(rows)
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, *args, **kwargs)  # type: ignore[misc]
        return input_ids, {**kwargs, **given, **expanded}


def _require_types(token_type_ids: Tensor | None) -> Tensor:
    if token_type_ids is None:
        raise ValueError(
            "image_attention: prefix_lm needs token_type_ids, 0 in the prompt and 1 behind it: let the processor "
            "prepare the text, by its chat template or by itself"
        )
    return token_type_ids
