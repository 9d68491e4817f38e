"""How OpenMP's waiting threads cope with a busy machine: `python -m benchmarks.busy`.

A thread of OpenMP that has finished its part spins before it sleeps. On a quiet machine that saves the time of waking
it; on a busy one it takes the processor from the thread that all others wait for. Measured are forward and backward
passes of one decoder layer of SmolLM2-135M's size over 512 tokens, with nothing else running and next to as many busy
processes as there are processors, for each setting of the environment, in an order that changes from one alternation to
the next. The busy machine's ideal is what a fair scheduler gives: half of the processors, so twice the quiet time of
the fastest setting.

Takes about fifteen minutes and prints a table of medians; the range of the quiet times says how far processes with the
same setting differ. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time

from vlm.threads import SPIN_COUNT

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}
SETTINGS = {
    f"{name}, set by vlm" if SPIN_COUNT in values.values() else name: values for name, values in SETTINGS.items()
}
REPEATS = 5
PASSES = {"quiet": 30, "busy": 10}
LIMIT = 120
"""Seconds after which a measurement is given up; its time is then a lower bound."""


def passes(count: int) -> float:
    """Seconds of a pass: the mean of `count`, after three that are not counted."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=576, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536,
    )  # fmt: skip
    layer = LlamaModel(config)
    hidden = torch.randn(1, 512, 576)
    begin = 0.0
    for number in range(count + 3):
        if number == 3:
            begin = time.perf_counter()
        layer(inputs_embeds=hidden, use_cache=False).last_hidden_state.square().mean().backward()
    return (time.perf_counter() - begin) / count


def measured(values: dict[str, str], load: str) -> float:
    """The same in a process of its own, whose environment has `values`."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    if load == "quiet":
        stop(busy)
    try:
        command = [sys.executable, "-m", "benchmarks.busy", str(PASSES[load])]
        done = subprocess.run(command, env=env | values, capture_output=True, text=True, timeout=LIMIT, check=True)
        return float(done.stdout)
    except subprocess.TimeoutExpired:
        return LIMIT / PASSES[load]
    finally:
        stop(busy)


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def main() -> None:
    found: dict[tuple[str, str], list[float]] = {}
    order = random.Random(0)
    for _ in range(REPEATS):
        for load in PASSES:
            for name in order.sample(list(SETTINGS), len(SETTINGS)):
                found.setdefault((name, load), []).append(measured(SETTINGS[name], load))
    medians = {key: statistics.median(times) for key, times in found.items()}
    quiet = min(time for (_, load), time in medians.items() if load == "quiet")
    print("| setting | quiet, ms per pass (range) | of the fastest | busy, ms per pass | of the ideal |")
    print("| --- | --- | --- | --- | --- |")
    for name in SETTINGS:
        alone, shared = medians[name, "quiet"], medians[name, "busy"]
        low, high = min(found[name, "quiet"]), max(found[name, "quiet"])
        more = "over " if shared >= LIMIT / PASSES["busy"] else ""
        print(
            f"| {name} | {alone * 1000:.0f} ({low * 1000:.0f}-{high * 1000:.0f}) | {alone / quiet:.2f} | "
            f"{more}{shared * 1000:.0f} | {more}{shared / (2 * quiet):.2f} |"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(passes(int(sys.argv[1])))
    else:
        main()
