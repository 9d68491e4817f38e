"""One side of a comparison in a process of its own: `run.py` starts it and says when to go.

Reads one JSON object a line: first `{"side": name, "shape": {...}, "options": {...}}`, then `{"repeat": number}` for
each repeat. Answers each with one JSON object a line, to which the peak of resident memory since the repeat began is
added, in bytes.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path


def peak_memory() -> int:
    """The largest resident set since the last `reset_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers

    def answer(value: dict) -> None:
        print(json.dumps(value), file=answers, flush=True)

    request = json.loads(sys.stdin.readline())
    try:
        from benchmarks.sides import SIDES
        from benchmarks.workload import Shape

        side = SIDES[request["side"]](Shape(**request["shape"]), **request["options"])
        answer({"ready": True})
        for line in sys.stdin:
            reset_peak()
            answer(side.run(json.loads(line)["repeat"]) | {"peak": peak_memory()})
    except Exception:
        answer({"error": traceback.format_exc()})


if __name__ == "__main__":
    main()
