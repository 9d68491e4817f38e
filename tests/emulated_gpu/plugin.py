"""A pytest plugin for tests on the emulated device: training runs there, although tests ask for the CPU.

python -m tests.emulated_gpu python -m pytest -p tests.emulated_gpu.plugin tests/training
"""

import os

import pytest
import transformers

from tests.emulated_gpu.build import LIBRARY
from tests.emulated_gpu.log import log

if LIBRARY not in os.environ:
    raise pytest.UsageError("tests.emulated_gpu.plugin: start pytest with python -m tests.emulated_gpu")

_post_init = transformers.TrainingArguments.__post_init__


def _on_cuda(self):
    self.use_cpu = False
    _post_init(self)


transformers.TrainingArguments.__post_init__ = _on_cuda


def pytest_collection_modifyitems(config, items):
    of_cpu = [item for item in items if item.get_closest_marker("cpu")]
    items[:] = [item for item in items if not item.get_closest_marker("cpu")]
    config.hook.pytest_deselected(items=of_cpu)


def pytest_terminal_summary(terminalreporter):
    if "EMULATED_GPU_LOG" not in os.environ:
        terminalreporter.section("waits of the host (copies, launches and attention: EMULATED_GPU_LOG=FILE)")
        terminalreporter.write_line(log.table("waits", rows=15))
