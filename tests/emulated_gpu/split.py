"""Compare a model that is split over two devices with the whole model on one.

EMULATED_GPU_COUNT=2 python -m tests.emulated_gpu python -m tests.emulated_gpu.split NAME...
"""

import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from tests.emulated_gpu.cases import MODELS
from tests.tiny import tiny
from tests.vlm.test_device_map import MODELS as OTHERS
from tests.vlm.test_device_map import answers


def made(name: str) -> tuple[Any, Any]:
    return OTHERS[name]() if name in OTHERS else tiny(**MODELS[name])


def device_maps(model: Any) -> Iterator[dict[str, Any]]:
    """Yield options of `from_pretrained`: `auto` with little memory on the first device, and the parts in turn."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    for share in (0.2, 0.45, 0.7):
        yield {"device_map": "auto", "max_memory": {0: int(share * total), 1: 2 * total}}
    yield {"device_map": {part: number % 2 for number, (part, _) in enumerate(model.named_children())}}


def differences(name: str) -> Iterator[str]:
    """Yield the device maps with which the model answers differently."""
    model, processor = made(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        options = list(device_maps(model))
        written, talked, likely = answers(model.to("cuda:0"), processor)
        for placed in options:
            split = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **placed).eval()
            found = answers(split, processor)
            if found[:2] != (written, talked) or not torch.allclose(found[2], likely, atol=1e-3):
                yield f"{name}: {split.hf_device_map}"


if __name__ == "__main__":
    told = [line for name in sys.argv[1:] for line in differences(name)]
    sys.exit("\n".join(told) or 0)
