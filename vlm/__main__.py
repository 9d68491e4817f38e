"""`python -m vlm`, also for `accelerate launch -m vlm train ...`."""

from vlm.cli import app

app(prog_name="vlm")
