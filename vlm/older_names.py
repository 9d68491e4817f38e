"""The names that weights had before the model had a base model, and their present names.

before                                      now
vision_tower                                model.vision_tower
multi_modal_projector, anyres_merger ...    model.multi_modal_projector, model.anyres_merger ...
language_model.model                        model.language_model     (what the causal language model calls its decoder)
language_model.lm_head                      lm_head
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, WeightTransform

MOVED = ("vision_tower.", "multi_modal_projector.", "anyres_merger.", "tile_positions.")
LANGUAGE = "language_model."
IN_PEFT = "base_model.model."


class OlderNames(PrefixChange):
    """Renames the weights of older folders as they are loaded. Folders are always saved with the present names.

    To transformers this is a change of prefixes, which it expects in older folders alone.

    Attributes:
        decoders: what the causal language models that there are call their decoders.
    """

    decoders: ClassVar[set[str]] = set()
    heads: ClassVar[set[str]] = set()

    def __init__(self, source_patterns: Any = r"^language_model\.", target_patterns: Any = "model.language_model."):
        super(PrefixChange, self).__init__(source_patterns, target_patterns)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        name = present_name(source_key)
        if name == source_key:
            return source_key, None
        self._was_used = True
        return name, self.source_patterns[0]

    def reverse_transform(self) -> WeightTransform:
        return WeightRenaming(r"^(?!)", "")  # matches nothing


def present_name(name: str) -> str:
    """Return the present name of a weight or module; one that is not an older name stays as it is.

    Args:
        name: as in the model, or as in a LoRA of it.
    """
    if name.startswith(IN_PEFT):
        return IN_PEFT + present_name(name.removeprefix(IN_PEFT))
    if name.startswith(MOVED):
        return f"model.{name}"
    if not name.startswith(LANGUAGE):
        return name
    inner = name.removeprefix(LANGUAGE)
    part, _, rest = inner.partition(".")
    if part in OlderNames.decoders:
        return f"model.{LANGUAGE}{rest}"
    return inner if part in OlderNames.heads else name


def register_older_names(model_type: str, causal_lm: PreTrainedModel) -> None:
    """Make transformers rename the weights of older folders of a `model_type`.

    Args:
        causal_lm: a language model as theirs.
    """
    OlderNames.decoders.add(causal_lm.base_model_prefix)
    OlderNames.heads.update(causal_lm._modules.keys() - {causal_lm.base_model_prefix})
    register_checkpoint_conversion_mapping(model_type, [OlderNames()], overwrite=True)
