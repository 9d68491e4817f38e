"""The speed limit of a device, as matrix products reach it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

SECONDS = 1.2
"""About how long the products of one size may take."""
TIMED = 5
LARGEST = 8192


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter) -> float:
    """FLOPs per second of a square matrix product on `device` in `dtype`, measured once per process.

    Sizes double from 256 to 8192 as long as time allows, the best size counts, and of each size the median of its three
    fastest products. Vendors' numbers are higher: nothing reaches them.
    """
    best, size, seconds = 0.0, 256, 0.0
    numbers = torch.Generator(device).manual_seed(0)  # the others stay as they are, for dropout
    while size <= LARGEST and 8 * seconds * (TIMED + 1) < SECONDS:
        left, right = torch.randn(2, size, size, device=device, generator=numbers).to(dtype)
        product = torch.empty_like(left)
        times = []
        for _ in range(TIMED + 1):
            start = clock()
            torch.mm(left, right, out=product)
            synchronize(device)
            times.append(clock() - start)
        seconds = sorted(times[1:])[1]  # the first one warms up
        best = max(best, 2 * size**3 / seconds)
        size *= 2
    return best


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
