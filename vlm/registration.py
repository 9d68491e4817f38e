"""`import vlm` makes the Auto classes of transformers know our model, without importing transformers itself.

Importing transformers takes most of a second, which `vlm --help` does not have. So the classes are registered when
`transformers.models.auto` is first imported, or at once if it already is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

AUTO_MODULE = "transformers.models.auto"


def register() -> None:
    """Register configuration, model and processor with AutoConfig, AutoModelForImageTextToText and AutoProcessor."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    from vlm.configuration import VLMConfig
    from vlm.modeling import VLMForConditionalGeneration
    from vlm.processing import VLMProcessor

    AutoConfig.register(VLMConfig.model_type, VLMConfig, exist_ok=True)
    AutoModelForImageTextToText.register(VLMConfig, VLMForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(VLMConfig, VLMProcessor, exist_ok=True)


class _RegisterAfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets the import of `AUTO_MODULE` go its way, then registers."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AUTO_MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        sys.meta_path.remove(self)
        register()


def register_with_transformers() -> None:
    """Register now if the Auto classes are loaded, else as soon as they are."""
    if AUTO_MODULE in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())
