"""The failures in transformers' test suites that are no shortcoming of our model, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.transformers_suites.run import Outcome


@dataclass
class Allowed:
    """A test that may fail.

    Attributes:
        test: its suite and name.
        reason: why its failure is no shortcoming.
        variants: the variants of our model that fail it; empty for all.
    """

    test: str
    reason: str
    variants: tuple[str, ...] = ()


TILED = ("prefix+cross_attention", "anyres")
NO_HIDDEN_SIZE = "the test looks for hidden_size of an encoder, which neither several encoders nor those of timm have"
NO_TYPES = "the test gives no token_type_ids, which alone say where the prompt of a prefix LM ends"
WITHOUT_TYPES = (
    "test_custom_4d_attention_mask",
    "test_generate_continue_from_cache",
    "test_generate_from_random_inputs_embeds",
    "test_model_rope_scaling_from_config_0_linear",
    "test_model_rope_scaling_from_config_1_dynamic",
    "test_model_rope_scaling_from_config_2_yarn",
)
ALLOWED = [
    Allowed(
        "Processor::test_apply_chat_template_image_0",
        "the test expects one row of pixel_values for each image; with tiling there is one for each tile",
        TILED,
    ),
    Allowed(
        "Processor::test_apply_chat_template_image_1",
        "the test expects one row of pixel_values for each image; with tiling there is one for each tile",
        TILED,
    ),
    Allowed(
        "Processor::test_subprocessor_defaults_1_images",
        "the test expects what the image processor alone gives; with tiling the processor first cuts the image",
        TILED,
    ),
    Allowed(
        "Processor::test_processor_from_pretrained_vs_from_components",
        "the test makes a processor without the tokenizer of the Q-Former",
        ("qformer",),
    ),
    Allowed(
        "Model::test_get_image_features_output_0",
        NO_HIDDEN_SIZE,
        ("two_encoders", "convolutional"),
    ),
    Allowed(
        "Model::test_get_image_features_output_2",
        NO_HIDDEN_SIZE,
        ("two_encoders", "convolutional"),
    ),
    Allowed(
        "Model::test_capture_outputs_decorator",
        "the test sets output_attentions in the configuration of the encoder, which encoders of timm refuse",
        ("convolutional",),
    ),
    *(Allowed(f"Model::{test}", NO_TYPES, ("prefix_lm",)) for test in WITHOUT_TYPES),
]


def problems(variant: str, outcomes: Mapping[str, Outcome], allowed: list[Allowed] = ALLOWED) -> list[str]:
    """Return what is wrong with the outcomes over a variant: failures that are not allowed, and allowed failures that
    do not occur. Entries for suites that did not run are left out.
    """
    expected = {entry.test for entry in allowed if variant in entry.variants or not entry.variants}
    failed = {name for name, outcome in outcomes.items() if outcome.outcome == "failed"}
    found = [f"{name} fails over {variant}: {outcomes[name].message[:500]}" for name in sorted(failed - expected)]
    for name in sorted(expected - failed):
        if name in outcomes:
            found.append(
                f"{name} {outcomes[name].outcome} over {variant}, and is listed as a failure: take it off the list"
            )
    return found
