"""Run a command on the emulated device: `python -m tests.emulated_gpu COMMAND ...`.

`--check` instead of a command prints nothing if the device works here, or else the reason, and exits with status 1.
"""

import os
import subprocess
import sys

from tests.emulated_gpu.build import Unavailable, environment


def main(arguments: list[str]) -> int | str | None:
    """Return the exit status, or what is wrong."""
    if not arguments:
        return __doc__
    try:
        variables = environment()
    except Unavailable as reason:
        return str(reason)
    if arguments == ["--check"]:
        script = "import torch; torch.ones(2, device='cuda').sum().item()"
        tried = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True)
        said = tried.stderr.strip().splitlines()
        return f"the emulated device does not support this torch: {said[-1] if said else ''}" if tried.returncode else 0
    os.execvpe(arguments[0], arguments, variables)


sys.exit(main(sys.argv[1:]))
