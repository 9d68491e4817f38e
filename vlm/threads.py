"""How OpenMP's threads wait for each other. Set before torch is imported: its OpenMP reads the environment once."""

from __future__ import annotations

import os

SPIN_COUNT = "10000"
"""How often a waiting thread of GNU OpenMP looks for work before it sleeps."""


def share_processors() -> None:
    """Have waiting threads sleep soon, unless the user has set how they wait.

    They spin 300,000 times by default. Where other processes are busy, that takes the processor from the thread that
    the others wait for, and a training step takes ten times as long (`python -m benchmarks.busy`).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
