"""A vision encoder and a text encoder whose vectors lie in one space, as CLIP's do (arXiv 2103.00020).

pixels -> vision_model -> pooled [B, D_v] -> visual_projection -> [B, D]
tokens -> text_model   -> pooled [T, D_t] -> text_projection   -> [T, D]

`VisionTextDualEncoderModel` of transformers is the same with encoders that pool by themselves. Here any encoder of
`vlm.encoder` will do, timm's and convolutional ones too, and text is pooled as the text encoder was trained to be.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    VisionTextDualEncoderProcessor,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils import can_return_tuple

from vlm.adapters.contrastive_loss import infonce, sigmoid
from vlm.build import load_vision
from vlm.encoder import encode, unsplittable
from vlm.loading import checkpoint_of, load_quietly, reading
from vlm.precision import dtype_of

TextPooling = Literal["mean", "cls", "last", "pooler"]
MAX_LOGIT_SCALE = 100.0
"""CLIP's limit: cosines are never multiplied with more."""


class DualEncoderConfig(PreTrainedConfig):
    """Configuration of [`DualEncoderModel`].

    Args:
        vision_config: any configuration `AutoModel` knows, timm's through `TimmWrapperConfig`.
        text_config: any configuration `AutoModel` knows for text.
        vision_pooled_size: the width of what the vision encoder pools an image into.
        projection_dim: the width of the common space.
        text_pooling: what of the text encoder's last states is a text's vector: their `mean` (Sentence-BERT, arXiv
            1908.10084), the first (`cls`), the `last`, or the encoder's own `pooler`.
        projection_dropout: the share of what is pooled that is left out at random, in training, before it is projected.
        logit_scale_init_value: logarithm of what cosines are multiplied with at first.
        logit_bias_init_value: what is added then, as SigLIP does (arXiv 2303.15343); `None`, as CLIP, nothing.
    """

    model_type = "vlm_dual_encoder"
    sub_configs_defaults = {  # noqa: RUF012 - the name and form transformers looks for
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    vision_config: Any = None
    text_config: Any = None
    vision_pooled_size: int = 768
    projection_dim: int = 512
    text_pooling: TextPooling = "mean"
    projection_dropout: float = 0.0
    logit_scale_init_value: float = math.log(1 / 0.07)
    logit_bias_init_value: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_pooling not in get_args(TextPooling):
            raise ValueError(f"text_pooling is one of {', '.join(get_args(TextPooling))}, not {self.text_pooling!r}")
        super().__post_init__(**kwargs)


class DualEncoderModel(PreTrainedModel):
    """Images and texts as vectors of one space; names and outputs are those of `CLIPModel`."""

    config_class = DualEncoderConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # as every model of transformers has it
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: DualEncoderConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.vision_model = vision_model or AutoModel.from_config(config.vision_config)
        self.text_model = text_model or AutoModel.from_config(config.text_config)
        self.visual_projection = nn.Linear(config.vision_pooled_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self._no_split_modules = unsplittable(self.vision_model, self.text_model)
        self.dropout = nn.Dropout(config.projection_dropout)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        if config.logit_bias_init_value is not None:
            self.logit_bias = nn.Parameter(torch.tensor(config.logit_bias_init_value))
        if getattr(config, "quantization_config", None) is not None:
            # Many encoders do more with their weights than multiply by them.
            self._keep_in_fp32_modules = ["vision_model", "visual_projection", "text_projection"]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The projections as in `CLIPModel`; encoders know their own."""
        if module in (self.visual_projection, self.text_projection):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif module is self:
            nn.init.constant_(self.logit_scale, self.config.logit_scale_init_value)
            if self.config.logit_bias_init_value is not None:
                nn.init.constant_(self.logit_bias, self.config.logit_bias_init_value)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """`pixel_values [B, 3, H, W]`; `pooler_output [B, D]`, not normalised, and the patch embeddings.

        Raises ValueError for an encoder that does not pool what it sees.
        """
        seen = encode(self.vision_model, pixel_values.to(dtype_of(self.vision_model)))
        if seen.pooled is None:
            raise ValueError(f"{type(self.vision_model).__name__} does not pool what it sees into one vector")
        return BaseModelOutputWithPooling(
            last_hidden_state=seen.patches,
            pooler_output=self.visual_projection(self.dropout(seen.pooled.to(dtype_of(self.visual_projection)))),
        )

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """`input_ids`, `attention_mask` and, of encoders that have them, `token_type_ids`, `[T, L]`, padded on either
        side; `pooler_output [T, D]`, not normalised."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        types = {}
        if "token_type_ids" in inspect.signature(self.text_model.forward).parameters:
            types = {"token_type_ids": token_type_ids}
        elif token_type_ids is not None and token_type_ids.any():
            raise ValueError(f"{type(self.text_model).__name__} has no token types; leave out token_type_ids")
        read = self.text_model(input_ids=input_ids, attention_mask=mask, **types, return_dict=True)
        pooled = pool_text(read, mask, self.config.text_pooling).to(dtype_of(self.text_projection))
        return BaseModelOutputWithPooling(
            last_hidden_state=read.last_hidden_state, pooler_output=self.text_projection(self.dropout(pooled))
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
        token_type_ids: Tensor | None = None,
    ) -> CLIPOutput:
        """As `CLIPModel`; the loss, of one text an image, is SigLIP's if there is a bias."""
        seen: Any = self.get_image_features(pixel_values)
        read: Any = self.get_text_features(input_ids, attention_mask, token_type_ids)
        image_embeds, text_embeds = (nn.functional.normalize(each.pooler_output, dim=-1) for each in (seen, read))
        text_embeds = text_embeds.to(image_embeds.device)  # the encoders may be on two
        logits = image_embeds @ text_embeds.T * self.logit_scale.exp() + getattr(self, "logit_bias", 0.0)
        loss = None
        if return_loss:
            positive = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
            loss = (sigmoid if hasattr(self, "logit_bias") else infonce)(logits, positive)
        return CLIPOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=logits.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )


def pool_text(read: Any, attention_mask: Tensor, text_pooling: TextPooling) -> Tensor:
    """A text encoder's output, with `last_hidden_state [T, L, D_t]`, as a vector a text `[T, D_t]`.

    Raises ValueError for `pooler` where the encoder has none.
    """
    if text_pooling == "pooler":
        if getattr(read, "pooler_output", None) is None:
            raise ValueError("this text encoder has no pooler: choose text_pooling mean, cls or last")
        return read.pooler_output
    states, mask = read.last_hidden_state, attention_mask.to(read.last_hidden_state)
    if text_pooling == "mean":
        return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    places = torch.arange(states.shape[1], device=states.device)
    found = torch.where(mask.bool(), places, -1).amax(dim=1) if text_pooling == "last" else mask.argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), found]


def build_dual_encoder(
    vision: str | list[str],
    language: str,
    *,
    image_size: Any = None,
    image_aspect_ratio: Any = "square",
    trust_remote_code: bool = False,
    projection_dim: int | None = None,
    **config: Any,
) -> tuple[DualEncoderModel, VisionTextDualEncoderProcessor]:
    """Join the vision encoder `vision` and the text encoder `language`, each a folder or a Hub name, by projections
    that nobody has trained; but that of a CLIP that comes with its own is where the images' begins, unless
    `projection_dim` is another. `config` are arguments of [`DualEncoderConfig`]; the others are those of
    [`vlm.build.load_vision`]. Weights are float32.

    Raises ValueError for an encoder that does not pool, and as [`vlm.build.load_vision`].
    """
    vision_model, image_processor = load_vision(
        vision,
        image_size=image_size,
        image_aspect_ratio=image_aspect_ratio,
        pooled=True,
        trust_remote_code=trust_remote_code,
    )
    text_model, tokenizer = load_text_encoder(
        language, pooled=config.get("text_pooling") == "pooler", trust_remote_code=trust_remote_code
    )
    with torch.no_grad():
        pixels = image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
        pooled = encode(vision_model.eval(), pixels).pooled
    if pooled is None:
        raise ValueError(f"{vision} does not pool what it sees into one vector; choose another vision encoder")
    own = own_projection(vision if isinstance(vision, str) else vision[0], vision_model)
    attention = [part.config._attn_implementation for part in (vision_model, text_model)]
    made = DualEncoderConfig(
        vision_config=copy.deepcopy(vision_model.config),
        text_config=copy.deepcopy(text_model.config),
        vision_pooled_size=pooled.shape[-1],
        projection_dim=projection_dim or (512 if own is None else len(own)),
        **config,
    )
    # A nesting configuration resets the attention implementation that each part was loaded with.
    for part, implementation in zip((vision_model, text_model), attention, strict=True):
        part.config._attn_implementation = implementation
    model = DualEncoderModel(made, vision_model, text_model)
    if own is not None and own.shape == model.visual_projection.weight.shape:
        model.visual_projection.weight.data.copy_(own)
    return model, VisionTextDualEncoderProcessor(image_processor, tokenizer)


def own_projection(name: str, vision_model: PreTrainedModel) -> Tensor | None:
    """The weights `[D, D_v]` that bring a CLIP's images to its texts, if `name` is one and has them."""
    if not isinstance(vision_model.config, CLIPVisionConfig):
        return None
    name = checkpoint_of(name)
    config = copy.deepcopy(vision_model.config)
    # CLIP's own goes before its vision half's; a model that writes, whose eye is a CLIP, has none.
    config.projection_dim = getattr(AutoConfig.from_pretrained(name), "projection_dim", config.projection_dim)
    try:
        whole = load_quietly(CLIPVisionModelWithProjection, name, config=config)
    except ValueError:  # one that is no dual encoder's
        return None
    return whole.visual_projection.weight.data


def load_text_encoder(name: str, *, pooled: bool, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """A text encoder, without the vision half if it has one, and its tokenizer.

    Raises ValueError if weights are missing; those of its pooling layer only if it is to be `pooled`, and for a
    tokenizer that has nothing to pad with.
    """
    with reading(name, kind="a text encoder"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        config = getattr(config, "text_config", None) or config
        text_model = load_quietly(
            AutoModel, name, pooled=pooled, config=config, dtype="float32", trust_remote_code=trust_remote_code
        )
    with reading(name, "tokenizer", kind="a text encoder"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name} has neither a padding token nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    return text_model, tokenizer


def longest_text(tokenizer: Any, config: Any) -> int:
    """How many tokens the text half of the dual encoder of `config` reads; 512 where it does not say."""
    places = getattr(config.text_config, "max_position_embeddings", None) or 512
    if not isinstance(most := tokenizer.model_max_length, int | float):
        raise ValueError(f"model_max_length in tokenizer_config.json must be a number, not {most!r:.80}")
    return int(min(most, places))


def text_lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """How many tokens each text has, before it is cut."""
    return [len(ids) for ids in tokenizer(list(texts), split_special_tokens=True, verbose=False)["input_ids"]]


def reads_padding(config: Any) -> bool:
    """Whether the text half of the dual encoder of `config` reads texts with their padding, always as long as it has
    positions, and takes the last of these for the text's vector: SigLIP's."""
    return bool(config.text_config.model_type.startswith("siglip"))


def tokenize(tokenizer: Any, config: Any, texts: Sequence[str]) -> Any:
    """Texts as the text half of a dual encoder was trained on them; longer ones than it has positions are cut."""
    return tokenizer(
        list(texts),
        padding="max_length" if reads_padding(config) else True,
        truncation=True,
        max_length=longest_text(tokenizer, config),
        split_special_tokens=True,  # a text cannot end itself
        return_tensors="pt",
    )


def is_dual_encoder(config: Any) -> bool:
    """Return whether it is the configuration of a model that gives images and texts vectors in one space, as CLIP does.
    A saved model that writes texts is none, although BLIP's configuration is that of both."""
    if {*(config.architectures or ())} & {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}:
        return False
    found: Any = MODEL_MAPPING.get(type(config), ())
    classes = found if isinstance(found, tuple) else (found,)
    return any(hasattr(each, "get_text_features") and hasattr(each, "get_image_features") for each in classes)
