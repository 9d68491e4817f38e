"""Skip these tests where no GPU is emulated."""

import os
from pathlib import Path

import pytest

from tests.emulated_gpu.build import LIBRARY

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if LIBRARY not in os.environ:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="runs on an emulated GPU: make test-gpu"))
