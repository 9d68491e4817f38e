"""A new model from a vision encoder, a language model and the description of a bridge."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from vlm.adapters import build_projector, unknown_name
from vlm.chat_templates import CHATML, TemplateName, chat_template_for, ends_with_eos, tokens_of
from vlm.configuration import VLMConfig
from vlm.encoder import encode, load_vision_tower, mllama_feature_layers, resize_positions
from vlm.image_processors import ImageAspectRatio, ImageSize, image_size_of, keep_tiles_whole, load_image_processor
from vlm.loading import checkpoint_of, load_quietly, reading
from vlm.modeling import VLMForConditionalGeneration
from vlm.processing import IMAGE_TOKEN, VLMProcessor, pad_left
from vlm.tiling import MAX_TILES, tiler_of
from vlm.vision_towers import VisionTowers, side_by_side


def build(
    vision: str | Sequence[str],
    language: str,
    *,
    image_size: ImageSize | Sequence[ImageSize] | None = None,
    image_aspect_ratio: ImageAspectRatio = "square",
    chat_template: TemplateName = "auto",
    image_markers: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    **bridge: Any,
) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """Join the encoder `vision` and the decoder `language`, each a folder or a Hub name; several encoders of a list see
    an image side by side ([`vlm.vision_towers`]).

    `bridge` are arguments of [`VLMConfig`], such as `projector`, `fusion` and `vision_feature_layer`, and `tiling`,
    which is `{"type": "tiles" | "anyres", "max_tiles": ...}` (see [`vlm.tiling.Tiler`]). `image_size` and
    `image_aspect_ratio` are those of [`load_vision`]. `chat_template` is a name of [`chat_template_for`].
    `image_markers` are written before and after each image; what is in angle brackets in them becomes a token. Weights
    are float32.

    Raises ValueError for an unknown projector or option, a decoder that has no place for cross-attention, a tokenizer
    without the tokens of the chat template, an image processor whose images differ in size, encoders whose grids
    differ, and tiling that does not go with the projector or the fusion.
    """
    require_arguments(bridge)  # before the weights are read
    vision_tower, image_processor = load_vision(
        vision, image_size=image_size, image_aspect_ratio=image_aspect_ratio, trust_remote_code=trust_remote_code
    )
    with reading(language, kind="a language model"):
        language_model = load_quietly(
            AutoModelForCausalLM, language, dtype="float32", trust_remote_code=trust_remote_code
        )
    with reading(language, "tokenizer", kind="a language model"):
        tokenizer = AutoTokenizer.from_pretrained(language, trust_remote_code=trust_remote_code)
    return assemble(
        vision_tower,
        language_model,
        image_processor,
        tokenizer,
        chat_template=chat_template,
        image_markers=image_markers,
        **bridge,
    )


def load_vision(
    names: str | Sequence[str],
    *,
    image_size: ImageSize | Sequence[ImageSize] | None = None,
    image_aspect_ratio: ImageAspectRatio = "square",
    pooled: bool = False,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A vision encoder and its image processor, or several as one; of a run folder its model's.

    `image_size` is the side in pixels that images are brought to, `{"height": ..., "width": ...}`, or a list with one
    for each encoder; None is the encoder's own. `image_aspect_ratio` is `square`, the encoder's own resize and crop, or
    `pad`, which pads to a square with the mean colour. Raises ValueError as [`load_image_processor`] and
    [`load_vision_tower`], whose `pooled` this is.
    """
    names = [checkpoint_of(name) for name in ([names] if isinstance(names, str) else names)]
    sizes = image_size if isinstance(image_size, list | tuple) else [image_size] * len(names)
    if len(sizes) != len(names):
        raise ValueError(f"image_size has {len(sizes)} sizes for {len(names)} encoders; give each one, or one for all")
    towers, image_processors = [], []
    for name, size in zip(names, sizes, strict=True):
        with reading(name, kind="a vision encoder"):
            tower = load_vision_tower(name, pooled=pooled, trust_remote_code=trust_remote_code)
        with reading(name, "image processor", kind="a vision encoder"):
            image_processor = load_image_processor(
                name, image_size=size, image_aspect_ratio=image_aspect_ratio, trust_remote_code=trust_remote_code
            )
            resize_positions(tower, *image_size_of(image_processor))
        towers.append(tower)
        image_processors.append(image_processor)
    return (towers[0], image_processors[0]) if len(names) == 1 else side_by_side(towers, image_processors)


def assemble(
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    image_processor: Any,
    tokenizer: Any,
    *,
    tiling: dict[str, Any] | None = None,
    chat_template: TemplateName = "auto",
    image_markers: Sequence[str] | None = None,
    **bridge: Any,
) -> tuple[VLMForConditionalGeneration, VLMProcessor]:
    """As [`build`], from loaded parts. The image token is added to the tokenizer and to the embeddings if need be.

    `vision_feature_layer` may be `mllama`: [`vlm.encoder.mllama_feature_layers`] says which that is.
    """
    require_arguments(bridge)
    template = chat_template_for(tokenizer, chat_template, image_markers=image_markers or ("", ""))
    add_image_token(tokenizer, language_model, tokens_of(image_markers or ()))
    if bridge.get("vision_feature_layer") == "mllama":
        bridge["vision_feature_layer"] = mllama_feature_layers(vision_tower)
    if tiling is not None:
        image_processor = keep_tiles_whole(image_processor)
    vision_config, text_config = copy.deepcopy((vision_tower.config, language_model.config))
    untiled = VLMConfig(vision_config=vision_config, text_config=text_config, **bridge)
    num_tokens, width, token_grid = probe_encoder(vision_tower, image_processor, untiled)
    if tiling is not None:
        tiling = {"max_tiles": MAX_TILES, **tiling, "tile_size": image_size_of(image_processor)}
        if tiling.get("type") == "anyres":
            if token_grid is None:
                raise ValueError(
                    "tiling of type anyres lays tokens out on a grid, and those of this projector "
                    f"({untiled.projector['type']}) lie on none, or class tokens are among them: choose another "
                    "projector, vision_feature_select_strategy: default, or tiling of type tiles"
                )
            tiling["token_grid"] = token_grid
    if (tiler := tiler_of(tiling)) is not None:
        add_markers(tokenizer, language_model, tiler.markers())
    if untiled.use_qformer_text_input:  # in the words of the language model, which are all there now
        bridge["projector"] = untiled.projector | {"vocab_size": len(tokenizer)}
    attention = [part.config._attn_implementation for part in (vision_tower, language_model)]
    config = VLMConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        tiling=tiling,
        vision_hidden_size=width,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=num_tokens if untiled.uses_prefix else 1,
        **bridge,
    )
    # A nesting configuration resets the attention implementation that each part was loaded with.
    for part, implementation in zip((vision_tower, language_model), attention, strict=True):
        part.config._attn_implementation = implementation
    model = VLMForConditionalGeneration(config, vision_tower, language_model)
    model.generation_config = generation_config_for(language_model, tokenizer, template)
    if model.tiler is not None:
        model.generation_config.suppress_tokens += tokenizer.convert_tokens_to_ids(list(model.tiler.markers()))
    processor = VLMProcessor(
        image_processor,
        tokenizer,
        template,
        config.image_seq_length,
        tiling=tiling,
        image_attention=config.image_attention,
        qformer_tokenizer=qformer_tokenizer_for(model, tokenizer) if config.use_qformer_text_input else None,
    )
    return model, processor


def qformer_tokenizer_for(model: VLMForConditionalGeneration, tokenizer: Any) -> Any:
    """The language model's `tokenizer` for a Q-Former that reads texts, cut to the places that it has."""
    projector: Any = model.model.multi_modal_projector
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    tokenizer.model_max_length = projector.position_embeddings.num_embeddings
    return tokenizer


def require_arguments(bridge: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that [`VLMConfig`] does not know: it would keep it in silence."""
    for name in bridge.keys() - VLMConfig.__annotations__.keys():
        raise unknown_name("option", name, VLMConfig.__annotations__)


def add_image_token(tokenizer: Any, language_model: PreTrainedModel, others: Sequence[str] = ()) -> None:
    """Give the tokenizer the image token, `others` and padding on the left, and the language model an embedding for
    each new token.

    The embeddings that are there stay as they are; new ones are drawn around their mean, so that a token nobody has
    trained is neither likely nor impossible. Raises ValueError if the tokenizer has no token to pad with.
    """
    # Replaced, the tokenizer's other special tokens (`<|im_start|>` ...) would be special no more.
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN, *others]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError("the tokenizer has neither a padding token nor an end-of-sequence token; set one of them")
    pad_left(tokenizer)
    embed_all_tokens(tokenizer, language_model)


@torch.no_grad()
def add_markers(tokenizer: Any, language_model: PreTrainedModel, markers: dict[str, str]) -> None:
    """Give the tokenizer the markers of tiles, and the language model an embedding for each: the mean of those of its
    words, so that a language model that stays frozen can tell one from another too. Those it knows stay as they are."""
    new = [marker for marker in markers if marker not in tokenizer.get_added_vocab()]
    tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    embed_all_tokens(tokenizer, language_model)
    weight: Any = language_model.get_input_embeddings().weight
    for marker in new:
        words = tokenizer(markers[marker], add_special_tokens=False)["input_ids"]
        weight[tokenizer.convert_tokens_to_ids(marker)] = weight[words].mean(dim=0)


def embed_all_tokens(tokenizer: Any, language_model: PreTrainedModel) -> None:
    """Make room for tokens that were added to the tokenizer."""
    embeddings: Any = language_model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # a notice on how new embeddings are drawn, which is as intended
        try:
            language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
        finally:
            logging.set_verbosity(verbosity)


def generation_config_for(language_model: PreTrainedModel, tokenizer: Any, template: str) -> GenerationConfig:
    """The language model's own, made to stop at the end of a turn and never to write the image token."""
    config = copy.deepcopy(language_model.generation_config) or GenerationConfig()
    config.pad_token_id = tokenizer.pad_token_id
    config.suppress_tokens = [tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)]
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = [stop for stop in stops if stop is not None] or [tokenizer.eos_token_id]
    if template.endswith(CHATML):
        stops.append(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    elif ends_with_eos(template):
        stops.append(tokenizer.eos_token_id)
    config.eos_token_id = list(dict.fromkeys(stops))
    return config


@torch.no_grad()
def probe_encoder(
    vision_tower: PreTrainedModel, image_processor: Any, config: VLMConfig
) -> tuple[int, int, tuple[int, int] | None]:
    """How many visual tokens an image becomes, how wide the encoder's features are, and the grid that the tokens lie on
    (None if they lie on none).

    Found by running the encoder on a blank image: no configuration says it for every encoder. Raises ValueError for
    class tokens of several encoders.
    """
    keep_prefix = config.vision_feature_select_strategy == "full"
    if keep_prefix and isinstance(vision_tower, VisionTowers):
        raise ValueError(
            "vision_feature_select_strategy full is for one encoder: several have no class token in common"
        )
    image_size_of(image_processor)  # one for all images, or an error
    blank = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    training = vision_tower.training
    pixels = blank.to(vision_tower.device, vision_tower.dtype)
    features = encode(vision_tower.eval(), pixels, config.vision_feature_layer)
    vision_tower.train(training)
    width = features.patches.shape[-1]
    num_prefix = features.prefix.shape[1] if keep_prefix else 0
    with torch.device("meta"):
        projector = build_projector(config.projector, width, width)
    num_tokens: int = projector.num_tokens(num_prefix, features.grid)
    token_grid = projector.token_grid(features.grid)
    on_grid = token_grid is not None and token_grid[0] * token_grid[1] == num_tokens  # no class tokens among them
    return num_tokens, width, token_grid if on_grid else None
