"""Ten variants of our model, and Llava of transformers, with processors and inputs for transformers' test suites."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Dinov2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    SiglipVisionConfig,
    TimmWrapperConfig,
)

from tests.stock import chat_template, tokenizer_with
from tests.tiny import byte_level_tokenizer, clip_config, image, image_processor, small_projector, text_config, tiny
from vlm.base_model import VLMModel
from vlm.build import assemble
from vlm.modeling import VLMForConditionalGeneration
from vlm.vision_towers import side_by_side

LAYERS = 2
SIGLIP = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TEXTS = ["<image>0123? cat", "<image>3210? cat", "<image>1122? cat"]
"""One image and as many tokens each."""


@dataclass
class Variant:
    """What transformers' suites are run on.

    Attributes:
        model_classes: the model without and with output head.
        config: their configuration.
        processor: makes their inputs.
        has_attentions: whether the encoder has attention.
        num_attentions, num_hidden_states: how many the encoder gives.
    """

    model_classes: tuple[type, type]
    config: Any
    processor: Any
    has_attentions: bool = True
    num_attentions: int = LAYERS
    num_hidden_states: int = LAYERS + 1

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return a batch of three texts, each with an image."""
        pictures = [[image(seed, (60, 30))] for seed in range(len(TEXTS))]
        return dict(self.processor(images=pictures, text=TEXTS, return_tensors="pt"))


def ours(*args: Any, text: Any = None, decoder: str = "llama", **options: Any) -> Variant:
    options = {"vision_config": clip_config(num_hidden_layers=LAYERS), "cross_attention_every": 1, **options}
    text = text or text_config(decoder, LAYERS, tie_word_embeddings=options.pop("tie_word_embeddings", False))
    return of(*tiny(*args, text=text, **options))


def of(model: Any, processor: Any, **options: Any) -> Variant:
    return Variant((VLMModel, VLMForConditionalGeneration), model.config, processor, **options)


def siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(**SIGLIP, intermediate_size=48, vision_use_head=False)


def two_encoders() -> Variant:
    torch.manual_seed(0)
    towers = [AutoModel.from_config(config) for config in (clip_config(num_hidden_layers=2), Dinov2Config(**SIGLIP))]
    tower, pixels = side_by_side(towers, [image_processor(), image_processor()])
    language = AutoModelForCausalLM.from_config(text_config("qwen3", LAYERS))
    return of(
        *assemble(tower, language, pixels, byte_level_tokenizer()),
        num_attentions=2 * LAYERS,
        num_hidden_states=2 * (LAYERS + 1),
    )


def convolutional() -> Variant:
    torch.manual_seed(0)
    encoder = TimmWrapperConfig(
        architecture="resnet18", model_args={"channels": [8, 8, 16, 24]}, pretrained_cfg={"input_size": (3, 64, 64)}
    )
    language = AutoModelForCausalLM.from_config(text_config("gpt2", LAYERS, tie_word_embeddings=True))
    parts = (AutoModel.from_config(encoder), language, image_processor(64), byte_level_tokenizer())
    return of(*assemble(*parts, projector="mlp"), has_attentions=False, num_hidden_states=5)


def llava() -> Variant:
    tokenizer = tokenizer_with("<image>")
    config = LlavaConfig(
        vision_config=clip_config(num_hidden_layers=LAYERS),
        text_config=text_config("llama", LAYERS, pad_token_id=tokenizer.pad_token_id),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    options: dict[str, Any] = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    options |= {"num_additional_image_tokens": 1, "chat_template": chat_template("<image>")}
    processor = LlavaProcessor(image_processor(), tokenizer, **options)
    return Variant((LlavaModel, LlavaForConditionalGeneration), config, processor)


LLAVA = "llava"
OF_TOKENS = ("input_ids", "attention_mask", "token_type_ids")
QFORMER = small_projector("qformer") | {"use_qformer_text_input": True}
VARIANTS: dict[str, Callable[[], Variant]] = {
    LLAVA: llava,
    "prefix": lambda: ours(),
    "cross_attention": lambda: ours(fusion="cross_attention", projector=small_projector("resampler")),
    "cross_attention_layers": lambda: ours(
        fusion="cross_attention", projector="linear", decoder="qwen2", cross_attention_layers=[0, 2]
    ),
    "prefix+cross_attention": lambda: ours(
        fusion="prefix+cross_attention",
        projector="pixel_shuffle",
        decoder="qwen3",
        cross_attention_block="idefics",
        tiling={"type": "tiles", "max_tiles": 2},
    ),
    "anyres": lambda: ours(tiling={"type": "anyres", "max_tiles": 2}),
    "qformer": lambda: ours(projector=QFORMER, decoder="mistral"),
    "bidirectional": lambda: ours(
        text=text_config("gemma3", LAYERS, sliding_window=64, tie_word_embeddings=True),
        projector="pixel_shuffle",
        vision_config=siglip(),
        image_attention="bidirectional",
    ),
    "prefix_lm": lambda: ours(
        decoder="gemma2", projector="linear", vision_config=siglip(), image_attention="prefix_lm"
    ),
    "two_encoders": two_encoders,
    "convolutional": convolutional,
}
"""Names to what makes them: Llava first, then ours."""


@functools.cache
def variant(name: str) -> Variant:
    """Return the variant `name`, made once."""
    return VARIANTS[name]()


class ModelTester:
    """What transformers' suites ask for: a configuration and inputs of a variant, and numbers of both."""

    batch_size = len(TEXTS)
    is_training = True
    num_hidden_layers = LAYERS
    num_attention_heads = 4
    hidden_size = 32
    image_size = 32
    vision_config: Any = {"num_hidden_layers": LAYERS, "hidden_size": 24}  # noqa: RUF012 - not changed

    def __init__(self, name: str) -> None:
        self.variant = variant(name)
        inputs = self.variant.inputs()
        self.pad_token_id = self.variant.processor.tokenizer.pad_token_id
        self.seq_length = self.encoder_seq_length = inputs["input_ids"].shape[1]

    def get_config(self) -> Any:
        """Return the configuration as it is before a model is made of it, which notes its attention."""
        return type(self.variant.config).from_dict(copy.deepcopy(self.variant.config.to_dict()))

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.get_config(), self.variant.inputs()

    def with_images(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return inputs with the images of the rows that have image tokens, if they have none."""
        ids = inputs.get("input_ids")
        if ids is None or "pixel_values" in inputs:
            return inputs
        config = self.variant.config
        is_image = ids == config.image_token_id
        rows = int(is_image.any(dim=1).sum())
        missing = {key: value for key, value in self.variant.inputs().items() if key not in OF_TOKENS}
        inputs = inputs | {key: value[: len(value) * rows // self.batch_size] for key, value in missing.items()}
        if getattr(config, "image_attention", "causal") != "causal":
            inputs["token_type_ids"] = is_image.long() if config.image_attention == "bidirectional" else 0 * ids
        return inputs
