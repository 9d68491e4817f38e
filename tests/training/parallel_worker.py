"""One of the processes that `launch` starts: trains recipe after recipe, or does as the test says.

torchrun ... -m tests.training.parallel_worker [--fsdp] [--at-step-2 hang|die] RECIPE... [--resume RECIPE...]
"""

import argparse
import os
import signal

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from rich.console import Console
from transformers import TrainerCallback

from vlm import recipe
from vlm.training import run
from vlm.training.callbacks import MetricsLog


def shard_on_cpu() -> None:
    """Make accelerate believe that these processes have GPUs: on what it knows for CPUs it does not shard."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)


def misbehave(how: str) -> None:
    """At the end of the second step the second process hangs, or dies as it would without memory."""

    def on_step_end(self: TrainerCallback, args, state, control, **kwargs) -> None:
        if args.process_index == 1 and state.global_step == 2:
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()

    MetricsLog.on_step_end = on_step_end


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--resume", nargs="*", default=[])
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--at-step-2", choices=["hang", "die"])
    options = parser.parse_args()
    if options.fsdp:
        shard_on_cpu()
    if options.at_step_2:
        misbehave(options.at_step_2)
    console = Console(width=200, quiet=os.environ["RANK"] != "0")
    for path in options.recipes:
        run.train(recipe.load(path), console=console)
    for path in options.resume:
        run.train(recipe.load(path), resume=True, console=console)


if __name__ == "__main__":
    main()
