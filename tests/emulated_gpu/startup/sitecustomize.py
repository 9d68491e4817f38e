"""Python imports this file when it starts. It activates the emulated device as soon as torch is imported."""

import os
import sys
from importlib.machinery import PathFinder


class _AfterTorch:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name == "torch" else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            from tests.emulated_gpu.mode import activate

            activate()

        spec.loader.exec_module = exec_module
        return spec


if "EMULATED_GPU_LIBRARY" in os.environ:
    sys.meta_path.insert(0, _AfterTorch)
