"""Models that are split over two devices answer as the whole model does."""

import os
import subprocess
import sys

import pytest

from tests.emulated_gpu.cases import MODELS
from tests.vlm.test_device_map import MODELS as OTHERS

NAMES = list(dict.fromkeys([*OTHERS, *MODELS]))


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NAMES)
def test_a_split_model_answers_as_the_whole_one(name):
    environment = os.environ | {"EMULATED_GPU_COUNT": "2"}
    command = [sys.executable, "-m", "tests.emulated_gpu.split", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
