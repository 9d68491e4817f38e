"""`import vlm` makes the Auto classes of transformers know our model, without importing transformers itself.

Importing transformers takes most of a second, which `vlm --help` does not have. So the classes are registered when
`transformers.models.auto` is first imported, or at once if it already is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

AUTO_MODULE = "transformers.models.auto"


def register() -> None:
    """Register configuration, models and processor with AutoConfig, AutoModel, AutoModelForImageTextToText,
    AutoModelForMultimodalLM and AutoProcessor, dual encoders with AutoModel, and encoders side by side with AutoModel
    and AutoImageProcessor. From then on chat templates are rendered within bounds."""
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from vlm.base_model import VLMModel
    from vlm.configuration import VLMConfig
    from vlm.dual_encoder import DualEncoderConfig, DualEncoderModel
    from vlm.modeling import VLMForConditionalGeneration
    from vlm.processing import VLMProcessor
    from vlm.template_bounds import bound_templates
    from vlm.vision_towers import register as register_vision_towers

    AutoConfig.register(VLMConfig.model_type, VLMConfig, exist_ok=True)
    AutoModel.register(VLMConfig, VLMModel, exist_ok=True)
    AutoModelForImageTextToText.register(VLMConfig, VLMForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(VLMConfig, VLMForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(VLMConfig, VLMProcessor, exist_ok=True)
    AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig, exist_ok=True)
    AutoModel.register(DualEncoderConfig, DualEncoderModel, exist_ok=True)
    register_vision_towers()
    bound_templates()


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Lets the import that brings `AUTO_MODULE` go its way, then registers.

    Modules of transformers and of ours import `AUTO_MODULE` on their own way, and nothing can be registered with what
    is half imported. So all their imports are watched, and the end of the outermost one is waited for.
    """

    watched = ("transformers.", "vlm.")

    def __init__(self) -> None:
        self.in_progress = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(self.watched):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = partial(self._execute, execute)  # type: ignore[method-assign]
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        self.in_progress += 1
        try:
            execute(module)
        finally:
            self.in_progress -= 1
        if not self.in_progress and AUTO_MODULE in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()


def register_with_transformers() -> None:
    """Register now if the Auto classes are loaded, else as soon as they are."""
    if AUTO_MODULE in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())
