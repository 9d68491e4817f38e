"""transformers' test suites over the variants; `tests.transformers_suites.run` runs pytest on this file."""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
import unittest
from pathlib import Path
from typing import Any

import torch
from transformers import Cache
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES

from tests.tiny import image
from tests.transformers_suites.source import import_suites
from tests.transformers_suites.variants import ModelTester, variant
from vlm.vision_cache import VisionLayer

FOLDER = Path(os.environ["TRANSFORMERS_TESTS"])
PICTURE = FOLDER / "picture.png"
image(0).save(PICTURE)
NAME = os.environ["TRANSFORMERS_VARIANT"]
test_modeling_common, test_processing_common, GenerationTesterMixin = import_suites(FOLDER, PICTURE)
ModelTesterMixin = test_modeling_common.ModelTesterMixin
ProcessorTesterMixin = test_processing_common.ProcessorTesterMixin
# Their tests look up by name which models have a head; names of packages other than transformers are not in there.
MODEL_MAPPING_NAMES["vlm"] = "VLMModel"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["vlm"] = "VLMForConditionalGeneration"


ids_tensor = test_modeling_common.ids_tensor


def text_ids(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Return random ids without image tokens: they come without images."""
    ids = ids_tensor(*args, **kwargs)
    return ids.masked_fill(ids == variant(NAME).config.image_token_id, 1)


test_modeling_common.ids_tensor = text_ids


CACHE_CHECKS = ("_check_cache_for_generate", "_check_past_key_values_for_generate")
"""What GenerationTesterMixin lets suites override, by its present and its older name."""


def without_vision(value: Any) -> Any:
    """Return a cache without the layer that keeps what cross-attention looks at, anything else as it is."""
    if not isinstance(value, Cache):
        return value
    text = copy.copy(value)
    text.layers = [layer for layer in value.layers if not isinstance(layer, VisionLayer)]
    return text


def check_layers_of_text(self: Any, check: Any, *args: Any, **kwargs: Any) -> None:
    check(self, *map(without_vision, args), **{name: without_vision(value) for name, value in kwargs.items()})


def model_suite(name: str) -> type:
    """Return ModelTesterMixin, with GenerationTesterMixin if there is one, over a variant."""
    mixins = [mixin for mixin in (ModelTesterMixin, GenerationTesterMixin) if mixin is not None]

    def set_up(self: Any) -> None:
        self.model_tester = ModelTester(name)

    def prepare_for_class(self: Any, inputs: Any, model_class: type, return_labels: bool = False) -> Any:
        """Add the images that `input_ids` speak of where a test leaves them out."""
        inputs = ModelTesterMixin._prepare_for_class(self, inputs, model_class, return_labels)
        return self.model_tester.with_images(inputs)

    def prepare_for_generate(self: Any, batch_size: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
        """Keep the tiles of the first images, where they keep the first rows."""
        config, inputs = mixins[-1].prepare_config_and_inputs_for_generate(self, sys.maxsize)
        kept = {key: value[: len(value) * batch_size // ModelTester.batch_size] for key, value in inputs.items()}
        return config, kept

    of_variant: dict[str, Any] = {"setUp": set_up, "_is_composite": True, "__module__": __name__}
    of_variant["_prepare_for_class"] = prepare_for_class
    of_variant["test_all_params_have_gradient"] = False  # encoders have a norm of pooled features, which nothing reads
    of_variant["all_model_classes"] = variant(name).model_classes
    of_variant["has_attentions"] = variant(name).has_attentions
    of_variant["_image_features_get_expected_num_attentions"] = lambda self: variant(name).num_attentions
    of_variant["_image_features_get_expected_num_hidden_states"] = lambda self: variant(name).num_hidden_states
    for hook in CACHE_CHECKS:
        if check := getattr(GenerationTesterMixin, hook, None):
            of_variant[hook] = functools.partialmethod(check_layers_of_text, check)
    if GenerationTesterMixin is not None:
        of_variant["prepare_config_and_inputs_for_generate"] = prepare_for_generate
    return type("Model", (*mixins, unittest.TestCase), of_variant)


def processor_suite(name: str) -> type:
    """Return ProcessorTesterMixin over a variant's processor."""
    processor = variant(name).processor

    def set_up(cls: Any) -> Any:
        return processor

    of_variant = {
        "processor_class": type(processor),
        "_setup_from_components": classmethod(set_up),
        "prepare_processor_dict": staticmethod(lambda: options_of(processor)),
        "__module__": __name__,
    }
    return type("Processor", (ProcessorTesterMixin, unittest.TestCase), of_variant)


def options_of(processor: Any) -> dict[str, Any]:
    """Return the arguments that a processor was made with, except its parts, as JSON files have them."""
    names = ("image_seq_length", "image_attention", "tiling", "patch_size", "vision_feature_select_strategy")
    names += ("num_additional_image_tokens", "chat_template")
    given = {key: getattr(processor, key, None) for key in names}
    return json.loads(json.dumps({key: value for key, value in given.items() if value is not None}))


Model = model_suite(NAME)
Processor = processor_suite(NAME)
